"""The seam between serving and metering: frames are counted once whatever dies, and calls go on while it does."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.oracle import SETTINGS, Oracle, call_of, judge
from support.serve import ADMITTING, COUNTING, METERING, SERVING
from support.spool_fixtures import SMALL, Told, call, rows, until
from support.tiny import tiny_upstream
from support.whole import Whole

from sidecar.model.exchange import Exchange
from sidecar.runtime.seam import TRIALS
from sidecar.settings import Durability, SpoolSettings
from sidecar.spool import Health, Spool
from sidecar.spool.frames import EXCHANGE, FrameError, decode_frame, encode_frame, exchange_of
from sidecar.spool.intake import Intake, Source
from sidecar.spool.recorder import Recorder

CHANCES = 25


class Counts:
    """What the hop counts; nothing here counts anything but losses."""

    def lost(self, reason: str, count: int) -> None: ...
    def released_uncommitted(self, count: int) -> None: ...
    def take(self) -> Sequence[tuple[str, str, float]]:
        return ()


class Breaking:
    """A link that is cut when told so: then nothing arrives, nor comes back."""

    def __init__(self) -> None:
        self.intake: Intake | None = None
        self.source: Source | None = None

    def send(self, number: int, data: bytes) -> None:
        if self.intake is not None and self.source is not None:
            self.intake.take(self.source, data)
            self.intake.store()

    def begin_anew(self) -> None:
        raise AssertionError("all of them can be sent")

    def health(self) -> Health:
        return Health()


async def one_life(root: Path, recorder: Recorder, link: Breaking, chance: random.Random, made: dict[str, str]) -> None:
    """One that meters: opens, is told (again) what is not acknowledged, is cut off now and then, and ends."""
    tail = recorder.source[:6].hex()
    async with Spool.open(root, limits=SMALL, goes_on=lambda id_: id_.endswith(tail)) as spool:
        intake = Intake(Told())
        intake.begin(spool)
        open_calls: list[Exchange] = []
        deaf = False

        def acknowledge(number: int) -> None:
            if not deaf:
                recorder.acknowledged(number)

        source = Source(recorder.source, acknowledge)
        intake.came(source)

        def join() -> None:
            recorder.acknowledged(source.stored)
            link.intake, link.source = intake, source
            for number, data in list(recorder.unacknowledged(source.stored)):
                link.send(number, data)

        join()
        for _ in range(chance.randrange(1, 12)):
            step = chance.choice(("call", "call", "open", "cut", "join", "wait"))
            if step == "call":
                exchange = call()
                assert recorder.admit(exchange)
                recorder.complete(exchange, None)
                made[exchange.id] = "complete"
            elif step == "open":
                exchange = call()
                assert recorder.admit(exchange)
                open_calls.append(exchange)
            elif step == "cut":
                link.intake, deaf = None, chance.random() < 0.5
            elif step == "join" and link.intake is None:
                deaf = False
                join()
            else:
                await asyncio.sleep(chance.random() * 0.03)
        link.intake = None
        for exchange in open_calls:  # some end while nobody meters
            recorder.complete(exchange, None)
            made[exchange.id] = "complete"
        recorder.flush()


@pytest.mark.parametrize("seed", range(CHANCES))
async def test_any_sequence_of_sends_cuts_and_deaths_counts_each_call_once(tmp_path: Path, seed: int) -> None:
    chance, link, made = random.Random(seed), Breaking(), dict[str, str]()
    durability = Durability(chance.choice(("committed", "buffered")))
    recorder = Recorder(link, Counts(), SpoolSettings(durability=durability, commit_wait_s=30))
    for _ in range(chance.randrange(1, 5)):
        await one_life(tmp_path, recorder, link, chance, made)
    with_rest = Counter[str]()
    left = call()
    assert recorder.admit(left)
    async with Spool.open(tmp_path, limits=SMALL, goes_on=lambda id_: id_.endswith(recorder.source[:6].hex())) as spool:
        intake = Intake(Told())
        intake.begin(spool)
        source = Source(recorder.source, recorder.acknowledged)
        intake.came(source)
        recorder.acknowledged(source.stored)
        link.intake, link.source = intake, source
        for number, data in list(recorder.unacknowledged(source.stored)):
            link.send(number, data)
        await until(lambda: recorder._intended)
        await until(lambda: not recorder._in_flight and recorder._filling is None)
        assert intake.settle(source.id) == 1  # and then the process that serves dies
        assert intake.settle(source.id) == 0
        made[left.id] = "unknown"
        await until(lambda: spool.snapshot().totals.recorded == len(made))
        assert spool.snapshot().totals.holds
        assert spool.snapshot().totals.open == 0
    stored = rows(tmp_path, spool.instance)
    with_rest.update(row["id"] for row in stored)
    assert set(with_rest.values()) == {1}
    assert {row["id"]: row["outcome"] for row in stored} == made
    assert [row["seq"] for row in stored] == [*range(1, len(made) + 1)]


def test_an_exchange_crosses_as_it_is() -> None:
    exchange = call(dimensions={"a": "\ud800"}, first_byte_ms=1.5, duration_ms=2.0)
    told = decode_frame(encode_frame(7, admitted=1, ended=[exchange], counts=[("sidecar_lost", "x", 1)]))
    assert (told.number, told.admitted, told.counts) == (7, 1, [("sidecar_lost", "x", 1)])
    assert exchange_of(told.ended[0]) == exchange
    assert told.ended[0][0] == EXCHANGE


@pytest.mark.parametrize("data", [b"", b"\x00", b"nonsense", encode_frame(1)[:-3], b"N"])
def test_what_is_no_frame_is_told(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame(data)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("durability", ["committed", "buffered"])
async def test_sigkill_of_metering_under_load_loses_and_doubles_nothing(tmp_path: Path, durability: str) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, **SETTINGS, SIDECAR_DURABILITY=durability)
        async with whole:
            assert whole.process is not None
            oracle = Oracle(lambda: whole.proxy_url, seed=11, clients=6)
            load = asyncio.create_task(oracle.run())
            for _ in range(4):
                await more(oracle, 40)
                [metering] = whole.children()["meter"]
                os.kill(metering, signal.SIGKILL)
                await more(oracle, 20)  # calls go on
                async with asyncio.timeout(30):
                    while whole.children()["meter"] in ([], [metering]):
                        await asyncio.sleep(0.01)
            await more(oracle, 20)
            oracle.stop()
            await load
            assert oracle.sent == len(oracle.owed), "no call failed"
            balance = await whole.settled()
            records: list[dict[str, Any]] = await whole.records()
            assert await whole.stop() == 0, whole.log.read_text()
    judge(oracle.owed, records)
    extra = [row for row in records if call_of(row) not in oracle.owed]
    assert not extra, (len(extra), extra[:3])
    assert balance["holds"], balance
    ledger = balance["backends"]["ledger"]
    # Killed between its own commit and delivery's, the ledger is asked again and says that it has them.
    assert ledger["delivered"] + ledger["duplicate"] == len(records)


POINTS = [f"{when} {step}" for step in (*SERVING, *METERING) for when in ("before", "after")]
if "CRASH_ROUNDS" not in os.environ:  # the others are for `make crash`: each takes two starts
    POINTS = ["after Link.send", "before Intake.store", "after Segment.append", "before Seam.acknowledge"]
# What a serving process knows and has not told dies with it: `buffered` promises no more.
CASES = [
    (durability, point)
    for durability in ("committed", "buffered")
    for point in POINTS
    if durability == "committed" or point.split()[1] not in SERVING
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("durability", "point"), CASES)
async def test_a_death_at_each_step_of_the_seam_loses_and_doubles_nothing(
    tmp_path: Path, durability: str, point: str
) -> None:
    serving = point.split()[1] in SERVING
    mark = tmp_path / "died"
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, **SETTINGS, SIDECAR_DURABILITY=durability)
        whole.env |= {"DIES_AT": f"{point} 3", "DIES_MARK": str(mark)}
        async with whole:
            oracle = Oracle(lambda: whole.proxy_url, seed=5, clients=6)
            load = asyncio.create_task(oracle.run())
            async with asyncio.timeout(60):
                while not mark.exists():
                    await asyncio.sleep(0.01)
            await more(oracle, 40)
            oracle.stop()
            await load
            balance = await whole.settled()
            records: list[dict[str, Any]] = await whole.records()
            assert await whole.stop() == 0, whole.log.read_text()
    judge(oracle.owed, records)
    assert balance["holds"], balance
    ledger = balance["backends"]["ledger"]
    assert ledger["delivered"] + ledger["duplicate"] == len(records)
    if not serving:
        assert oracle.sent == len(oracle.owed), "no call failed"


@pytest.mark.timeout(180)
async def test_a_call_that_metering_dies_of_each_time_is_given_up_and_all_others_are_recorded(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream, aiohttp.ClientSession() as session:
        whole = Whole(
            tmp_path / "data", upstream, **SETTINGS, SIDECAR_DURABILITY="committed", SIDECAR_COMMIT_WAIT_S="1"
        )
        whole.env |= {"DIES_OF": "?deadly"}
        async with whole:

            async def post(query: str) -> None:
                async with session.post(f"{whole.proxy_url}/v1/things?{query}", json={}) as response:
                    assert response.status == 200

            await post("good")
            await post("deadly")
            await post("good")
            try:
                async with asyncio.timeout(60):
                    while (balance := await balance_of(whole)).get("recorded") != 2 or balance["open"] > 1:
                        await asyncio.sleep(0.1)
            except TimeoutError:
                raise AssertionError(whole.log.read_text()[-6000:]) from None
            await post("good")
            await whole.until_metric('sidecar_frames_given_up_total{why="deadly"} 1')
            async with asyncio.timeout(30):
                while (balance := await balance_of(whole)).get("recorded") != 3:
                    await asyncio.sleep(0.1)
            assert await whole.stop() == 0, whole.log.read_text()
    # The deadly one was open for long enough to have its intent on disk, or it is lost.
    assert balance["holds"], balance
    assert balance["open"] + balance["lost"].get("unreadable", 0) == 1, balance
    assert not (tmp_path / "data" / TRIALS).exists()
    assert "?deadly" not in whole.log.read_text()


async def balance_of(whole: Whole) -> dict[str, Any]:
    """Nothing, while nobody meters."""
    try:
        found: dict[str, Any] = await whole.get("/balance")
    except (aiohttp.ClientError, OSError, AssertionError):
        return {}
    return found


GATE_POINTS = [f"{when} {step}" for step in (*ADMITTING, *COUNTING) for when in ("before", "after")]
if "CRASH_ROUNDS" not in os.environ:
    GATE_POINTS = ["after Admission.ask", "before Owner.settle"]
FREE = ("denied", "refused", "unreachable")  # a call that ended so is given back


@pytest.mark.timeout(180)
@pytest.mark.parametrize("point", GATE_POINTS)
async def test_a_death_at_each_step_of_the_gate_leaves_what_the_records_say(tmp_path: Path, point: str) -> None:
    mark = tmp_path / "died"
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, **SETTINGS, SIDECAR_LIMITS="calls=100000/day")
        whole.env |= {"DIES_AT": f"{point} 2", "DIES_MARK": str(mark)}
        async with whole:
            oracle = Oracle(lambda: whole.proxy_url, seed=7, clients=4, pause_s=0.01)
            load = asyncio.create_task(oracle.run())
            async with asyncio.timeout(60):
                while not mark.exists():
                    await asyncio.sleep(0.01)
            await more(oracle, 30)
            oracle.stop()
            await load
            balance = await whole.settled()
            records: list[dict[str, Any]] = await whole.records()
            spent = Counter(
                record["subscriber"]["id"]
                for record in records
                if record["outcome"] not in FREE and not refused(record)
            )
            async with asyncio.timeout(20):
                while (used := await held(whole)) != {who: (count, 0) for who, count in spent.items()}:
                    await asyncio.sleep(0.05)
            assert await whole.stop() == 0, whole.log.read_text()
    judge(oracle.owed, records)
    assert balance["holds"], balance
    assert sum(count for count, _ in used.values()) >= len(oracle.owed)


def refused(record: dict[str, Any]) -> bool:
    """By the upstream, and nothing was used."""
    return record["status"] is not None and record["status"] >= 400 and record["usage"] is None


async def held(whole: Whole) -> dict[str, tuple[int, int]]:
    """Of each subscriber: the calls that are counted, and those that are set aside."""
    rows = (await whole.get("/limits"))["limits"]
    return {row["scope"]["subscriber"]: (int(row["used"]), int(row["reserved"])) for row in rows}


async def more(oracle: Oracle, count: int) -> None:
    owed = len(oracle.owed)
    async with asyncio.timeout(60):
        while len(oracle.owed) < owed + count:
            await asyncio.sleep(0.01)
