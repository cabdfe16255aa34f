"""One segment: what a cut or a flip at any byte of it costs, origins over a restart, readers beside the writer."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.spool_fixtures import SMALL, Told, call, crashed_copy, flip, open_small, recorded, rows, until
from support.spool_recorder import SpoolRecorder

from sidecar.spool import ORIGINS_KEPT, SOURCE_BYTES, Batch, Limits, Spool, SpoolReader, verify
from sidecar.spool.files import segment_path, slot_dir
from sidecar.spool.repair import repair
from sidecar.spool.segment import FRAME_MAGIC, Frame, Group, Hole, Segment, SegmentFile, scan
from sidecar.spool.types import intent_id

# --- the memory it takes ------------------------------------------------------------------------------------


def _is_cached(path: Path, offset: int) -> bool:
    """Whether the kernel could read there without asking the disk."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


def test_a_sealed_segment_takes_no_memory_of_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "00000001.seg"
    segment = Segment.create(path, 1, "a", allocate_bytes=1 << 20)
    for number in range(1, 65):
        segment.append(_group(number, number, [b'{"id":"a","seq":%d}' % number + b" " * 16_000]))
    try:
        if not _is_cached(path, 500_000):
            pytest.skip("this file system keeps nothing in memory")
    except (AttributeError, OSError) as error:
        pytest.skip(f"nobody tells here what is in memory: {error}")
    segment.seal()
    if _is_cached(path, 500_000):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert _is_cached(path, 500_000), "the hint would have been taken"
        pytest.skip("this file system takes no hint: what is in memory is all there is of it")
    assert len(_read(path)) == 65


# --- every byte --------------------------------------------------------------------------------------------


def _group(number: int, first_seq: int, lines: list[bytes], **given: Any) -> Group:
    recorded = first_seq + len(lines) - 1
    given = {"committed_ns": 1_700_000_000_000_000_000 + number, "admitted": recorded, "recorded": recorded} | given
    return Group(commit_number=number, first_seq=first_seq, lines=lines, **given)


GROUPS = [
    _group(1, 1, [], intents=[b'{"id":"open"}'], admitted=1, flags=1),
    _group(2, 1, [b'{"id":"a","seq":1}', b'{"id":"b","seq":2}'], admitted=3, origins=[(b"s" * SOURCE_BYTES, 7)]),
    _group(3, 3, [b'{"id":"open","seq":3}'], closes=["open"], lost={"spool_full": 2}),
    _group(4, 4, [b'{"id":"c","seq":4}' + b" " * 600]),
]


@pytest.fixture(scope="module", params=["sealed", "unsealed"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A segment of four commits, and its bytes."""
    path = tmp_path_factory.mktemp("small") / "00000001.seg"
    segment = Segment.create(path, 1, "a", allocate_bytes=2048)
    for group in GROUPS:
        segment.append(group)
    segment.seal() if request.param == "sealed" else segment.close()
    return path, path.read_bytes()


@pytest.mark.parametrize("taken", [1, 7, 88, 4096])
def test_a_write_that_is_taken_in_parts_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    def pwritev(fd: int, parts: Sequence[bytes], offset: int) -> int:
        return os.pwrite(fd, b"".join(parts)[:taken], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    path = tmp_path / "00000001.seg"
    segment = Segment.create(path, 1, "a", allocate_bytes=2048)
    for group in GROUPS:
        segment.append(group)
    segment.close()
    assert [frame.lines for frame in _read(path)] == [list(group.lines) for group in GROUPS]


def _read(path: Path) -> list[Frame]:
    with SegmentFile(path) as file:
        return [item for item in file.frames() if isinstance(item, Frame)]


def test_what_was_written_is_read(small: tuple[Path, bytes]) -> None:
    path, _ = small
    found = [frame.group() for frame in _read(path)][: len(GROUPS)]
    as_lists = [
        replace(group, intents=list(group.intents), closes=list(group.closes), origins=list(group.origins))
        for group in GROUPS
    ]
    assert found == as_lists
    with SegmentFile(path) as file:
        assert (file.seal() is not None) == (path.read_bytes()[-4:] == b"END\xff")
    assert not any(FRAME_MAGIC in line for group in GROUPS for line in group.lines)


def test_a_flip_at_any_byte_costs_one_commit_at_most(small: tuple[Path, bytes], tmp_path: Path) -> None:
    source, data = small
    whole = [frame.data for frame in _read(source)]
    path = tmp_path / "00000001.seg"
    path.write_bytes(data)
    for offset in range(len(data)):
        for mask in (1, 0x80, 0xFF):
            flip(path, offset, mask)
            found = [frame.data for frame in _read(path)]
            flip(path, offset, mask)
            assert len(found) >= len(whole) - 1, (offset, mask)
            assert all(one in whole for one in found), (offset, mask)


def test_a_cut_at_any_byte_costs_what_was_behind_it(small: tuple[Path, bytes], tmp_path: Path) -> None:
    source, data = small
    frames = _read(source)
    path = tmp_path / "00000001.seg"
    for room in (0, 1024):
        for size in range(len(data)):
            path.write_bytes(data[:size] + bytes(room))
            found = [frame.data for frame in _read(path)]
            assert found == [frame.data for frame in frames if frame.offset + frame.length <= size], size
            with SegmentFile(path) as file:
                holes = [item for item in file.frames() if isinstance(item, Hole)]
            assert all(hole.torn for hole in holes) or size < 128, size  # nothing that was cut looks like damage


def test_zeros_in_the_place_of_any_sector_lose_what_stood_there_alone(
    small: tuple[Path, bytes], tmp_path: Path
) -> None:
    source, data = small
    frames = _read(source)
    path = tmp_path / "00000001.seg"
    for start in range(0, len(data), 512):
        path.write_bytes(data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :])
        lost = {f.offset for f in frames if f.offset < start + 512 and f.offset + f.length > start}
        assert {frame.offset for frame in _read(path)} >= {f.offset for f in frames} - lost


def test_another_segments_frames_in_the_same_blocks_are_not_read(small: tuple[Path, bytes], tmp_path: Path) -> None:
    """What an older file left in its blocks has another salt."""
    _, data = small
    other = Segment.create(tmp_path / "00000002.seg", 2, "a", allocate_bytes=0)
    other.append(_group(9, 1, [b"{}"]))
    other.close()
    with (tmp_path / "00000002.seg").open("ab") as file:
        file.write(data[128:])
    assert [frame.commit_number for frame in _read(tmp_path / "00000002.seg")] == [9]


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A spool of eight records and an open call as a crash leaves it, in a segment of a few thousand bytes."""
    base = tmp_path_factory.mktemp("slot")
    (base / "root").mkdir()
    limits = Limits(reserve_bytes=0, recover_margin_bytes=0, allocate_bytes=1024)

    async def fill() -> list[dict[str, Any]]:
        async with Spool.open(base / "root", limits=limits, instance="a") as spool:
            recorder = SpoolRecorder(spool, Told())
            recorder.admit(call(route="/open"))
            recorder._old.update(recorder._young)
            recorder._young.clear()
            recorder._write_intents()
            for _ in range(8):
                await recorded(recorder, call())
            crashed_copy(base / "root", base / "copy")
            return rows(base / "root", "a")

    return base / "copy", asyncio.run(fill())


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_spool_goes_on_from_any_byte_and_counts_what_it_lost(
    slot: tuple[Path, list[dict[str, Any]]], tmp_path: Path, how: str
) -> None:
    """Every 37th byte here, which meets each field of some frame; all bytes are met by the tests of the scan above."""
    source, originals = slot
    size = segment_path(slot_dir(source, "a"), 1).stat().st_size
    ids = {row["id"] for row in originals}
    for offset in range(0, size, 37):
        root = shutil.copytree(source, tmp_path / f"{offset}")
        path = segment_path(slot_dir(root, "a"), 1)
        if how == "flip":
            flip(path, offset)
        else:
            os.truncate(path, offset)
        spool = Spool.open(root, limits=Limits(reserve_bytes=0, recover_margin_bytes=0), instance="a")
        spool.close()
        found = rows(root, "a")
        settled = [row for row in found if row["outcome"] == "unknown"]
        assert len(settled) == spool.settled <= 1
        assert [row for row in found if row["id"] in ids] == [row for row in originals if row in found], offset
        assert len({row["seq"] for row in found}) == len(found)
        with SpoolReader(root) as reader:
            totals = reader.totals("a")
            missing = sum(group.missing for group in reader.groups("a"))
        assert totals.holds, offset
        assert totals.recorded == len(originals) + len(settled) == len(found) + missing, offset
        shutil.rmtree(root)


# --- origins -----------------------------------------------------------------------------------------------


def _source(number: int) -> bytes:
    return number.to_bytes(SOURCE_BYTES, "big")


def _batch(spool: Spool, seq: int, origins: list[tuple[bytes, int]], done: Callable[[Batch], None]) -> Batch:
    line = b'{"id":"%d","instance":"%s","seq":%d}' % (seq, spool.instance.encode(), seq)
    spool.tally.admitted += 1
    return Batch(
        first_seq=seq, lines=[line], size_bytes=len(line), admitted=spool.tally.admitted, origins=origins, done=done
    )


async def _commit(spool: Spool, origins: list[list[tuple[bytes, int]]]) -> None:
    for seq, pairs in enumerate(origins, spool.next_seq):
        done: list[Batch] = []
        spool.submit(_batch(spool, seq, pairs, done.append))
        async with asyncio.timeout(20):
            while not done:
                await asyncio.sleep(0)


async def test_origins_are_known_over_a_kill(tmp_path: Path) -> None:
    """The last frame number of each source is what was committed with its records, also over changes of segment."""
    one, two = _source(1), _source(2)
    async with open_small(tmp_path / "0", instance="a") as spool:
        assert dict(spool.origins()) == {}
        await _commit(spool, [[(one, 5)], [(two, 1), (one, 6)], [(two, 2)]])
        crashed_copy(tmp_path / "0", tmp_path / "1")
    for root in (tmp_path / "0", tmp_path / "1"):
        async with open_small(root, instance="a") as spool:
            assert dict(spool.origins()) == {one: 6, two: 2}
            await _commit(spool, [[(one, 7 + at)] for at in range(200)])
        with SpoolReader(root) as reader:
            assert len(reader.segments("a")) > 3
            assert not any(report.problems for report in verify(reader))
        spool = open_small(root, instance="a")
        assert dict(spool.origins()) == {one: 206, two: 2}
        spool.close()


async def test_a_frame_is_known_exactly_when_its_records_are_there(tmp_path: Path) -> None:
    """Cut at any byte: origins and records of a commit come and go together."""
    root = tmp_path / "root"
    limits = Limits(reserve_bytes=0, recover_margin_bytes=0, allocate_bytes=1024)
    async with Spool.open(root, limits=limits, instance="a") as spool:
        await _commit(spool, [[(_source(1), at)] for at in range(1, 6)])
        crashed_copy(root, tmp_path / "copy")
    size = segment_path(slot_dir(tmp_path / "copy", "a"), 1).stat().st_size
    for cut in range(200, size, 61):
        one = shutil.copytree(tmp_path / "copy", tmp_path / f"{cut}")
        os.truncate(segment_path(slot_dir(one, "a"), 1), cut)
        spool = Spool.open(one, limits=limits, instance="a")
        spool.close()
        assert spool.origins().get(_source(1), 0) == len(rows(one, "a"))
        shutil.rmtree(one)


async def test_origins_are_bounded_and_the_most_recent_stay(tmp_path: Path) -> None:
    async with open_small(tmp_path, instance="a") as spool:
        await _commit(spool, [[(_source(at), at + 1)] for at in range(ORIGINS_KEPT + 50)])
        first = spool.next_seq + ORIGINS_KEPT + 50
        committed: list[Batch] = []
        spool.submit(_batch(spool, first, [(_source(50), 99)], committed.append))  # heard again: it stays longest
        await until(lambda: committed)
    spool = open_small(tmp_path, instance="a")
    known = spool.origins()
    spool.close()
    assert len(known) == ORIGINS_KEPT
    assert known == {_source(at): at + 1 for at in range(50, ORIGINS_KEPT + 50)} | {_source(50): 99}


# --- readers beside the writer -----------------------------------------------------------------------------


async def test_what_is_not_confirmed_is_not_read(tmp_path: Path) -> None:
    """A frame whose sync has not come back may be gone after a power cut: nobody may have billed it."""
    held = asyncio.Event()
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(Segment):
        def append(self, group: Group, *, sync: bool = True) -> None:
            super().append(group, sync=sync)
            if group.lines:  # written, and as far as anybody knows not synced
                loop.call_soon_threadsafe(held.set)
                asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)

    async with Spool.open(tmp_path, limits=SMALL, instance="a", create=Slow.create) as spool:
        committed: list[Batch] = []
        spool.submit(_batch(spool, 1, [], committed.append))
        await asyncio.wait_for(held.wait(), 20)
        with SpoolReader(tmp_path) as reader:
            assert len(_read(segment_path(slot_dir(tmp_path, "a"), 1))) == 2  # it stands there
            assert reader.read("a", 0) == []
            assert reader.last_seq("a") == reader.count("a", 0, 9) == reader.totals("a").recorded == 0
            go_on.set()
            await until(lambda: committed)
            assert [group.last_seq for group in reader.read("a", 0)] == [1]


async def test_what_waits_for_its_sync_does_not_hide_what_stands_before_it(tmp_path: Path) -> None:
    """A sync may take minutes on a failing disk, and the balance is asked for meanwhile."""
    held, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(Segment):
        def append(self, group: Group, *, sync: bool = True) -> None:
            super().append(group, sync=sync)
            if group.lines and group.first_seq == 2:
                loop.call_soon_threadsafe(held.set)
                asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)

    async with Spool.open(tmp_path, limits=SMALL, instance="a", create=Slow.create) as spool:
        committed: list[Batch] = []
        spool.submit(_batch(spool, 1, [], committed.append))
        await until(lambda: committed)
        spool.submit(_batch(spool, 2, [], committed.append))
        await asyncio.wait_for(held.wait(), 20)
        with SpoolReader(tmp_path) as reader:
            for _ in range(2):  # what is remembered of the first look is what the second begins with
                assert reader.last_seq("a") == reader.count("a", 0, 1) == 1
                assert [group.last_seq for group in reader.read("a", 0)] == [1]
            go_on.set()
            await until(lambda: len(committed) == 2)
            assert reader.count("a", 0, 2) == 2
            assert [group.last_seq for group in reader.read("a", 1)] == [2]


async def test_a_reader_follows_a_writer_through_changes_and_retiring(tmp_path: Path) -> None:
    """In another thread, in steps, while segments fill, are sealed and go: each record once, in order."""
    seen: list[int] = []
    stop = asyncio.Event()

    def read_on(reader: SpoolReader) -> int:
        groups = reader.read("a", seen[-1] if seen else 0, bytes_max=2000)
        assert not any(group.missing for group in groups)
        seen.extend(seq for group in groups for seq in range(group.first_seq, group.last_seq + 1) if group.lines)
        return len(groups)

    async def follow(spool: Spool) -> None:
        with SpoolReader(tmp_path) as reader:
            while await asyncio.to_thread(read_on, reader) or not stop.is_set():
                if seen:
                    spool.retire(seen[-1], retention_s=0, retention_bytes=0)
                await asyncio.sleep(0)

    async with open_small(tmp_path, instance="a") as spool, asyncio.TaskGroup() as tasks:
        tasks.create_task(follow(spool))
        recorder = SpoolRecorder(spool, Told())
        for _ in range(40):
            await asyncio.gather(*(recorded(recorder, call()) for _ in range(5)))
        await until(lambda: len(seen) == 200)
        stop.set()
    assert seen == list(range(1, 201))
    with SpoolReader(tmp_path) as reader:
        assert reader.segments("a")[0].number > 1
        assert not any(report.problems for report in verify(reader))


def test_a_retired_or_repaired_segment_that_is_open_reads_on(small: tuple[Path, bytes], tmp_path: Path) -> None:
    _, data = small
    path = slot_dir(tmp_path, "a") / "00000001.seg"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with SegmentFile(path) as held:
        before = [frame.data for frame in held.frames() if isinstance(frame, Frame)]
        done = repair(tmp_path, "a", path, 1, upto=2)
        assert done.records == 2
        assert [frame.data for frame in held.frames() if isinstance(frame, Frame)] == before
        path.unlink()
        assert [frame.data for frame in held.frames() if isinstance(frame, Frame)] == before
    assert (done.set_aside / path.name).read_bytes() == data


def test_a_frame_that_is_finished_while_it_is_looked_at_is_no_hole(tmp_path: Path) -> None:
    """The scan had read half of it when the writer went on: what follows proves that it is whole by now."""
    path = tmp_path / "00000001.seg"
    segment = Segment.create(path, 1, "a", allocate_bytes=4096)
    for group in GROUPS[:2]:
        segment.append(group)
    fd = os.open(path, os.O_RDONLY)
    reading = scan(fd)
    assert isinstance(next(reading), Frame)
    # What the scan has read ahead knows nothing of the third.
    segment.append(GROUPS[2])
    segment.append(GROUPS[3])
    assert [item.commit_number for item in reading if isinstance(item, Frame)] == [2, 3, 4]
    segment.close()
    os.close(fd)


def test_an_intent_is_told_from_other_json() -> None:
    assert intent_id(b'{"id":"x"}') == "x"
    with pytest.raises(ValueError, match="not an intent"):
        intent_id(b"[1]")
