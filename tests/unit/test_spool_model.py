"""The spool against a plain dict: whatever the order of calls, crashes, reopenings and retirings, they agree."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from support.spool_fixtures import SMALL, Told, call, crashed_copy, ended, only_instance, rows, until
from support.spool_recorder import SpoolRecorder

from sidecar.model.exchange import Exchange
from sidecar.spool import Spool, SpoolReader, verify

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("calls"), st.integers(1, 40)),
        st.tuples(st.just("admit"), st.integers(1, 5)),  # open, and no intent yet
        st.tuples(st.just("intend"), st.just(0)),  # what is open gets its intent
        st.tuples(st.just("finish"), st.integers(1, 5)),
        st.tuples(st.just("crash"), st.just(0)),
        st.tuples(st.just("reopen"), st.just(0)),
        st.tuples(st.just("retire"), st.integers(0, 100)),
    ),
    min_size=1,
    max_size=14,
)


class Model:
    """What must be true, kept in dicts."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.root = base / "0"
        self.root.mkdir()
        self.copies = 0
        self.outcomes: dict[str, str] = {}  # id -> outcome, of every record that must be readable
        self.retired: set[str] = set()
        self.admitted = self.recorded = 0
        self.fresh: list[Exchange] = []
        self.intended: list[Exchange] = []

    async def run(self, steps: list[tuple[str, int]]) -> None:
        while steps:
            steps = await self._one_life(steps)
        await self._one_life([])

    async def _one_life(self, steps: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Open, do steps until a crash or a reopening, and leave the rest."""
        async with Spool.open(self.root, limits=SMALL) as spool:
            assert spool.settled == len(self.intended)
            for exchange in self.intended:
                self.outcomes[exchange.id] = "unknown"
            self.recorded += len(self.intended)
            self.intended, self.fresh = [], []
            recorder = SpoolRecorder(spool, Told())
            self._check(spool)
            for number, (step, count) in enumerate(steps, 1):
                if step in ("crash", "reopen"):
                    if step == "crash":
                        await until(lambda: spool.snapshot().totals.recorded == self.recorded)
                        await asyncio.to_thread(spool._writer.maintenance.quiet)  # a copy takes time
                        self.copies += 1
                        self.root = crashed_copy(self.root, self.base / str(self.copies))
                        self.admitted -= len(self.fresh)  # nobody on disk knows of these
                    else:
                        await recorder.aclose()
                        self.intended += self.fresh
                    return steps[number:]
                await self._step(spool, recorder, step, count)
                self._check(spool)
            await recorder.aclose()
            self.intended += self.fresh
        return []

    async def _step(self, spool: Spool, recorder: SpoolRecorder, step: str, count: int) -> None:
        if step == "calls":
            calls = [call(url=f"https://api.example.com/{'x' * n}") for n in range(count)]
            for exchange in calls:
                assert recorder.admit(exchange)
            await asyncio.gather(*(ended(recorder, exchange) for exchange in calls))
            self._recorded(calls)
        elif step == "admit":
            for _ in range(count):
                exchange = call()
                assert recorder.admit(exchange)
                self.fresh.append(exchange)
            self.admitted += count
            assert recorder._look is not None
            recorder._look.cancel()  # the test says when intents are due
        elif step == "intend":
            recorder._old.update(recorder._young)
            recorder._young.clear()
            recorder._write_intents()
            self.intended += self.fresh
            self.fresh = []
            await until(lambda: not recorder._in_flight and recorder._filling is None)
        elif step == "finish":
            for waiting in (self.intended, self.fresh):
                for exchange in waiting[:count]:
                    waiting.remove(exchange)
                    self.admitted -= 1
                    await ended(recorder, exchange)
                    self._recorded([exchange])
        elif step == "retire":
            last = spool.snapshot().last_seq
            before = last * count // 100
            kept = {row["id"] for row in rows(self.root, spool.instance) if row["seq"] >= before}
            spool.retire(before, retention_s=0, retention_bytes=1 << 40)
            left = {row["id"] for row in rows(self.root, spool.instance)}
            assert kept <= left
            for id_ in self.outcomes.keys() - left:
                del self.outcomes[id_]

    def _recorded(self, calls: Sequence[Exchange]) -> None:
        self.outcomes |= {exchange.id: "complete" for exchange in calls}
        self.recorded += len(calls)
        self.admitted += len(calls)

    def _check(self, spool: Spool) -> None:
        found = rows(self.root, only_instance(self.root))
        assert {row["id"]: row["outcome"] for row in found} == self.outcomes
        assert len(found) == len(self.outcomes)  # none twice
        numbers = [row["seq"] for row in found]
        assert numbers == sorted(set(numbers))
        totals = spool.snapshot().totals
        # The spool counts a call from the moment on that a frame tells of it.
        assert (totals.admitted + len(self.fresh), totals.recorded) == (self.admitted, self.recorded)
        assert totals.holds
        with SpoolReader(self.root) as reader:
            stored = reader.totals(spool.instance)
            assert stored.holds
            assert stored.recorded == self.recorded
            assert stored.open == len(self.intended)
            assert reader.count(spool.instance, 0, totals.admitted * 2) == len(found)
            (report,) = verify(reader)
            assert not report.problems, report.problems


@settings(max_examples=40)
@given(steps=STEPS)
def test_the_spool_is_a_dict_that_survives(steps: list[tuple[str, int]]) -> None:
    base = Path(tempfile.mkdtemp(prefix="spool-model-"))
    try:
        asyncio.run(Model(base).run(steps))
    finally:
        shutil.rmtree(base)
