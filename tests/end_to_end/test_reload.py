"""Settings are read anew while calls go on: what is right holds from then on, what is wrong changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from support.counted_api import LIMIT_S, call, client, upstream
from support.scripted import running_receiver
from support.whole import Reloaded, Whole, suspend

from sidecar.dev.mock_backends import Receiver, Terms
from sidecar.dev.mock_backends.contract import KEY

TERMS = {"stripe": Terms(key=KEY)}


def billed(receiver: Receiver) -> dict[str, int]:
    """Events by customer that were taken."""
    found: dict[str, int] = {}
    for row in receiver.received:
        if row.verdict == "delivered" and isinstance(row.body, dict):
            customer = str(row.body.get("payload", {}).get("stripe_customer_id"))
            found[customer] = found.get(customer, 0) + 1
    return found


async def parked(whole: Whole) -> int:
    balance: dict[str, Any] = await whole.get("/balance")
    return sum(sum(totals["parked"].values()) for totals in balance["backends"].values())


async def until(holds: Any, what: str) -> None:
    try:
        async with asyncio.timeout(LIMIT_S):
            while not await holds():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not in time: {what}") from None


@pytest.mark.timeout(120)
async def test_a_new_customer_needs_no_restart_and_what_was_parked_for_want_of_it_goes_by_itself(
    tmp_path: Path,
) -> None:
    async with upstream() as (_, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        stripe = {
            "SIDECAR_BACKENDS": "ledger,stripe",
            "SIDECAR_STRIPE_URL": receiver.url,
            "SIDECAR_STRIPE_API_KEY": KEY,
            "SIDECAR_STRIPE_METERS": "api_calls",
        }
        before = '[subscribers.acme]\nstripe = "cus_acme"\n'
        async with Reloaded(tmp_path, url, before, **stripe) as whole:
            for who in ("acme", "bob", "bob", "eve"):
                assert (await call(session, whole, who))[0] == 200

            async def three() -> bool:
                return await parked(whole) == 3

            await until(three, "three are parked")
            code, said = await whole.reload(before + '[subscribers.bob]\nstripe = "cus_bob"\n')
            assert (code, said) == (0, "reloaded\n")

            async def one() -> bool:
                return await parked(whole) == 1 and billed(receiver).get("cus_bob") == 2

            await until(one, "bob's two have gone, eve's one is parked")
            assert (await call(session, whole, "bob"))[0] == 200

            async def again() -> bool:
                return billed(receiver) == {"cus_acme": 1, "cus_bob": 3}

            await until(again, "a call after the reload is billed")
            balance = await whole.settled()
    assert balance["holds"]


@pytest.mark.timeout(120)
async def test_limits_come_change_and_go(tmp_path: Path) -> None:
    def limit(amount: int) -> str:
        return f'[[limits]]\nname = "few"\nunit = "calls"\namount = {amount}\nwindow = "total"\n'

    async with upstream() as (up, url), client() as session:
        async with Reloaded(tmp_path, url, "", SIDECAR_WORKERS="2") as whole:

            async def statuses(count: int) -> list[int]:
                return [(await call(session, whole))[0] for _ in range(count)]

            assert await statuses(3) == [200] * 3
            assert (await whole.reload(limit(5)))[0] == 0
            assert await statuses(3) == [200, 200, 402], "the three before count: they are on record"
            assert (await whole.reload(limit(6)))[0] == 0
            assert await statuses(2) == [200, 402]
            assert (await whole.reload(""))[0] == 0
            assert await statuses(2) == [200, 200]
            assert (await whole.reload(limit(9)))[0] == 0
            assert await statuses(2) == [200, 402]
            assert up.calls == 9
            balance = await whole.settled()
    assert balance["holds"]


@pytest.mark.timeout(120)
async def test_a_limit_that_gets_another_window_counts_what_was_used_in_that(tmp_path: Path) -> None:
    def limit(amount: int, window: str) -> str:
        return f'[[limits]]\nname = "few"\nunit = "calls"\namount = {amount}\nwindow = "{window}"\n'

    async with upstream() as (_, url), client() as session:
        async with Reloaded(tmp_path, url, limit(9, "month")) as whole:
            assert [(await call(session, whole))[0] for _ in range(3)] == [200] * 3
            for amount, window in ((4, "total"), (5, "30d"), (6, "year")):
                assert (await whole.reload(limit(amount, window)))[0] == 0
                assert [(await call(session, whole))[0] for _ in range(2)] == [200, 402], window
                await whole.settled()
                (row,) = (await whole.get("/limits"))["limits"]
                assert (row["used"], row["window"]) == (str(amount), window)
            assert await whole.stop() == 0, whole.log.read_text()
            await whole.start()
            (row,) = (await whole.get("/limits"))["limits"]
            assert (row["used"], row["window"]) == ("6", "year")


@pytest.mark.timeout(120)
async def test_a_limit_that_gets_another_unit_charges_nothing_that_was_set_aside_in_the_old_one(tmp_path: Path) -> None:
    def limit(unit: str) -> str:
        return f'[[limits]]\nname = "one"\nunit = "{unit}"\namount = 1000\nwindow = "total"\n'

    async def uses(whole: Reloaded, used: str) -> None:
        async def does() -> bool:
            rows = (await whole.get("/limits"))["limits"]
            return all((row["used"], row["reserved"]) == (used, "0") for row in rows) and bool(rows or used == "0")

        await until(does, f"{used} tokens are used and none set aside")

    async with upstream() as (up, url), client() as session:
        async with Reloaded(tmp_path, url, limit("cost_usd"), SIDECAR_ON_DISCONNECT="stop") as whole:
            up.gate.clear()
            lost = asyncio.create_task(call(session, whole, max_tokens=100))
            async with asyncio.timeout(LIMIT_S):
                while not up.calls:
                    await asyncio.sleep(0.01)
            assert (await whole.reload(limit("total_tokens")))[0] == 0
            await uses(whole, "0")
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)
            await whole.settled()
            up.gate.set()
            assert (await call(session, whole, max_tokens=100))[0] == 200
            await whole.settled()
            await uses(whole, "15")
            units = {record["outcome"]: record["gate"]["units"] for record in await whole.records()}
            assert units == {"client_left": {"one": "cost_usd"}, "complete": {"one": "total_tokens"}}
            await whole.kill()
            await whole.start()
            await uses(whole, "15")


@pytest.mark.timeout(120)
async def test_what_open_calls_hold_is_held_over_a_reload(tmp_path: Path) -> None:
    toml = '[[limits]]\nname = "at-once"\nunit = "concurrent"\namount = 2\n'
    async with upstream() as (up, url), client() as session:
        async with Reloaded(tmp_path, url, toml) as whole:
            up.gate.clear()
            held = [asyncio.create_task(call(session, whole)) for _ in range(2)]
            async with asyncio.timeout(LIMIT_S):
                while up.calls < 2:
                    await asyncio.sleep(0.01)
            assert (await call(session, whole))[0] == 429
            assert (await whole.reload(toml + "# touched\n"))[0] == 0
            assert (await call(session, whole))[0] == 429
            up.gate.set()
            assert [status for status, _ in await asyncio.gather(*held)] == [200, 200], "they go on as they began"
            assert (await call(session, whole))[0] == 200


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("[[limits]\n", "is no TOML"),
        ('[[limits]]\nname = "x"\nunit = "apples"\namount = 1\nwindow = "day"\n', "apples"),
        ('[[meters]]\nname = "m"\naggregation = { type = "AVG", field = "input_tokens" }\n', "type is wrong"),
        ("[subscribers]\nacme = 7\n", "subscribers"),
        ('colour = "red"\n', "colour"),
    ],
)
async def test_nonsense_changes_nothing_and_is_said(tmp_path: Path, toml: str, told: str) -> None:
    good = '[[limits]]\nname = "few"\nunit = "calls"\namount = 2\nwindow = "total"\n'
    async with upstream() as (_, url), client() as session:
        async with Reloaded(tmp_path, url, good) as whole:
            assert (await call(session, whole))[0] == 200
            code, said = await whole.reload(toml)
            assert code == 1
            assert said.startswith("not reloaded, the old settings hold:")
            assert told in said
            ready = await whole.get("/readyz")
            assert any("not reloaded" in note for note in ready["notes"]), ready
            assert [(await call(session, whole))[0] for _ in range(2)] == [200, 402], "the old limit"
            assert (await whole.reload(good))[0] == 0
            assert not any("not reloaded" in note for note in (await whole.get("/readyz"))["notes"])


@pytest.mark.timeout(120)
async def test_what_needs_a_restart_is_named_and_stays(tmp_path: Path) -> None:
    async with upstream() as (_, url), client() as session:
        async with Reloaded(tmp_path, url, "") as whole:
            code, said = await whole.reload('workers = 3\nretention = "1d"\nbackends = ["ledger"]\n')
            assert code == 0
            assert "these settings wait for a restart: SIDECAR_WORKERS, SIDECAR_RETENTION" in said
            assert len(whole.children()["serve"]) == 1
            assert (await call(session, whole))[0] == 200


@pytest.mark.timeout(120)
async def test_what_needs_something_that_waits_for_a_restart_is_told_with_it(tmp_path: Path) -> None:
    limit = '[[limits]]\nname = "each"\ndimensions.team = "*"\nunit = "calls"\namount = 1\nwindow = "day"\n'
    async with upstream() as (_, url), client() as session:
        async with Reloaded(tmp_path, url, "") as whole:
            meter = whole.children()["meter"]
            code, said = await whole.reload(f'dimensions = {{ team = "x-team" }}\n{limit}')
            assert code == 1
            assert "dimensions.team: no call is filed under it (SIDECAR_DIMENSIONS has none)" in said
            assert "it takes a restart, by which SIDECAR_DIMENSIONS would come into force" in said
            assert whole.children()["meter"] == meter, "nobody began, and died of it"
            assert (await call(session, whole))[0] == 200


@pytest.mark.timeout(120)
async def test_a_secret_is_read_from_its_file_again(tmp_path: Path) -> None:
    async with upstream() as (_, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        key = tmp_path / "key"
        key.write_text("sk_old_one\n")
        stripe = {
            "SIDECAR_BACKENDS": "ledger,stripe",
            "SIDECAR_STRIPE_URL": receiver.url,
            "SIDECAR_STRIPE_API_KEY_FILE": str(key),
            "SIDECAR_STRIPE_METERS": "api_calls",
        }
        async with Reloaded(tmp_path, url, '[subscribers.acme]\nstripe = "cus_acme"\n', **stripe) as whole:
            assert (await call(session, whole))[0] == 200

            async def refused() -> bool:
                return any("stripe is blocked" in note for note in (await whole.get("/readyz"))["notes"])

            await until(refused, "the old key is refused")
            key.write_text(f"{KEY}\n")
            assert (await whole.reload())[0] == 0

            async def taken() -> bool:
                return billed(receiver) == {"cus_acme": 1}

            await until(taken, "the new key is taken")
            assert "sk_old_one" not in whole.log.read_text()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("durability", ["committed", "buffered"])
async def test_under_load_no_call_fails_no_connection_closes_and_each_is_recorded_once(
    tmp_path: Path, durability: str
) -> None:
    async with upstream() as (up, url):
        async with Reloaded(tmp_path, url, "", SIDECAR_WORKERS="2", SIDECAR_DURABILITY=durability) as whole:
            going, done = True, 0

            async def calls() -> None:
                nonlocal done
                opened = 0

                async def count(*_: Any) -> None:
                    nonlocal opened
                    opened += 1

                trace = aiohttp.TraceConfig()
                trace.on_connection_create_end.append(count)
                async with aiohttp.ClientSession(trace_configs=[trace]) as session:
                    while going:
                        assert (await call(session, whole))[0] == 200
                        done += 1
                assert opened == 1, "its one connection was kept"

            callers = [asyncio.create_task(calls()) for _ in range(4)]
            for number in range(3):
                before = done
                code, said = await whole.reload(f"# {number}\n")
                assert (code, said) == (0, "reloaded\n")

                async def more(before: int = before) -> bool:
                    return done > before + 20

                await until(more, "calls go on")
            going = False
            await asyncio.gather(*callers)
            balance = await whole.settled()
            records = await whole.records()
    assert balance["holds"]
    assert len(records) == len({record["id"] for record in records}) == up.calls == done


@pytest.mark.timeout(120)
async def test_a_metering_process_that_dies_while_it_hands_over_is_started_with_the_new_settings(
    tmp_path: Path,
) -> None:
    toml = '[[limits]]\nname = "few"\nunit = "calls"\namount = 1\nwindow = "total"\n'
    async with upstream() as (_, url), client() as session:
        async with Reloaded(tmp_path, url, "") as whole:
            assert (await call(session, whole))[0] == 200
            (meter,) = whole.children()["meter"]
            suspend(meter)  # so that it cannot hand over
            reloading = asyncio.create_task(whole.reload(toml))
            await asyncio.sleep(0)
            os.kill(meter, signal.SIGKILL)
            assert (await reloading)[0] == 0
            assert (await call(session, whole))[0] == 402


@pytest.mark.timeout(180)
async def test_a_new_process_that_cannot_begin_brings_the_old_settings_back(tmp_path: Path) -> None:
    good = '[[limits]]\nname = "few"\nunit = "calls"\namount = 1\nwindow = "total"\n'
    async with upstream() as (_, url), client() as session:
        async with Reloaded(tmp_path, url, good) as whole:
            assert (await call(session, whole))[0] == 200
            code, said = 0, ""
            for _ in range(5):  # it may have been ready before it was killed: then the next one
                (meter,) = whole.children()["meter"]
                reloading = asyncio.create_task(whole.reload(""))
                async with asyncio.timeout(LIMIT_S):
                    while (found := whole.children()["meter"]) == [meter] or not found:
                        await asyncio.sleep(0.001)
                os.kill(found[0], signal.SIGKILL)
                code, said = await reloading
                if code:
                    break
                assert (await whole.reload(good))[0] == 0
            assert code == 1
            assert "the settings that held before are in force again" in said
            await whole.settled()
            assert (await call(session, whole))[0] == 402, "the old limit holds"


@pytest.mark.timeout(120)
async def test_processes_that_die_are_started_with_the_prices_that_hold_whatever_their_file_is_by_now(
    tmp_path: Path,
) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text(
        '[{"id": "openai", "api_pattern": "https://x", "models": [{"id": "m", "match": {"starts_with": "gpt-5"}, '
        '"prices": {"input_mtok": 1}}]}]'
    )
    toml = '[[limits]]\nname = "money"\nunit = "cost_usd"\namount = "5"\nwindow = "total"\n'  # those that serve ask too
    async with upstream() as (_, url), client() as session:
        async with Reloaded(tmp_path, url, toml, SIDECAR_PRICES=str(prices)) as whole:
            assert (await call(session, whole))[0] == 200
            prices.write_text("{half of a")
            code, said = await whole.reload()
            assert code == 1
            assert "is no JSON" in said
            for role in ("meter", "serve"):
                (pid,) = whole.children()[role]
                os.kill(pid, signal.SIGKILL)

                async def answers() -> bool:
                    with contextlib.suppress(aiohttp.ClientError):
                        return (await call(session, whole))[0] == 200
                    return False

                await until(answers, f"the next one of {role} is there")
            assert (await whole.settled())["holds"]
        log = whole.log.read_text()
        assert "has died" not in log
        assert log.count("was killed by SIGKILL: it is started again") == 2


async def test_a_worker_that_dies_is_started_with_the_certificates_that_hold_whatever_their_files_are_by_now(
    tmp_path: Path,
) -> None:
    """Of the listener, and of the upstream's verification; a reload had refused what the files say."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    chain, key, trusted = (tmp_path / name for name in ("chain.pem", "key.pem", "ca.pem"))
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    authority.cert_pem.write_to_path(str(trusted))
    of_server, of_client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    issued.configure_cert(of_server)
    authority.configure_trust(of_client)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=of_server)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    settings = {
        "SIDECAR_TLS_CERT_FILE": str(chain),
        "SIDECAR_TLS_KEY_FILE": str(key),
        "SIDECAR_UPSTREAM_CA_FILE": str(trusted),
    }
    async with server, Reloaded(tmp_path, url, "", **settings) as whole, aiohttp.ClientSession() as session:

        async def answers() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(whole.proxy_url, ssl=of_client) as response:
                    return response.status == 204
            return False

        assert await answers()
        for file in (chain, trusted):
            file.write_text("half of a")
        code, said = await whole.reload()
        assert code == 1
        assert "SIDECAR_TLS_CERT_FILE" in said
        assert "SIDECAR_UPSTREAM_CA_FILE" in said
        (pid,) = whole.children()["serve"]
        os.kill(pid, signal.SIGKILL)
        await until(answers, "the next one serves")
    log = whole.log.read_text()
    assert log.count("a certificate cannot be read, the one that was read last is used") == 2
    assert log.count("is started again") == 1


async def test_where_nothing_runs_it_says_so(tmp_path: Path) -> None:
    whole = Reloaded(tmp_path, "http://127.0.0.1:9", "")
    code, said = await whole.reload()
    assert code == 2
    assert "no instance runs on" in said
