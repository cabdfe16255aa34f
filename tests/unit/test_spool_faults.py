"""A disk that fails, stalls or is full: nothing handed over is lost or stored twice, and it goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.small_disk import fill_up, small_disk
from support.spool_fixtures import SMALL, Told, call, ended, failing, only_instance, recorded, rows, stalling, until
from support.spool_recorder import SpoolRecorder

from sidecar.spool import (
    Batch,
    Limits,
    Spool,
    SpoolReader,
    State,
    adopt_orphans,
    ground_warning,
    last_words,
    verify,
)
from sidecar.spool.files import Reserve, segment_numbers, slot_dir


def _in_order(root: Path) -> None:
    with SpoolReader(root) as reader:
        for report in verify(reader):
            assert not report.problems, report.problems


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("turn", [1, 2, 5])
async def test_a_failed_sync_moves_on_to_another_file(tmp_path: Path, how: str, turn: int) -> None:
    """Also where the commit mark was written before the sync failed: the old file then holds the records as well."""
    told = Told()
    async with Spool.open(tmp_path, limits=SMALL, create=failing({turn: how}).create, metrics=told) as spool:
        recorder = SpoolRecorder(spool, told)
        for _ in range(10):
            await recorded(recorder, call())
        await until(lambda: spool.health().state is State.OK)
        assert spool.snapshot().totals.holds
    found = rows(tmp_path, spool.instance)
    assert [row["seq"] for row in found] == list(range(1, 11))
    assert len({row["id"] for row in found}) == 10
    assert len(list((tmp_path / "set-aside").glob("*/*.seg"))) == (turn > 1)
    _in_order(tmp_path)


async def test_the_file_that_failed_is_not_written_again(tmp_path: Path) -> None:
    kind = failing({5: "before"})  # the first is the opening
    async with Spool.open(tmp_path, limits=SMALL, create=kind.create) as spool:
        recorder = SpoolRecorder(spool, Told())
        for _ in range(3):
            await recorded(recorder, call())
        first = spool._writer._segment
        assert first is not None
        await recorded(recorder, call())
        assert spool._writer._segment is not first
        assert first.broken


async def test_a_disk_that_fails_for_a_while_loses_nothing(tmp_path: Path) -> None:
    turns = dict.fromkeys(range(3, 12), "after")
    async with Spool.open(tmp_path, limits=SMALL, create=failing(turns).create) as spool:
        recorder = SpoolRecorder(spool, Told())
        calls = [call() for _ in range(20)]
        for exchange in calls:
            recorder.admit(exchange)
            recorder.complete(exchange, None)
            await asyncio.sleep(0.001)
        await until(lambda: spool.health().state is State.DEGRADED or spool.snapshot().totals.recorded == 20)
        await until(lambda: spool.snapshot().totals.recorded == 20)
    assert [row["id"] for row in rows(tmp_path, spool.instance)] == [exchange.id for exchange in calls]
    _in_order(tmp_path)


async def test_closing_gives_up_on_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    limits = Limits(reserve_bytes=0, recover_margin_bytes=0, retry_s_min=0.005, retry_s_max=0.01, stop_s=0.1)
    turns = dict.fromkeys(range(2, 10_000), "before")
    spool = Spool.open(tmp_path, limits=limits, create=failing(turns).create)
    async with spool:
        recorder = SpoolRecorder(spool, Told(), commit_wait_s=0.05)
        recorder.admit(exchange := call())
        recorder.complete(exchange, None)
        await until(lambda: spool.health().state is State.DEGRADED)
        assert "writing" in (spool.health().reason or "")
    assert rows(tmp_path, spool.instance) == []
    _in_order(tmp_path)
    Spool.open(tmp_path, limits=SMALL, instance=spool.instance).close()


async def test_a_data_directory_that_was_removed_is_noticed(tmp_path: Path) -> None:
    async with Spool.open(tmp_path / "data", limits=replace(SMALL, stop_s=0.1)) as spool:
        recorder = SpoolRecorder(spool, Told(), commit_wait_s=0.05)
        await recorded(recorder, call())
        # At once: what is removed file by file may lose a race against a writer that makes one.
        (tmp_path / "data").rename(tmp_path / "gone")
        await until(lambda: _one_more(recorder) and spool.health().state is State.DEGRADED)
        for _ in range(20):
            assert _one_more(recorder) is True
            await asyncio.sleep(0.005)
            health = spool.health()
            assert health.state is State.DEGRADED  # the first reason, not what fails because of it
            assert "was removed or moved; put it back" in (health.reason or "")
            assert "restart" not in (health.reason or "")
        assert spool.snapshot().totals.holds
        (tmp_path / "gone").rename(tmp_path / "data")
        await until(lambda: spool.health().state is State.OK)
        await until(lambda: spool.snapshot().totals.open == recorder.waiting_records == 0)
    assert len(rows(tmp_path / "data", spool.instance)) == spool.snapshot().totals.admitted


async def test_a_segment_made_ahead_is_not_written_in_a_directory_that_is_gone(tmp_path: Path) -> None:
    """It was open before the directory went: writing it works, and what is in it can be opened by nobody."""
    async with Spool.open(tmp_path / "data", limits=replace(SMALL, stop_s=0.1)) as spool:
        recorder = SpoolRecorder(spool, Told(), commit_wait_s=0.05)
        while not spool._writer.maintenance.has_ahead:
            await recorded(recorder, call())
        await asyncio.to_thread(spool._writer.maintenance.quiet)
        (tmp_path / "data").rename(tmp_path / "gone")
        spool._writer._looked_s = 0.0  # it looks ten times a second: let it be now
        _one_more(recorder)
        await until(lambda: spool.health().state is State.DEGRADED)
        before = spool.snapshot().totals.recorded
        for _ in range(30):
            _one_more(recorder)
            await asyncio.sleep(0.005)
        assert spool.health().state is State.DEGRADED
        assert spool.snapshot().totals.recorded == before
        (tmp_path / "gone").rename(tmp_path / "data")
        await until(lambda: spool.snapshot().totals.open == recorder.waiting_records == 0)
    assert len(rows(tmp_path / "data", spool.instance)) == spool.snapshot().totals.admitted
    with Spool_settled(tmp_path / "data") as settled:
        assert settled == 0
    _in_order(tmp_path / "data")


async def test_a_directory_removed_file_by_file_is_noticed(tmp_path: Path) -> None:
    """What was in it is gone with it; what comes from then on waits, and is written once there is a directory again."""
    data = tmp_path / "data"
    async with Spool.open(data, limits=replace(SMALL, stop_s=0.1)) as spool:
        recorder = SpoolRecorder(spool, Told(), commit_wait_s=0.05)
        await recorded(recorder, call())
        async with asyncio.timeout(20):
            while data.exists():  # a writer that makes a file meanwhile is cleared away too
                await asyncio.to_thread(shutil.rmtree, data, ignore_errors=True)
                assert _one_more(recorder) is True
        await until(lambda: _one_more(recorder) and spool.health().state is State.DEGRADED)
        before = spool.snapshot().totals.recorded
        for _ in range(30):
            assert _one_more(recorder) is True
            await asyncio.sleep(0.005)
        health = spool.health()
        assert health.state is State.DEGRADED
        assert "was removed or moved; put it back" in (health.reason or "")
        assert spool.snapshot().totals.holds
        assert spool.snapshot().totals.recorded == before
        slot_dir(data, spool.instance).mkdir(parents=True)
        await until(lambda: spool.health().state is State.OK)
        await until(lambda: spool.snapshot().totals.open == recorder.waiting_records == 0)
    totals = spool.snapshot().totals
    assert len(rows(data, spool.instance)) >= totals.admitted - before


def _one_more(recorder: SpoolRecorder) -> bool:
    recorder.admit(exchange := call())
    return recorder.complete(exchange, None)


async def test_a_mistake_of_ours_ends_the_thread_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the process with it, as the metering process has it: what was written before the mistake would be written
    again."""
    ended: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    async with Spool.open(tmp_path, limits=replace(SMALL, stop_s=0.1)) as spool:
        spool.submit(Batch(first_seq=1, lines=["not bytes"], size_bytes=9, admitted=1))  # type: ignore[list-item]
        await until(lambda: bool(ended))
        assert ended[0].exc_type is TypeError
        assert ended[0].thread is spool._writer._thread


async def test_while_one_commit_runs_the_next_group_gathers(tmp_path: Path) -> None:
    kind, gate = stalling()
    told = Told()
    async with Spool.open(tmp_path, limits=SMALL, create=kind.create, metrics=told) as spool:
        recorder = SpoolRecorder(spool, told)
        gate.clear()
        for _ in range(30):
            recorder.admit(exchange := call())
            recorder.complete(exchange, None)
            await asyncio.sleep(0)
        gate.set()
        await until(lambda: spool.snapshot().totals.recorded == 30)
        assert sum(count for count, _, _ in told.commits) == 30
        assert len(told.commits) < 10
    assert [row["seq"] for row in rows(tmp_path, spool.instance)] == list(range(1, 31))


async def test_a_full_disk_leaves_room_for_verdicts_and_recovers_by_itself(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as root:
        async with Spool.open(root, limits=SMALL) as spool:
            recorder = SpoolRecorder(spool, Told(), commit_wait_s=0.05)
            await recorded(recorder, call())
            assert (root / "reserve").stat().st_size == SMALL.reserve_bytes
            filler = fill_up(root)
            calls = [call(url="https://api.example.com/" + "x" * 2000) for _ in range(50)]
            for exchange in calls:
                assert recorder.admit(exchange)
                recorder.complete(exchange, None)
                await asyncio.sleep(0)
            await until(lambda: spool.health().state is State.FULL)
            await until(lambda: not (root / "reserve").exists())
            assert "free" in (spool.health().reason or "")
            (root / "verdict").write_bytes(bytes(SMALL.reserve_bytes // 2))  # delivery can still store what it is told
            before = spool.snapshot().totals
            await asyncio.sleep(SMALL.retry_s_max * 5)  # the writer tries; the reserve's room is not for it
            assert spool.snapshot().totals == before
            assert before.holds
            filler.unlink()
            await until(lambda: spool.snapshot().totals.recorded == 51)
            await until(lambda: spool.health().state is State.OK)
            assert (root / "reserve").exists()
            await recorded(recorder, call())
        assert len(rows(root, spool.instance)) == 52
        _in_order(root)


async def test_a_disk_that_is_full_at_start_does_not_keep_the_service_down(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as root:
        async with Spool.open(root, limits=SMALL) as spool:
            recorder = SpoolRecorder(spool, Told())
            recorder.admit(call(route="/open"))
            await recorder.aclose()
        (root / "reserve").unlink()
        filler = fill_up(root)
        async with Spool.open(root, limits=SMALL) as spool:
            assert spool.health().state is State.FULL
            assert spool.settled == 1
            recorder = SpoolRecorder(spool, Told(), commit_wait_s=0.02)
            recorder.admit(exchange := call())
            recorder.complete(exchange, None)
            assert spool.snapshot().totals.holds
            filler.unlink()
            await until(lambda: spool.snapshot().totals.recorded == 2)
            assert spool.snapshot().totals.open == 0
        assert [(row["route"], row["outcome"]) for row in rows(root, spool.instance)] == [
            ("/open", "unknown"),
            (exchange.route, "complete"),
        ]
        _in_order(root)


def test_the_reserve_is_allocated_and_given_up(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path, 1 << 20, 1 << 16)
    assert not reserve.present
    assert reserve.restore()
    stat = (tmp_path / "reserve").stat()
    assert stat.st_size == 1 << 20
    assert stat.st_blocks * 512 >= 1 << 20
    assert reserve.restore()
    reserve.give_up()
    reserve.give_up()
    assert not reserve.present
    assert [path.name for path in tmp_path.iterdir()] == []
    assert not Reserve(tmp_path, 1 << 60, 0).restore()


async def test_orphans_are_settled_and_a_slot_in_use_is_left_alone(tmp_path: Path) -> None:
    async with Spool.open(tmp_path, limits=SMALL, instance="held"):
        async with Spool.open(tmp_path, limits=SMALL, instance="orphan") as orphan:
            recorder = SpoolRecorder(orphan, Told())
            await recorded(recorder, call())
            recorder.admit(call(route="/open"))
            await recorder.aclose()
        segments = len(segment_numbers(slot_dir(tmp_path, "held")))
        assert adopt_orphans(tmp_path, limits=SMALL) == ["orphan"]
        assert adopt_orphans(tmp_path, limits=SMALL) == []  # in order now: left as it is
        assert len(segment_numbers(slot_dir(tmp_path, "held"))) == segments
    found = rows(tmp_path, "orphan")
    assert [(row["route"], row["outcome"]) for row in found][1:] == [("/open", "unknown")]
    assert (found[1]["status"], found[1]["usage"], found[1]["duration_ms"]) == (None, None, None)
    _in_order(tmp_path)


async def test_retention_goes_by_age_and_by_size_and_never_beyond_what_is_delivered(tmp_path: Path) -> None:
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder = SpoolRecorder(spool, Told())
        for _ in range(150):
            await recorded(recorder, call())
        await asyncio.to_thread(spool._writer.maintenance.quiet)
        with SpoolReader(tmp_path) as reader:
            infos = reader.segments(spool.instance)
        assert len(infos) > 4
        third = infos[2].first_seq
        assert spool.retire(third, retention_s=3600, retention_bytes=1 << 40) == 0  # neither too old nor too many
        assert spool.retire(third - 1, retention_s=0, retention_bytes=1 << 40) == 1  # the second is not all delivered
        assert spool.retire(third, retention_s=3600, retention_bytes=0) == 1
        assert rows(tmp_path, spool.instance)[0]["seq"] == third
        assert not list(slot_dir(tmp_path, spool.instance).glob("0000000[12].seg*"))
        assert spool.retire(1 << 40, retention_s=0, retention_bytes=0) >= 2
        await recorded(recorder, call())
        assert spool.snapshot().totals.recorded == 151
    _in_order(tmp_path)


async def test_a_quiet_spool_changes_its_segment_by_age(tmp_path: Path) -> None:
    limits = Limits(reserve_bytes=0, recover_margin_bytes=0, segment_age_s=0.0)
    async with Spool.open(tmp_path, limits=limits) as spool:
        recorder = SpoolRecorder(spool, Told())
        for _ in range(3):
            await recorded(recorder, call())
    assert len(segment_numbers(slot_dir(tmp_path, spool.instance))) >= 3
    assert len(rows(tmp_path, spool.instance)) == 3


async def test_an_open_call_survives_many_changes_of_segment(tmp_path: Path) -> None:
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder = SpoolRecorder(spool, Told())
        recorder.admit(waiting := call(route="/stream"))
        with SpoolReader(tmp_path) as reader:
            await until(lambda: reader.totals(spool.instance).open == 1)
            for _ in range(100):
                await recorded(recorder, call())
            assert len(reader.segments(spool.instance)) > 2
            assert reader.totals(spool.instance).open == 1
            await ended(recorder, waiting)
            assert reader.totals(spool.instance).open == 0
    with Spool_settled(tmp_path) as settled:
        assert settled == 0


@contextlib.contextmanager
def Spool_settled(root: Path) -> Iterator[int]:
    spool = Spool.open(root, limits=SMALL)
    try:
        yield spool.settled
    finally:
        spool.close()


async def test_reading_in_any_steps_gives_the_same(tmp_path: Path) -> None:
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder = SpoolRecorder(spool, Told())
        calls = [call(url=f"https://api.example.com/{number}") for number in range(200)]
        for start in range(0, 200, 10):
            await asyncio.gather(*(recorded(recorder, exchange) for exchange in calls[start : start + 10]))
    instance = only_instance(tmp_path)
    with SpoolReader(tmp_path) as reader:
        whole = [line for group in reader.groups(instance) for line in group.lines]
        assert len(whole) == 200
        assert list(reader.lines()) == whole
        assert list(reader.lines(since_ns=1 << 62)) == []
        for after in (0, 1, 7, 99, 199, 200, 5000):
            read = [line for group in reader.groups(instance, after) for line in group.lines]
            assert read == whole[after:]
            assert reader.count(instance, after, 200) == len(read)
            assert reader.count(instance, after, 150) == len(whole[after:150])
            if read:
                (first, *_) = reader.read(instance, after, bytes_max=1)
                assert first.first_seq == after + 1
        assert reader.last_seq(instance) == 200
        assert reader.last_seq("nobody") == reader.count("nobody", 0, 9) == 0
        assert reader.read("nobody", 0) == []


def test_ground_that_does_not_keep_records_is_named(tmp_path: Path) -> None:
    assert "memory" in (ground_warning(Path("/dev/shm")) or "memory")
    if os.path.ismount("/dev/shm"):
        assert "SIDECAR_DATA_DIR" in (ground_warning(Path("/dev/shm/not/there/yet")) or "")


async def test_what_a_full_disk_did_not_take_until_the_end_is_in_the_balance(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else takes the reserve's room as soon as it is given up: nothing but the count can be kept."""
    with small_disk(tmp_path / "disk", "4m") as root:
        limits = replace(SMALL, stop_s=0.1)
        spool = Spool.open(root, limits=limits)
        async with spool:
            recorder = SpoolRecorder(spool, Told(), commit_wait_s=0.02)
            await recorded(recorder, call())
            fillers = [fill_up(root)]
            for _ in range(400):
                recorder.admit(exchange := call(url="https://api.example.com/" + "x" * 2000))
                recorder.complete(exchange, None)
                await asyncio.sleep(0)
            await until(lambda: not (root / "reserve").exists())
            fillers.append(fill_up(root, "more"))  # to the last page: the count has room of its own
            await recorder.aclose()
        kept = len(rows(root, spool.instance))
        assert spool.unwritten == 401 - kept > 0
        assert f"{spool.unwritten} calls were served and their records are lost" in caplog.text
        with SpoolReader(root) as reader:
            totals = reader.totals(spool.instance)
        assert totals.holds
        assert (totals.admitted, totals.lost) == (401, {"stopped": spool.unwritten})
        for filler in fillers:
            filler.unlink()
        stopped = []
        for _ in range(2):  # told once, however often it is opened
            async with Spool.open(root, limits=SMALL, instance=spool.instance) as again:
                totals = again.snapshot().totals
                assert totals.holds
                assert totals.lost == {"stopped": spool.unwritten}
            stopped.append(again.stopped)
        assert stopped[-1] == 0
        await asyncio.sleep(0)
        _in_order(root)


async def test_the_count_of_what_is_lost_needs_no_room(tmp_path: Path) -> None:
    """Somebody else has taken every block, those of the reserve too."""
    with small_disk(tmp_path / "disk", "4m") as root:
        async with Spool.open(root, limits=SMALL) as spool:
            slot = root / "spool" / spool.instance
            (root / "reserve").unlink(missing_ok=True)
            fill_up(root)
            with pytest.raises(OSError, match="No space left"):
                (root / "more").write_bytes(b"x")
            assert last_words.read(slot) is None
            last_words.write(slot, last_words.Note(12, {"spool_full": 3}))
            assert last_words.read(slot) == last_words.Note(12, {"spool_full": 3})


async def test_a_loss_at_the_end_is_told_by_whoever_settles_the_slot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Spool.open(tmp_path, limits=SMALL) as spool:
        recorder = SpoolRecorder(spool, Told())
        await recorded(recorder, call())
        await recorder.aclose()
    last_words.write(slot_dir(tmp_path, spool.instance), last_words.Note(8, {}))
    told: list[int] = []
    assert adopt_orphans(tmp_path, limits=SMALL, stopped=told.append) == [spool.instance]
    assert told == [7]
    assert "calls of the last run are lost" in caplog.text
    assert adopt_orphans(tmp_path, limits=SMALL, stopped=told.append) == []
    assert told == [7]


async def test_the_reserve_takes_the_last_records(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as root:
        async with Spool.open(root, limits=replace(SMALL, stop_s=0.1, reserve_bytes=1 << 20)) as spool:
            recorder = SpoolRecorder(spool, Told(), commit_wait_s=0.02)
            await recorded(recorder, call())
            fill_up(root)
            for _ in range(100):
                recorder.admit(exchange := call(url="https://api.example.com/" + "x" * 2000))
                recorder.complete(exchange, None)
                await asyncio.sleep(0)
            await until(lambda: spool.health().state is State.FULL)
            await recorder.aclose()
        assert spool.unwritten == 0
        assert len(rows(root, spool.instance)) == 101
