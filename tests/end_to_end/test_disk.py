"""A filling disk: an alarm first, then delivered records go early; both end by themselves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.spool_recorder import SpoolRecorder

from sidecar.backends import backend_settings
from sidecar.delivery import Delivery, StateError
from sidecar.model.exchange import Exchange, Outcome
from sidecar.runtime.billing import billing
from sidecar.runtime.disk import Room, room_left
from sidecar.runtime.metrics import Metrics
from sidecar.settings import load
from sidecar.spool import Spool, SpoolReader
from sidecar.storage.files import Trouble

TIB = 1 << 40


@pytest.mark.parametrize(
    ("free", "room"),
    [(100, Room.ENOUGH), (99, Room.LOW), (50, Room.LOW), (49, Room.SHORT), (0, Room.SHORT)],
)
def test_the_steps(free: int, room: Room) -> None:
    assert room_left(free, 100) is room


async def fill(data_dir: Path) -> int:
    """A spool, or one segment more of it; how many there are."""
    metrics = Metrics()
    async with (
        Spool.open(data_dir, metrics=metrics) as spool,
        SpoolRecorder(spool, metrics) as recorder,
    ):
        for _ in range(300):
            exchange = Exchange(method="GET", url="http://u/" + "x" * 600, status=200, outcome=Outcome.COMPLETE)
            assert recorder.admit(exchange)
            recorder.complete(exchange, None)
    with SpoolReader(data_dir) as reader:
        return len(reader.segments(spool.instance))


@pytest.mark.parametrize(("mark", "room"), [("1", Room.ENOUGH), (str(1000 * TIB), Room.SHORT)])
async def test_delivered_chunks_go_early_when_the_disk_is_nearly_full(tmp_path: Path, mark: str, room: Room) -> None:
    chunks = [await fill(tmp_path) for _ in range(3)]  # each run begins a segment
    assert chunks == [1, 2, 3]
    environ = {"SIDECAR_DATA_DIR": str(tmp_path), "SIDECAR_DISK_LOW_BYTES": mark}
    settings = load(environ, backend_settings=backend_settings(), serving=False)
    async with billing(settings, Metrics()) as bills:
        assert bills.room is room
        async with asyncio.timeout(10):
            while set(bills.delivery.retired_upto().values()) != {900}:
                await asyncio.sleep(0.01)
        await bills.retire()
        with SpoolReader(tmp_path) as reader:
            [instance] = reader.instances()
            left = len(reader.segments(instance))
        balance = await bills.balance({})
    assert balance.holds, balance.problems
    assert balance.recorded == 900
    assert left == (chunks[-1] if room is Room.ENOUGH else 1)


async def test_a_delivery_state_that_cannot_be_used_for_a_while_does_not_end_retention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = [await fill(tmp_path) for _ in range(3)]
    monkeypatch.setattr("sidecar.runtime.billing.LOOK_EVERY_S", 0.01)
    asked: list[int] = []
    retired_upto = Delivery.retired_upto

    def busy(self: Delivery) -> dict[str, int]:
        asked.append(1)
        if len(asked) < 3:
            raise StateError("delivery.db is in use by another process", Trouble.BUSY)
        return retired_upto(self)

    monkeypatch.setattr(Delivery, "retired_upto", busy)
    environ = {"SIDECAR_DATA_DIR": str(tmp_path), "SIDECAR_DISK_LOW_BYTES": str(1000 * TIB)}
    settings = load(environ, backend_settings=backend_settings(), serving=False)
    async with billing(settings, Metrics()):
        async with asyncio.timeout(20):
            with SpoolReader(tmp_path) as reader:
                [instance] = reader.instances()
                assert len(reader.segments(instance)) <= chunks[-1]
                while len(reader.segments(instance)) > 1:
                    await asyncio.sleep(0.01)
