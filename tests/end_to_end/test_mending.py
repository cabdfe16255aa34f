"""`spool cancel` and `spool complain` over the whole, with an instance running and without: the balance holds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from support.tiny import tiny_upstream
from support.whole import Whole, running_receiver

from sidecar.dev.mock_backends import Receiver

CHAT = {"model": "gpt-5-mini", "messages": []}
MORE_METERS = """
[[meters]]
name = "api_calls"
aggregation = { type = "COUNT" }
[[meters]]
name = "input_tokens"
aggregation = { type = "SUM", field = "input_tokens" }
[[meters]]
name = "longest"
aggregation = { type = "MAX", field = "duration_ms" }
"""


@asynccontextmanager
async def called(tmp_path: Path, calls: int = 2) -> AsyncIterator[tuple[Whole, Receiver]]:
    """A running whole that has delivered so many calls to the ledger, to stripe and to a webhook."""
    config = tmp_path / "sidecar.toml"
    config.write_text(MORE_METERS)
    async with tiny_upstream() as upstream, running_receiver() as (receiver, url):
        whole = Whole(
            tmp_path / "data",
            upstream,
            SIDECAR_CONFIG=str(config),
            SIDECAR_SUBSCRIBER="header:x-tenant",
            SIDECAR_BACKENDS="ledger,stripe,webhook",
            SIDECAR_STRIPE_URL=url,
            SIDECAR_STRIPE_API_KEY="k",
            SIDECAR_STRIPE_METERS="api_calls,input_tokens",
            SIDECAR_WEBHOOK_URL=f"{url}/webhook",
            SIDECAR_WEBHOOK_SECRET="a-secret-of-the-test",
        )
        async with whole:
            async with aiohttp.ClientSession(headers={"x-tenant": "cus_1"}) as session:
                for _ in range(calls):
                    async with session.post(whole.proxy_url + "/v1/chat/completions", json=CHAT) as answer:
                        assert answer.status == 200
                        await answer.read()
            balance = await whole.settled()
            assert balance["backends"]["stripe"]["delivered"] == calls, balance
            yield whole, receiver


async def usage(whole: Whole, *arguments: str) -> list[dict[str, Any]]:
    code, out, err = await whole.command("usage", "--format", "json", *arguments)
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)
    return found


async def sound(whole: Whole) -> None:
    """The files add up, too."""
    code, out, err = await whole.command("spool", "verify")
    assert code == 0, out + err


async def test_a_call_is_taken_back_where_that_can_be_done(tmp_path: Path) -> None:
    async with called(tmp_path) as (whole, receiver):
        before = {name: (await usage(whole, "--meter", name))[0]["value"] for name in ("api_calls", "longest")}
        first, _ = [row["id"] for row in await whole.records()]
        code, out, err = await whole.command("spool", "cancel", first)
        assert code == 1, "the webhook cannot take anything back"
        lines = out.splitlines()
        assert [line.split()[0] for line in lines] == ["ledger", "stripe", "stripe", "webhook"], out + err
        assert "the meter longest (MAX) keeps it" in lines[0]
        assert [line.split("  ")[-1] for line in lines[1:3]] == ["taken back", "taken back"]
        assert "cannot take back what it has" in lines[3]
        cancelled = [row for row in receiver.received if row.path.endswith("meter_event_adjustments")]
        assert [row.verdict for row in cancelled] == ["delivered", "delivered"]
        (row,) = await usage(whole, "--by", "")
        assert (row["calls"], row["input_tokens"]) == (1, 43)
        assert before["api_calls"] == "2"
        assert (await usage(whole, "--meter", "api_calls"))[0]["value"] == "1"
        assert (await usage(whole, "--meter", "longest"))[0]["value"] == before["longest"]
        balance = await whole.get("/balance")
        assert balance["holds"], balance
        for name in ("ledger", "stripe"):
            assert balance["backends"][name]["delivered"] == 1
            assert balance["backends"][name]["skipped"] == {"cancelled": 1}
        assert balance["backends"]["webhook"]["delivered"] == 2
        # Asked again there is nothing left to take back but what cannot be.
        code, out, _ = await whole.command("spool", "cancel", first, "--backend", "stripe")
        assert (code, out.startswith("nothing is known of")) == (1, True)
        await sound(whole)
        assert await whole.stop() == 0
        await sound(whole)


async def test_one_event_of_a_record_is_taken_back_with_no_instance_running(tmp_path: Path) -> None:
    async with called(tmp_path, calls=1) as (whole, receiver):
        (record,) = await whole.records()
        assert await whole.stop() == 0
        code, out, err = await whole.command("spool", "cancel", f"{record['id']}:api_calls")
        assert (code, err) == (0, ""), out
        assert receiver.received[-1].path.endswith("meter_event_adjustments")
        code, out, _ = await whole.command("balance", "--format", "json")
        assert code == 0
        stripe = json.loads(out)["backends"]["stripe"]
        assert (stripe["delivered"], stripe["skipped"]) == (1, {}), "its other event is still there"
        code, out, _ = await whole.command("spool", "cancel", record["id"], "--backend", "stripe")
        assert (code, out.count("taken back")) == (0, 1)
        code, out, _ = await whole.command("balance", "--format", "json")
        assert json.loads(out)["backends"]["stripe"]["skipped"] == {"cancelled": 1}
        await sound(whole)
        # A backend that says no leaves the books as they are.
        (tmp_path / "data" / "lock").unlink()
        code, out, _ = await whole.command("spool", "cancel", "nobody")
        assert (code, "nothing is known of nobody" in out) == (1, True)


async def test_a_backend_that_says_no_changes_nothing(tmp_path: Path) -> None:
    async with called(tmp_path, calls=1) as (whole, receiver):
        (record,) = await whole.records()
        before = await whole.get("/balance")
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{receiver.url}/_faults", json={"do": "status", "status": 500}) as answer:
                assert answer.status < 300
        code, out, _ = await whole.command("spool", "cancel", record["id"], "--backend", "stripe")
        assert (code, out.count("stripe did not take it back (http_500)")) == (1, 2)
        assert await whole.get("/balance") == before
        assert await whole.stop() == 0
        whole.env["SIDECAR_BACKENDS"] = "ledger"
        code, out, _ = await whole.command("spool", "cancel", record["id"], "--backend", "stripe")
        assert (code, out.count("stripe is not configured")) == (1, 2)


def report(count: int, *identifiers: str, code: str = "meter_event_customer_not_found") -> dict[str, Any]:
    samples = [{"error_message": "…", "request": {"identifier": one}} for one in identifiers]
    return {
        "id": "evt_1",
        "type": "v1.billing.meter.error_report_triggered",
        "related_object": {"id": "mtr_1"},
        "data": {
            "reason": {
                "error_count": count,
                "error_types": [
                    {"code": code, "error_count": count, "sample_errors": samples},
                ],
            }
        },
    }


async def test_what_stripe_complains_about_is_parked_and_redriven(tmp_path: Path) -> None:
    reports = tmp_path / "reports.ndjson"
    async with called(tmp_path) as (whole, receiver):
        first, second = [row["id"] for row in await whole.records()]
        reports.write_text(
            json.dumps(report(1, f"{first}:api_calls"))
            + "\n"
            + json.dumps(report(3, f"{first}:api_calls", f"{second}:input_tokens", code="no way"))
            + "\n"
        )
        code, out, err = await whole.command("spool", "complain", str(reports))
        assert code == 1, "one more is counted and not named"
        assert "1 more event is counted and not named" in err
        assert f"{first}:api_calls  parked as complained:meter_event_customer_not_found" in out
        assert f"{second}:input_tokens  parked as complained:other" in out
        balance = await whole.get("/balance")
        assert balance["holds"], balance
        parked = {"complained:meter_event_customer_not_found": 1, "complained:other": 1}
        assert balance["backends"]["stripe"]["parked"] == parked
        assert balance["backends"]["stripe"]["delivered"] == 0
        await sound(whole)
        code, out, _ = await whole.command("spool", "parked", "--format", "json")
        rows = json.loads(out)
        assert {row["event_id"] for row in rows} == {f"{first}:api_calls", f"{second}:input_tokens"}
        assert {row["maybe_taken"] for row in rows} == {False}
        assert rows[0]["record"]["id"] == first
        assert rows[0]["history"] == ["reported as meter_event_customer_not_found"]
        # The same report a second time changes nothing.
        code, out, _ = await whole.command("spool", "complain", str(reports))
        assert out.count("is parked already") == 3
        assert (await whole.get("/balance"))["backends"]["stripe"]["parked"] == parked
        seen = len(receiver.received)
        code, out, err = await whole.command("spool", "redrive", "--backend", "stripe")
        assert (code, out) == (0, "2 events offered again\n"), err
        balance = await whole.settled()
        assert balance["holds"]
        assert not balance["backends"]["stripe"]["parked"]
        again = {row.body["identifier"] for row in receiver.received[seen:]}
        assert again == {f"{first}:api_calls", f"{second}:input_tokens"}
        assert await whole.stop() == 0
        await sound(whole)


async def test_complaints_are_taken_without_an_instance_and_odd_ones_are_told(tmp_path: Path) -> None:
    async with called(tmp_path, calls=1) as (whole, _):
        (record,) = await whole.records()
        for path, wish in (
            ("/complain", {"backend": "stripe", "named": [["one"]]}),
            ("/complain", {"named": [["one", "code"]]}),
            ("/complain", {"backend": "stripe", "named": []}),
            ("/cancel", {"id": ""}),
            ("/cancel", ["id"]),
        ):
            assert (await whole.change(path, json=wish))[0] == 400, wish
            assert (await whole.change(path, data="id=1"))[0] == 415
        assert await whole.stop() == 0
        odd = tmp_path / "odd.json"
        odd.write_text("{}")
        code, _, err = await whole.command("spool", "complain", str(odd))
        assert code == 2
        assert "has no reason in it" in err
        assert (await whole.command("spool", "complain", str(tmp_path / "none")))[0] == 2
        one = tmp_path / "one.json"
        one.write_text(json.dumps(report(2, f"{record['id']}:api_calls", "nobody:api_calls"), indent=2))
        code, out, _ = await whole.command("spool", "complain", str(one))
        assert code == 1
        assert "nobody:api_calls  is not remembered" in out
        assert "1 of 2 named events is parked" in out
        code, out, _ = await whole.command("spool", "cancel", f"{record['id']}:api_calls")
        assert (code, "was parked, and is passed over now" in out) == (0, True)
        code, out, _ = await whole.command("balance", "--format", "json")
        assert code == 0
        assert json.loads(out)["backends"]["stripe"] == {
            "delivered": 1,
            "duplicate": 0,
            "parked": {},
            "pending": 0,
            "skipped": {},
        }
        await sound(whole)


async def test_all_that_is_parked_with_a_reason_is_passed_over(tmp_path: Path) -> None:
    async with running_receiver() as (_, receiver), tiny_upstream() as upstream, aiohttp.ClientSession() as session:
        whole = Whole(
            tmp_path / "data",
            upstream,
            SIDECAR_BACKENDS="meter",
            SIDECAR_METER_URL=f"{receiver}/meter",
            SIDECAR_METER_BATCH="1",
        )
        async with whole:
            for status, times in ((400, 3), (422, 1)):
                fault = {"do": "status", "status": status, "times": times}
                await (await session.post(f"{receiver}/_faults", json=fault)).read()
                for _ in range(times):
                    async with session.post(f"{whole.proxy_url}/v1/things", json={}) as answer:
                        await answer.read()
                await whole.settled()
            parked = (await whole.get("/balance"))["backends"]["meter"]["parked"]
            assert parked == {"http_400": 3, "http_422": 1}
            code, out, err = await whole.command("spool", "cancel", "--reason", "http_40")
            assert (code, out) == (1, "")
            assert "nothing is parked with the reason 'http_40'; did you mean http_400?" in err
            for wrong in ((), ("x", "--reason", "http_400")):
                code, _, err = await whole.command("spool", "cancel", *wrong)
                assert (code, "IDs, or --reason" in err) == (2, True)
            code, out, err = await whole.command("spool", "cancel", "--reason", "http_400", "--backend", "meter")
            assert (code, out.count("was parked, and is passed over now")) == (0, 3), out + err
            found = (await whole.get("/balance"))["backends"]["meter"]
            assert (found["parked"], found["skipped"]) == ({"http_422": 1}, {"cancelled": 3})
            await sound(whole)
            assert await whole.stop() == 0
        code, out, err = await whole.command("spool", "cancel", "--reason", "http_422")
        assert (code, out.count("passed over")) == (0, 1), "nobody runs: " + err
        await sound(whole)
