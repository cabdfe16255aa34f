"""Of each customer one sidecar at a time tells the vendors: two sidecars, one PostgreSQL, requests to stand-ins."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.mishaps import Watching
from support.pgbouncer import pgbouncer
from support.postgres_server import PostgresServer
from support.tiny import tiny_upstream
from support.whole import Whole, suspend

from sidecar.cli import main
from sidecar.delivery.leases import LEASE_S
from sidecar.dev.mock_backends.faults import Do, Fault
from sidecar.ledger.lanes import LANES

LIMIT_S = 60.0  # some leases one after the other, on a machine that others use as well
TENANTS = [f"customer-{n}" for n in range(20)]


class Fleet:
    """Two sidecars, whom they bill at, and the database that they share."""

    def __init__(self, wholes: list[Whole], receiver: Watching, server: PostgresServer, url: str) -> None:
        self.wholes, self.receiver, self.server = wholes, receiver, server
        self.name = url.rpartition("/")[2]

    def __iter__(self) -> Any:
        return iter(self.wholes)

    async def ask(self, question: str) -> list[str]:
        return (await asyncio.to_thread(self.server.sql, question, self.name)).split()

    async def lanes(self) -> Counter[str]:
        """How many each holds, by the name that the database has of it."""
        question = "SELECT holder FROM metering.lane_leases WHERE expires > clock_timestamp()"
        return Counter(holder.partition("/")[0] for holder in await self.ask(question))

    async def shared(self, **expected: int) -> None:
        await self.until(self.lanes, lambda found: found == expected, what=f"lanes {expected}")

    async def billed(self, count: int) -> list[dict[str, Any]]:
        """What the vendor has taken, once it has so much."""

        async def look() -> list[dict[str, Any]]:
            return list(self.receiver.billed("webhook"))

        found: list[dict[str, Any]] = await self.until(look, lambda found: len(found) >= count, what=f"{count} billed")
        assert len({one["id"] for one in found}) == len(found) == count
        assert {name: len(digests) for name, digests in self.receiver.digests.items() if len(digests) > 1} == {}
        return found

    async def until(self, look: Callable[[], Any], enough: Callable[[Any], bool], *, what: str) -> Any:
        found: Any = None
        try:
            async with asyncio.timeout(LIMIT_S):
                while not enough(found := await look()):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            logs = "\n".join(whole.log.read_text()[-3000:] for whole in self.wholes)
            raise AssertionError(f"no {what} in {LIMIT_S:.0f} s, but {found}\n{logs}") from None
        return found


@asynccontextmanager
async def fleet(
    directory: Path, server: PostgresServer, database: str | None = None, **settings: str
) -> AsyncIterator[Fleet]:
    database, receiver = database or server.database(), Watching()
    async with AsyncExitStack() as stack:
        url = await receiver.start()
        stack.push_async_callback(receiver.aclose)
        upstream = await stack.enter_async_context(tiny_upstream())
        wholes = [
            Whole(
                directory / name,
                upstream,
                SIDECAR_SUBSCRIBER="header:x-tenant",
                SIDECAR_BACKENDS="ledger,webhook",
                SIDECAR_WEBHOOK_BATCH="5",
                SIDECAR_WEBHOOK_URL=f"{url}/webhook",
                SIDECAR_LEDGER_URL=database,
                SIDECAR_INSTANCE=name,
                SIDECAR_DELIVER="elected",
                SIDECAR_HASH_KEY="a-key-that-all-sidecars-share",
                **settings,
            )
            for name in ("one", "two")
        ]
        for whole in wholes:
            await stack.enter_async_context(whole)
        found = Fleet(wholes, receiver, server, database)
        await found.shared(one=LANES // 2, two=LANES // 2)
        yield found


async def call(whole: Whole, times: int = 1) -> int:
    """One call for each customer. Returns how many."""
    async with aiohttp.ClientSession() as session:
        for tenant in TENANTS * times:
            async with session.post(whole.proxy_url + "/v1/things", json={}, headers={"x-tenant": tenant}) as answer:
                assert answer.status == 200
                await answer.read()
    return len(TENANTS) * times


@pytest.mark.timeout(300)
async def test_who_holds_lanes_is_replaced_and_nothing_is_billed_twice(
    tmp_path: Path, postgres_server: PostgresServer
) -> None:
    async with fleet(tmp_path, postgres_server) as all_:
        one, two = all_
        count = await call(one) + await call(two)
        taken = await all_.billed(count)
        assert Counter(record["subscriber"]["id"] for record in taken) == dict.fromkeys(TENANTS, 2)

        # The one hangs with requests under way, longer than its leases last; the other takes them over.
        all_.receiver.disturb(Fault(do=Do.DELAY, delay_s=2.0, backend="webhook"))
        count += await call(one)
        [meter] = one.children()["meter"]
        await asyncio.sleep(0.5)  # for some to be under way: with none the test shows less, and nothing wrong
        suspend(meter)
        try:
            await all_.shared(two=LANES)
            all_.receiver.disturb()
            count += await call(two)
        finally:
            os.kill(meter, signal.SIGCONT)
        await all_.billed(count)
        await all_.shared(one=LANES // 2, two=LANES // 2)

        # SIGKILL of the other.
        await two.kill()
        count += await call(one)
        await all_.billed(count)
        await all_.shared(one=LANES)

        # A clean stop hands over at once.
        await two.start()
        await all_.shared(one=LANES // 2, two=LANES // 2)
        count += await call(one)
        assert await one.stop() == 0
        assert (await all_.lanes())["one"] == 0
        count += await call(two)
        await all_.billed(count)


@pytest.mark.timeout(300)
async def test_pgbouncer_may_stand_between(tmp_path: Path, postgres_server: PostgresServer) -> None:
    """In transaction mode, with fewer connections than a sidecar has: ledger, lanes and limits need no session."""
    database = postgres_server.database()
    with pgbouncer(database) as url:
        async with fleet(tmp_path, postgres_server, url, SIDECAR_LIMITS="calls=3/day") as all_:
            one, two = all_

            async def counted() -> list[str]:
                texts = [await whole.text("/metrics") for whole in all_]
                return [text for text in texts if "sidecar_limits_away 0" in text]

            await all_.until(counted, lambda found: len(found) == 2, what="limits that are shared")
            count = await call(one) + await call(two)
            await all_.billed(count)
            for whole in all_:
                rows = await whole.get("/usage?by=instance")
                assert {row["instance"]: row["calls"] for row in rows} == {"one": count // 2, "two": count // 2}
            count += await call(two)
            async with aiohttp.ClientSession() as session:
                for whole in all_:
                    headers = {"x-tenant": TENANTS[0]}
                    async with session.post(whole.proxy_url + "/v1/things", json={}, headers=headers) as response:
                        assert response.status == 402
            await all_.billed(count + len(all_.wholes))  # what was denied is on record as well


@pytest.mark.timeout(300)
async def test_what_is_parked_is_shown_redriven_and_cancelled_from_any_sidecar(
    tmp_path: Path, postgres_server: PostgresServer
) -> None:
    async with fleet(tmp_path, postgres_server) as all_:
        one, two = all_
        all_.receiver.disturb(Fault(do=Do.STATUS, status=400, backend="webhook", path="/webhook"))
        count = await call(one)

        async def parked() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = await two.get("/parked?limit=1000")
            return found

        def enough(rows: list[dict[str, Any]]) -> bool:
            return len(rows) == count

        rows = await all_.until(parked, enough, what=f"{count} parked")
        assert {row["subscriber"] for row in rows} == set(TENANTS)
        assert [row["parked_at"] for row in rows] == sorted(row["parked_at"] for row in rows)
        assert await one.get("/parked?limit=1000") == rows
        code, out, err = await one.command("spool", "parked", "--format", "json")
        assert (code, json.loads(out)) == (0, rows), err
        all_.receiver.disturb()

        # Whichever lane it is in, and whoever holds that.
        code, out, err = await two.command("spool", "cancel", rows[0]["record_id"])
        assert code == 0, out + err
        code, out, err = await one.command("spool", "redrive")
        assert code == 0, out + err
        taken = await all_.billed(count - 1)
        assert {one["id"] for one in taken} == {row["record_id"] for row in rows[1:]}
        assert await two.get("/parked") == []


@pytest.mark.timeout(300)
async def test_lanes_rest_while_the_database_is_away(tmp_path: Path, killable_postgres: PostgresServer) -> None:
    async with fleet(tmp_path, killable_postgres) as all_:
        one, two = all_
        all_.receiver.disturb(Fault(do=Do.STATUS, status=503, backend="webhook"))
        count = await call(one)

        async def pending() -> int:
            """Of the vendor's, by both: each tells those of its lanes."""
            lines = [line for whole in all_ for line in (await whole.text("/metrics")).splitlines()]
            return sum(int(float(line.split()[1])) for line in lines if line.startswith('sidecar_pending{backend="web'))

        await all_.until(pending, lambda found: found == count, what=f"{count} pending")
        all_.receiver.disturb()
        await all_.billed(count)
        await all_.until(pending, lambda found: found == 0, what="none pending")
        await asyncio.to_thread(killable_postgres.kill)
        count += await call(one) + await call(two)

        async def notes() -> str:
            return json.dumps(await one.get("/readyz"))

        await all_.until(notes, lambda found: "no lane is delivered from here" in found, what="reason in /readyz")
        await asyncio.sleep(LEASE_S / 4)
        assert len(all_.receiver.billed("webhook")) == len(TENANTS)
        await asyncio.to_thread(killable_postgres.start)
        await all_.billed(count)
        await all_.until(notes, lambda found: "no lane is delivered" not in found, what="quiet /readyz")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "SIDECAR_DELIVER=elected needs SIDECAR_LEDGER_URL: who delivers is agreed on there"),
        (
            {"SIDECAR_LEDGER_URL": "postgresql://u:p@127.0.0.1:1/d", "SIDECAR_BACKENDS": "webhook"},
            "SIDECAR_DELIVER=elected delivers what is in the ledger: add `ledger` to SIDECAR_BACKENDS",
        ),
        ({"SIDECAR_DELIVER": "others"}, "SIDECAR_DELIVER='others': expected one of own, elected"),
    ],
)
@pytest.mark.parametrize("command", ["check", "serve"])
def test_what_cannot_be_elected_is_said_in_a_line(
    settings: dict[str, str],
    said: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole = {
        "SIDECAR_UPSTREAM_URL": "http://127.0.0.1:9",
        "SIDECAR_DATA_DIR": str(tmp_path / "data"),
        "SIDECAR_BACKENDS": "ledger,webhook",
        "SIDECAR_WEBHOOK_URL": "http://127.0.0.1:9/webhook",
        "SIDECAR_DELIVER": "elected",
    }
    for name, value in (whole | settings).items():
        monkeypatch.setenv(name, value)
    assert main([command]) != 0
    lines = [line for line in "".join(capfd.readouterr()).splitlines() if said in line]
    assert len(lines) == 1
