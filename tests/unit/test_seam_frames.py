"""Frames that nobody can read are given up once, counted, and the rest goes on. Those that the metering process dies of
are in tests/crash/test_seam.py."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.spool_fixtures import SMALL, call, rows, until

from sidecar.model.exchange import Exchange
from sidecar.runtime.seam import DEADLY_AFTER, TRIALS, Seam, Trials
from sidecar.runtime.seam_link import Link
from sidecar.runtime.seam_protocol import Status, Told, listen_at_seam
from sidecar.settings import Durability, SpoolSettings
from sidecar.spool import Spool
from sidecar.spool.frames import HEAD_BYTES, FrameError, Head, decode_frame, encode_frame, head_of
from sidecar.spool.intake import Intake
from sidecar.spool.recorder import Recorder


class Counts:
    """What the hop counts, and what is counted of it."""

    def __init__(self) -> None:
        self.counted: Counter[tuple[str, str]] = Counter()

    def lost(self, reason: str, count: int) -> None: ...
    def released_uncommitted(self, count: int) -> None: ...
    def calls_ended(self, group: object) -> None: ...
    def call_ended(self, exchange: Exchange) -> None: ...
    def take(self) -> Sequence[tuple[str, str, float]]:
        return ()

    def add(self, counts: Iterable[tuple[str, str, float]]) -> None:
        for name, label, count in counts:
            self.counted[(name, label)] += int(count)


class Instance:
    """One that serves, and lives of one that meters, on a real socket and a real spool."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.counts = Counts()
        self.listener, self.address = listen_at_seam(directory, held=True)
        self.link: Link
        self.recorder: Recorder
        self.spool: Spool | None = None

    def serve(self) -> None:
        source = bytes(range(16))
        self.link = Link(self.address, source, 0, lambda asked: Status(asked, 0, 0, 0, "ok", None, refusing=False))
        self.recorder = Recorder(self.link, Counts(), SpoolSettings(durability=Durability.BUFFERED), source=source)
        self.link.start(self.recorder)

    @contextlib.asynccontextmanager
    async def life(self) -> AsyncIterator[Seam]:
        tail = self.recorder.source[:6].hex()
        async with Spool.open(self.directory, limits=SMALL, goes_on=lambda id_: id_.endswith(tail)) as self.spool:
            intake = Intake(self.counts)
            seam = Seam(
                intake, lambda: Told("ok", None, suspended=False), lambda *_: None, trials=self.directory / TRIALS
            )
            seam.expect(self.recorder.source, 0)
            intake.begin(self.spool)
            await seam.listen(self.listener.dup())
            try:
                yield seam
            finally:
                await seam.aclose()

    def call(self, url: str = "https://api.example.com/", *, held: bool = False) -> Exchange:
        """One that ends, or with `held` one that is still open."""
        exchange = call(url=url)
        assert self.recorder.admit(exchange)
        if not held:
            self.recorder.complete(exchange, None)
        return exchange

    async def told(self) -> None:
        """Everything is acknowledged."""
        self.recorder.flush()
        await until(lambda: not self.recorder._in_flight and self.recorder._filling is None)

    def recorded(self) -> list[str]:
        assert self.spool is not None
        return [row["id"] for row in rows(self.directory, self.spool.instance)]


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Instance]:
    found = Instance(tmp_path)
    found.serve()
    yield found
    await found.link.aclose()
    found.listener.close()


def damaging(monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]) -> None:
    """The next frame only."""
    real = Recorder._encoded

    def encoded(self: Recorder, *given: Any) -> bytes:
        monkeypatch.setattr(Recorder, "_encoded", real)
        return damage(real(self, *given))

    monkeypatch.setattr(Recorder, "_encoded", encoded)


def test_a_head_says_how_many_calls_are_over() -> None:
    one, two, three = call(), call(), call()
    data = encode_frame(7, admitted=4, lost={"spool_full": 1}, opens=[one], ended=[two, three], closes=["a"])
    assert head_of(data) == Head(number=7, admitted=4, ends=2)
    assert decode_frame(data).number == 7


@pytest.mark.parametrize("at", range(HEAD_BYTES))
def test_a_head_that_is_damaged_is_not_believed(at: int) -> None:
    data = bytearray(encode_frame(7, admitted=4))
    data[at] ^= 0x10
    with pytest.raises(FrameError, match="head"):
        head_of(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-3], id="cut"),
        pytest.param(lambda data: data[:HEAD_BYTES], id="nothing but its head"),
        pytest.param(lambda data: data[:HEAD_BYTES] + b"\xff" * 40, id="other bytes"),
        pytest.param(lambda data: data[:HEAD_BYTES] + encode_frame(3, admitted=5)[HEAD_BYTES:], id="another's body"),
    ],
)
async def test_a_frame_that_cannot_be_read_is_given_up_once_and_the_rest_goes_on(
    instance: Instance,
    damage: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with instance.life():
        good = [instance.call()]
        await instance.told()
        damaging(monkeypatch, damage)
        instance.call("https://api.example.com/?secret"), instance.call()
        await instance.told()
        good.append(instance.call())
        await instance.told()
        assert instance.spool is not None
        totals = instance.spool.snapshot().totals
        assert totals.holds
        assert totals.lost == {"unreadable": 2}
    async with instance.life():  # known after a restart as well
        good.append(instance.call())
        await instance.told()
        assert instance.spool.snapshot().totals.lost == {"unreadable": 2}
    assert instance.recorded() == [one.id for one in good]
    assert instance.counts.counted[("sidecar_frames_given_up", "unreadable")] == 1
    assert instance.counts.counted[("sidecar_lost", "unreadable")] == 2
    [line] = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert line.facts["calls_lost"] == 2  # type: ignore[attr-defined]
    assert "secret" not in caplog.text


async def test_a_frame_without_a_head_is_passed_over_with_a_count_and_a_line(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with instance.life():
        damaging(monkeypatch, lambda data: data[3:])
        instance.call()
        instance.recorder.flush()
        await until(lambda: instance.counts.counted[("sidecar_frames_given_up", "no_head")])
        good = instance.call()
        await instance.told()
    assert instance.recorded() == [good.id]


async def test_a_call_whose_intent_is_on_disk_is_not_lost_with_the_frame_that_ends_it(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with instance.life() as seam:
        left = instance.call(held=True)
        await until(lambda: instance.recorder._intended)
        await instance.told()
        damaging(monkeypatch, lambda data: data[:-3])
        instance.recorder.complete(left, None)
        await instance.told()
        await instance.link.aclose()
        seam.gone(instance.recorder.source)
        await until(lambda: instance.recorded() == [left.id])
        assert instance.spool is not None
        assert instance.spool.snapshot().totals.holds
        assert instance.spool.snapshot().totals.lost == {}


async def test_a_call_that_nobody_can_make_a_record_of_takes_no_other_with_it(instance: Instance) -> None:
    """A mistake of ours that one call shows: the next try would show it again."""

    async with instance.life():
        bad = call()
        assert instance.recorder.admit(bad)
        bad.dimensions = {"feature": {1, 2}}  # type: ignore[dict-item]
        instance.recorder.complete(bad, None)
        good = instance.call()
        await instance.told()
        assert instance.spool is not None
        totals = instance.spool.snapshot().totals
        assert totals.holds
        assert sum(totals.lost.values()) + totals.recorded == 2
    assert good.id in instance.recorded()


def test_only_deaths_over_the_same_frame_count(tmp_path: Path) -> None:
    path, one, two = tmp_path / TRIALS, b"1" * 16, b"2" * 16
    for _ in range(2 * DEADLY_AFTER):  # dies at another moment each time
        trials = Trials(path)
        assert trials.begin(one, 7)
        trials.survived(one)
    assert not path.exists()
    for _ in range(DEADLY_AFTER):
        assert Trials(path).begin(one, 7)
        assert Trials(path).begin(two, 7)  # another's is another frame
    assert not Trials(path).begin(one, 7)
    assert Trials(path).begin(one, 8)
    assert Trials(path).begin(one, 7)


@pytest.mark.parametrize("found", [b"", b"[]", b"{", b'{"a": 3}', b'{"a": ["x", 1]}', b"\xff"])
def test_a_note_that_cannot_be_read_blames_nobody(tmp_path: Path, found: bytes) -> None:
    (tmp_path / TRIALS).write_bytes(found)
    assert Trials(tmp_path / TRIALS).begin(b"1" * 16, 1)
    assert Trials(tmp_path / "nowhere" / TRIALS).begin(b"1" * 16, 1)
