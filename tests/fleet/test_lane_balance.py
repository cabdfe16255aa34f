"""The lanes of a fleet as people see them and change something in them: whoever holds a lane, and where nobody does."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.fake_backend import FakeBackend
from support.filled import fill
from support.lanes import Lanes
from support.postgres_server import PostgresServer

from sidecar.cli import main
from sidecar.delivery import wishes
from sidecar.delivery.lane_balance import LaneBalance, LanesBalance, read_lanes
from sidecar.delivery.leases import Leases
from sidecar.delivery.rows import StateError
from sidecar.ledger.lanes import LANES, named
from sidecar.model.balance import BackendTotals
from sidecar.model.delivery import Abilities, Dedup, Delivered, Event, Undone
from sidecar.model.record import Record
from sidecar.runtime.lanes import Lookout, correct
from sidecar.storage.postgres import Postgres, call

ONE_EACH = Abilities(dedup=Dedup.EVENT_ID, concurrency=4)
AWAY = "postgresql://someone:not-to-be-shown@127.0.0.1:1/nowhere"


@dataclass(slots=True)
class Undoing(FakeBackend):
    """Takes back what it is asked to."""

    undone: Counter[str] = field(default_factory=Counter)

    async def cancel(self, event: Event, record: Record | None) -> Undone:
        del record
        self.undone[event.event_id] += 1
        return Undone(Delivered())


def vendor(**changes: Any) -> Undoing:
    return Undoing(ONE_EACH, name="webhook", **changes)


@pytest.fixture
def lanes(shared_lanes: Lanes) -> Lanes:
    return shared_lanes


Run = Callable[..., Any]


@pytest.fixture
def run(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """A command of a sidecar of the fleet that is stopped, with three records in its own spool: code, what it says."""
    url = request.getfixturevalue("shared_lanes").url if "lanes" in request.fixturenames else AWAY
    data_dir = tmp_path / "data"
    for name, value in {
        "SIDECAR_DATA_DIR": str(data_dir),
        "SIDECAR_LEDGER_URL": url,
        "SIDECAR_DELIVER": "elected",
        "SIDECAR_BACKENDS": "ledger,webhook",
        "SIDECAR_WEBHOOK_URL": "http://127.0.0.1:9/webhook",
        "COLUMNS": "200",
    }.items():
        monkeypatch.setenv(name, value)

    async def command(*arguments: str) -> tuple[int, str, str]:
        if not data_dir.exists():
            await fill(data_dir, 3)
        capfd.readouterr()
        code = await asyncio.to_thread(main, list(arguments))
        return code, *capfd.readouterr()

    return command


def totals(found: LanesBalance) -> dict[str, Any]:
    one = found.total["webhook"]
    return {"delivered": one.delivered, "pending": one.pending, "parked": one.parked, "skipped": one.skipped}


# --- how they stand -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lanes", "said"),
    [
        ([3], "lane 3"), ([5, 4], "lanes 4 and 5"), (range(16), "lanes 0 to 15"),
        ([1, 4, 5, 6, 9], "lanes 1, 4 to 6 and 9"),
    ],
)  # fmt: skip
def test_lanes_are_named_in_few_words(lanes: list[int], said: str) -> None:
    assert named(lanes) == said


def test_a_lane_that_does_not_add_up_is_named() -> None:
    good = LaneBalance(lane=0, recorded=5, holder="one", backends={"webhook": BackendTotals(delivered=5)})
    bad = LaneBalance(
        lane=7,
        recorded=5,
        backends={"webhook": BackendTotals(delivered=3, pending=1), "stripe": BackendTotals(pending=5)},
    )
    found = LanesBalance(lanes=[good, bad], in_ledger=11)
    assert not found.holds
    lane, ledger = found.problems
    assert lane.startswith("lane 7, webhook: recorded 5 is not 4, the sum of delivered 3,")
    assert ledger.startswith("10 records are in the lanes, and the sidecars have put 11 into the ledger")
    assert found.notes == ["no running sidecar delivers lane 7: 6 deliveries wait for one"]
    assert (found.holders, found.unheld) == ({"one": [0]}, [7])
    assert found.to_dict()["sum"]["backends"]["stripe"]["recorded"] == 5, "lane 0 owes that backend nothing"


async def test_each_record_is_in_one_place_of_its_lane(lanes: Lanes) -> None:
    backend = vendor()
    async with lanes.delivered_by("one", backend) as elected:
        ids = lanes.put(90)
        backend.poison |= {ids[3]}
        found = await lanes.settled()
        assert found.holds
        assert (found.recorded, found.in_ledger) == (90, 90)
        parked = sum(found.total["webhook"].parked.values())  # it may have been sent before it was poisoned
        assert totals(found) == {
            "delivered": 90 - parked,
            "pending": 0,
            "parked": {"http_400": 1} if parked else {},
            "skipped": {},
        }
        assert (found.holders, found.unheld, found.notes) == ({"one": list(range(LANES))}, [], [])
        assert all(one.recorded > 0 for one in found.lanes)
        assert (len(elected.lanes), elected.resting, elected.unheld) == (LANES, 0, 0)

        # A second sidecar delivers some, and both are seen from outside.
        async with lanes.delivered_by("two", backend):
            found = await lanes.seen(lambda found: len(found.holders.get("two", ())) == LANES // 2)
            assert {name: len(held) for name, held in found.holders.items()} == {"one": 8, "two": 8}
            more = lanes.put(60, "two")
            found = await lanes.settled()
            assert (found.recorded, found.in_ledger, found.holds) == (150, 150, True)
            assert set(backend.taken) >= set(more)

    # Nobody runs any more.
    lanes.put(20)
    found = read_lanes(lanes.url)
    assert (found.holds, found.holders, found.unheld) == (True, {}, list(range(LANES)))
    assert found.total["webhook"].pending == 20
    assert found.notes == ["no running sidecar delivers lanes 0 to 15: 20 deliveries wait for one"]


async def test_the_commands_tell_of_all_lanes_from_a_sidecar_that_is_stopped(lanes: Lanes, run: Run) -> None:
    async with lanes.delivered_by("two", vendor()):
        lanes.put(48)
        await lanes.settled()
        code, out, err = await run("balance", "--format", "json")
        assert (code, err) == (0, "")
        told = json.loads(out)
        assert (told["recorded"], told["backends"]) == (3, {}), "its own part"
        assert (told["lanes"]["in_ledger"], told["lanes"]["holds"], told["lanes"]["trouble"]) == (48, True, None)
        assert told["lanes"]["holders"] == {"two": list(range(LANES))}
        assert told["lanes"]["sum"]["backends"]["webhook"]["delivered"] == 48
        assert sum(one["backends"]["webhook"]["delivered"] for one in told["lanes"]["lanes"]) == 48
        assert {name: one["in_ledger"] for name, one in told["fleet"]["instances"].items()} == {"one": 48}
        code, out, _ = await run("balance")
        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert "lanes in the ledger 48 = in the lanes 48" in lines
        assert "webhook recorded 48 = delivered 48 + duplicate 0 + parked 0 + pending 0 + skipped 0" in lines
        assert len([line for line in lines if line.endswith("records, two delivers it")]) == LANES
        assert lines[-1] == "the lanes' balance holds"

        code, out, err = await run("spool", "status")
        assert (code, err) == (0, "")
        rows = [line.split() for line in out.splitlines()]
        assert ["all", "–", "webhook", "48", "48", "0", "0", "0", "0", "0"] in rows
        assert len([row for row in rows if row[1:3] == ["two", "webhook"]]) == LANES
        code, out, _ = await run("spool", "status", "--format", "json")
        assert json.loads(out)["lanes"] == told["lanes"]
        assert await run("spool", "verify") == (
            0,
            "3 records read, 16 lanes counted again, everything adds up\n",
            "",
        )
    code, out, err = await run("balance")
    assert code == 0
    assert err == "note: no running sidecar delivers lanes 0 to 15: what comes there waits for one\n"
    assert "records, nobody delivers it" in out


async def test_where_no_sidecar_has_come_yet_that_is_said(
    run: Run, postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDECAR_LEDGER_URL", postgres_database)
    code, _, err = await run("balance")
    assert code == 3
    assert "the lanes cannot be asked, what became of their records is not known" in err
    assert "start a sidecar of it first" in err


async def test_without_the_database_the_local_part_is_told(run: Run) -> None:
    unknown = "the lanes cannot be asked, what became of their records is not known: the lanes in 127.0.0.1:1/nowhere"
    code, out, err = await run("balance", "--format", "json")
    assert code == 3
    told = json.loads(out)
    assert (told["recorded"], told["holds"]) == (3, True)
    assert list(told["lanes"]) == ["trouble"]
    assert len([line for line in err.splitlines() if unknown in line]) == 1
    code, out, err = await run("spool", "status")
    assert code == 3
    assert unknown in err
    assert len(out.splitlines()) > 3
    code, out, err = await run("spool", "verify")
    assert (code, out) == (3, "3 records read, what is here adds up\n")
    assert "the lanes cannot be counted: the lanes in 127.0.0.1:1/nowhere" in err
    for command in (["redrive"], ["retry", "--backend", "webhook"]):
        code, out, err = await run("spool", *command)
        assert (code, out) == (2, "")
        assert "127.0.0.1:1/nowhere cannot be reached" in err
    code, out, err = await run("spool", "cancel", "0199aaaa-0000-7000-8000-000000000000")
    assert code == 3
    assert "127.0.0.1:1/nowhere cannot be reached" in err
    for _, out, err in [await run("balance"), await run("spool", "status"), await run("spool", "verify")]:
        assert "not-to-be-shown" not in out + err


async def test_what_does_not_add_up_is_an_exit_code(lanes: Lanes, run: Run, postgres_server: PostgresServer) -> None:
    name = lanes.url.rpartition("/")[2]
    backend = vendor()
    async with lanes.delivered_by("one", backend):
        lanes.put(48)
        await lanes.settled()
    lanes.put(48)  # that nobody delivers

    async def wrong(change: str, undo: str) -> tuple[str, str]:
        """What `balance` and `verify` say after a change by hand, which is taken back."""
        await asyncio.to_thread(postgres_server.sql, change, name)
        told = []
        for command in (["balance"], ["spool", "verify"]):
            code, _, err = await run(*command)
            assert code == 1, (command, err)
            told.append(err)
        await asyncio.to_thread(postgres_server.sql, undo, name)
        return told[0], told[1]

    async def ask(question: str) -> list[int]:
        return [int(one) for one in (await asyncio.to_thread(postgres_server.sql, question, name)).split()]

    [lane] = await ask("SELECT lane FROM metering.lanes ORDER BY last_seq DESC LIMIT 1")
    counter = f"metering_lane_{lane:02}.counter"
    balance, verify = await wrong(
        f"UPDATE {counter} SET n = n + 1 WHERE term = 'delivered' AND folded = 0",
        f"UPDATE {counter} SET n = n - 1 WHERE term = 'delivered' AND folded = 0",
    )
    assert f"does not hold: lane {lane}, webhook: recorded" in balance
    assert "the counter of delivered says" in verify

    balance, verify = await wrong(
        "UPDATE metering.instances SET records = records + 5", "UPDATE metering.instances SET records = records - 5"
    )
    assert "96 records are in the lanes, and the sidecars have put 101 into the ledger" in balance
    assert "96 records are in the lanes" in verify

    # The first record that somebody has still to get is gone, then one behind it.
    [last] = await ask(f"SELECT last_seq FROM metering.lanes WHERE lane = {lane}")
    for number, in_balance in ((last // 2 + 1, True), (last, False)):
        at = f"lane = {lane} AND lane_seq = {number}"
        await asyncio.to_thread(postgres_server.sql, f"UPDATE metering.records SET lane = 99 WHERE {at}", name)
        code, _, err = await run("spool", "verify")
        assert code == 1
        assert f"lane {lane}, webhook: of " in err
        assert "records that it has still to get 1 are not in the ledger any more" in err
        code, _, err = await run("balance")
        assert code == int(in_balance), (number, err)  # which counts from the first that is there
        await asyncio.to_thread(postgres_server.sql, f"UPDATE metering.records SET lane = {lane} WHERE lane = 99", name)
    assert (await run("spool", "verify"))[0] == 0


async def test_a_sidecar_that_runs_says_what_it_saw_last(killable_postgres: PostgresServer, tmp_path: Path) -> None:
    url = await asyncio.to_thread(killable_postgres.database)
    lanes, lookout = Lanes(tmp_path, url), Lookout(url)
    try:
        seen = (await lookout.seen()).to_dict()
        assert list(seen) == ["trouble"], "no sidecar has made the tables yet"
        assert "start a sidecar of it first" in seen["trouble"]
        async with lanes.delivered_by("one", vendor()):
            lanes.put(16)
            await lanes.settled()
        async with asyncio.timeout(20):
            while (found := await lookout.seen()).trouble or found.balance is None or found.balance.recorded < 16:
                await asyncio.sleep(0.1)
        assert found.to_dict()["sum"]["backends"]["webhook"]["delivered"] == 16
        await asyncio.to_thread(killable_postgres.kill)
        async with asyncio.timeout(20):
            while (found := await lookout.seen()).trouble is None:
                await asyncio.sleep(0.1)
        told = found.to_dict()
        assert told["in_ledger"] == 16
        assert told["age_s"] > 0
        assert "not-to-be" not in told["trouble"]
        assert (await lookout.seen()).trouble is not None, "nobody waits for it any more"
        await asyncio.to_thread(killable_postgres.start)
        async with asyncio.timeout(20):
            while (await lookout.seen()).trouble:
                await asyncio.sleep(0.1)
    finally:
        await lookout.aclose()


# --- what is changed in them --------------------------------------------------------------------------


async def test_a_change_is_made_by_who_runs_from_a_sidecar_that_is_stopped(lanes: Lanes, run: Run) -> None:
    backend = vendor(behaviour=lambda sealed: "refuse:http_400")
    async with lanes.delivered_by("two", backend):
        ids = lanes.put(9)
        await lanes.settled()
        code, out, err = await run("spool", "redrive", ids[0], "0199aaaa-0000-7000-8000-000000000000")
        assert (code, out) == (1, "1 event offered again\n")
        assert "0199aaaa-0000-7000-8000-000000000000  not found among what is parked: not known" in err
        await lanes.settled()
        backend.behaviour = None
        assert await run("spool", "cancel", ids[1]) == (
            0,
            f"webhook  {ids[1]}  was parked, and is passed over now\n",
            "",
        )
        assert await run("spool", "redrive", "--backend", "webhook") == (0, "8 events offered again\n", "")
        assert totals(await lanes.settled()) == {
            "delivered": 8,
            "pending": 0,
            "parked": {},
            "skipped": {"cancelled": 1},
        }
        assert await run("spool", "cancel", ids[2]) == (0, f"webhook  {ids[2]}  taken back\n", "")
        assert backend.undone == {ids[2]: 1}
        code, out, err = await run("spool", "cancel", "nobody")
        assert (code, out) == (
            1,
            "nothing is known of nobody: it was never delivered, or is older than the retention\n",
        )
        assert await run("spool", "retry", "--backend", "webhook") == (1, "nothing waits at webhook\n", "")
        code, out, err = await run("spool", "status", "--format", "json")
        told = json.loads(out)["lanes"]["sum"]["backends"]["webhook"]
        assert (told["delivered"], told["skipped"], told["recorded"]) == (7, {"cancelled": 2}, 9)


async def test_a_wait_is_ended_by_who_runs(lanes: Lanes, run: Run) -> None:
    backend = vendor(behaviour=lambda sealed: "retry:http_503")
    async with lanes.delivered_by("two", backend):
        lanes.put(3)
        async with asyncio.timeout(20):
            while len(backend.offers) < 6:
                await asyncio.sleep(0.02)
        code, out, err = await run("spool", "retry", "--backend", "webhook")
        assert (code, err) == (0, "")
        assert "waiting requests are offered now" in out
        backend.behaviour = None  # not before: it might be offered by itself while the command starts
        assert totals(await lanes.settled())["delivered"] == 3


async def test_where_nobody_holds_a_lane_a_change_waits_for_who_comes(lanes: Lanes, run: Run) -> None:
    backend = vendor(behaviour=lambda sealed: "refuse:http_400")
    async with lanes.delivered_by("two", backend):
        ids = lanes.put(4)
        await lanes.settled()
    backend.behaviour = None
    found = read_lanes(lanes.url)
    held = {one.lane for one in found.lanes if one.recorded}
    for _ in range(2):  # asked again, it is asked once
        code, out, err = await run("spool", "redrive", ids[0], ids[1], ids[3], "nobody")
        assert (code, out) == (1, "")
        assert "nobody  not found among what is parked" in err
        assert "it is done there as soon as one does, within 7 days" in err
    code, out, err = await run("spool", "redrive", ids[2], "--resend-unknown")
    assert (code, out) == (3, "")
    assert err.endswith("nothing is done there, run it again when one does\n")
    code, out, err = await run("spool", "redrive", ids[0], ids[1], ids[3])
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("no running sidecar delivers lane")
    code, out, err = await run("spool", "cancel", ids[2])
    assert (code, out) == (3, "")
    assert err.startswith("no running sidecar delivers lane ")
    assert (await run("spool", "cancel", "nobody"))[0] == 1
    assert (await run("spool", "retry", "--backend", "webhook"))[0] == 1
    asked = {one.lane: one.asked for one in read_lanes(lanes.url).lanes if one.asked}
    assert set(asked) == held
    assert sum(asked.values()) <= 3 * 2 + 1

    async with lanes.delivered_by("three", backend):
        found = await lanes.seen(lambda found: found.total["webhook"].delivered == 3, "redriven")
        found = await lanes.seen(lambda found: not any(one.asked for one in found.lanes), "done")
        assert totals(found) == {"delivered": 3, "pending": 0, "parked": {}, "skipped": {"cancelled": 1}}
        assert set(backend.taken) == {ids[0], ids[1], ids[3]}
        assert found.holds


async def test_what_is_parked_in_the_directory_itself_needs_its_own_instance(lanes: Lanes, run: Run) -> None:
    code, out, err = await run("spool", "redrive", "--backend", "ledger")
    assert (code, out) == (2, "")
    assert "start it, then redrive" in err
    async with lanes.delivered_by("two", vendor()):
        code, out, err = await run("spool", "redrive", "--backend", "another")
        assert (code, out) == (2, "")
        assert err == "another is not one of the backends of this instance (ledger, webhook)\n"
        assert (await run("spool", "retry", "--backend", "another"))[0] == 2
        assert await run("spool", "redrive") == (0, "0 events offered again\n", "")


async def test_a_holder_that_hangs_is_named_and_nothing_of_it_is_left(
    lanes: Lanes, postgres_server: PostgresServer
) -> None:
    async with lanes.delivered_by("two", vendor()):
        lanes.put(1)
    database = Postgres(lanes.url, name="test")
    try:
        hangs = Leases(database, "hangs/89abcdef")
        assert len(await hangs.round()) == LANES
        asked = await wishes.ask(database, {"do": "retry", "backend": "webhook"}, [3, 4], limit_s=0.5)
        assert (asked.answers, asked.later, asked.silent) == ([], [], {"hangs": [3, 4]})
        assert asked.said["texts"] == [
            "hangs, which delivers lanes 3 and 4, has not answered within 30 s: run it again"
        ]
        # It gives them back and lives on, without its share: waited for, as it may take them again at any moment.
        async with database.transaction() as db:
            await db.execute("UPDATE metering.lane_leases SET holder = NULL, expires = NULL WHERE lane IN (3, 4)")
        for wish, later in (
            ({"do": "retry", "backend": "webhook"}, False),
            ({"do": "redrive", "resend_unknown": True}, False),
            ({"do": "redrive", "resend_unknown": False}, True),
        ):
            asked = await wishes.ask(database, wish, [3, 4], limit_s=0.5)
            assert (asked.later, asked.undone, asked.silent) == (([3, 4], [], {}) if later else ([], [3, 4], {}))
        async with database.transaction() as db:
            assert [row[0] for row in await asked_in(db)] == [3, 4]
            # Over a week later it is nothing any more.
            await db.execute("UPDATE metering.lane_wishes SET at = at - interval '7 days 31 s'")
            assert await wishes.asked_of(db, range(LANES)) == []
    finally:
        await database.close()


async def asked_in(db: Any) -> list[Any]:
    found: list[Any] = await db.fetch("SELECT lane FROM metering.lane_wishes WHERE answer IS NULL ORDER BY lane")
    return found


async def test_what_a_holder_cannot_do_is_said_and_not_tried_for_ever(lanes: Lanes) -> None:
    async with lanes.delivered_by("two", vendor()):
        asked = await asyncio.to_thread(correct, lanes.url, {"do": "no such thing"})
        assert len(asked.errors) == LANES
        assert asked.errors[0].startswith("lane 0: its holder could not do it: KeyError")
    assert not any(one.asked for one in read_lanes(lanes.url).lanes)
    asked = await asyncio.to_thread(correct, lanes.url, {"do": "no such thing"})
    assert len(asked.later) == LANES
    async with lanes.delivered_by("two", vendor()):
        await lanes.seen(lambda found: not any(one.asked for one in found.lanes), "given up")


def test_a_database_that_is_away_is_told_without_its_password() -> None:
    with pytest.raises(StateError, match=r"the lanes in 127.0.0.1:1/nowhere: .* cannot be reached") as caught:
        read_lanes(AWAY)
    assert "not-to-be-shown" not in str(caught.value)
    call(asyncio.sleep(0))  # its loop lives on
