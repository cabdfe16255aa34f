"""Damaged, missing, foreign and newer files: the service starts, nothing readable is lost, nothing is given twice."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spool_fixtures import SMALL, Told, call, crashed_copy, flip, open_small, recorded, rows, until
from support.spool_recorder import SpoolRecorder

from sidecar.spool import Limits, Spool, SpoolError, SpoolLocked, SpoolReader, State, verify
from sidecar.spool.files import segment_numbers, segment_path, slot_dir
from sidecar.spool.recovery import NUMBERS_SKIPPED
from sidecar.spool.repair import repair
from sidecar.spool.segment import FORMAT, HEADER_BYTES, CommitMark, Frame, Group, SegmentFile, write_all

BIG = Limits(reserve_bytes=0, recover_margin_bytes=0, allocate_bytes=64 << 10)  # one segment for everything


async def _fill(root: Path, calls: int, limits: Limits = SMALL, *, crash_to: Path | None = None) -> str:
    """A slot with `calls` records, one a group; closed cleanly, or as a crash leaves it in `crash_to`."""
    async with Spool.open(root, limits=limits, instance="a") as spool:
        recorder = SpoolRecorder(spool, Told())
        for _ in range(calls):
            await recorded(recorder, call())
        if crash_to is not None:
            await asyncio.to_thread(spool._writer.maintenance.quiet)
            crashed_copy(root, crash_to)
    return "a"


async def _goes_on(root: Path, limits: Limits = SMALL) -> Spool:
    """Open it and record one more call; the spool, closed again."""
    async with Spool.open(root, limits=limits, instance="a") as spool:
        before = {row["seq"] for row in rows(root, "a")}
        recorder = SpoolRecorder(spool, Told())
        await recorded(recorder, call(route="/after"))
        last = rows(root, "a")[-1]
        assert last["route"] == "/after"
        assert last["seq"] not in before
        assert last["seq"] == spool.snapshot().last_seq
    return spool


def _segment(root: Path, number: int = 1) -> Path:
    return segment_path(slot_dir(root, "a"), number)


def _frames(path: Path) -> list[Frame]:
    with SegmentFile(path) as file:
        return [item for item in file.frames() if isinstance(item, Frame)]


def _end(path: Path) -> int:
    """Where its last frame ends: behind it is room that was taken ahead."""
    last = _frames(path)[-1]
    return last.offset + last.length


def _without_mark(root: Path) -> None:
    """As after a power cut: the mark is never synced."""
    (slot_dir(root, "a") / CommitMark.NAME).unlink()


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A slot of 40 records, one a group, in one segment that was never sealed."""
    base = tmp_path_factory.mktemp("crashed")
    (base / "root").mkdir()
    asyncio.run(_fill(base / "root", 40, BIG, crash_to=base / "copy"))
    return base / "copy", rows(base / "root", "a")


@settings(max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), mask=st.sampled_from([1, 0x10, 0x80]), marked=st.booleans())
def test_a_flipped_bit_costs_at_most_the_group_it_is_in(
    crashed: tuple[Path, list[dict[str, Any]]], where: float, mask: int, marked: bool
) -> None:
    source, originals = crashed
    base = Path(tempfile.mkdtemp(prefix="spool-flip-"))
    try:
        root = shutil.copytree(source, base / "root")
        victim = _segment(root)
        size = victim.stat().st_size
        flip(victim, int(where * _end(victim)), mask)
        if not marked:
            _without_mark(root)
        spool = asyncio.run(_goes_on(root, BIG))
        found = rows(root, "a")[:-1]
        assert all(row in originals for row in found)
        assert len(found) >= len(originals) - 1
        if len(found) < len(originals):
            assert spool.set_aside
            kept = {path.name: path.stat().st_size for place in spool.set_aside for path in place.iterdir()}
            assert kept[victim.name] == size
    finally:
        shutil.rmtree(base)


async def test_a_missing_end_is_noticed_and_no_number_is_given_twice(tmp_path: Path) -> None:
    await _fill(tmp_path / "root", 30, BIG, crash_to=tmp_path / "copy")
    root = tmp_path / "copy"
    with _segment(root).open("r+b") as file:
        file.truncate(HEADER_BYTES)
    spool = await _goes_on(root)
    assert len(spool.set_aside) == 1
    assert rows(root, "a")[-1]["seq"] > NUMBERS_SKIPPED


async def test_a_missing_file_is_noticed_and_no_number_is_given_twice(tmp_path: Path) -> None:
    await _fill(tmp_path / "root", 30, BIG, crash_to=tmp_path / "copy")
    root = tmp_path / "copy"
    _segment(root).unlink()
    with SpoolReader(root) as reader:
        (report,) = verify(reader)
    assert report.problems == ("the segments end at 0 records, and 30 more were on disk",)
    spool = await _goes_on(root)
    assert spool.snapshot().totals.holds
    assert spool.snapshot().totals.recorded == 31  # what is missing was recorded
    assert rows(root, "a")[-1]["seq"] > NUMBERS_SKIPPED


@pytest.mark.parametrize("had", [0, 10, 29, 30])
async def test_what_was_delivered_before_it_was_lost_is_not_missing(tmp_path: Path, had: int) -> None:
    """Also behind the numbers that are left out then."""
    await _fill(tmp_path / "root", 30, BIG, crash_to=tmp_path / "copy")
    root = tmp_path / "copy"
    _segment(root).unlink()
    await _goes_on(root)
    with SpoolReader(root) as reader:
        assert sum(group.missing for group in reader.groups("a", had)) == 30 - had
        assert reader.count("a", had, reader.last_seq("a")) == 31 - had
        assert reader.count("a", 0, had) == had


@pytest.mark.parametrize("kept_bytes", [0, 20, 60])
async def test_a_first_commit_that_was_cut_short_is_no_damage(tmp_path: Path, kept_bytes: int) -> None:
    """The segment is made, and some of its first frame is there: nothing in it was ever acknowledged."""
    await _fill(tmp_path / "root", 0, BIG, crash_to=tmp_path / "copy")
    root = tmp_path / "copy"
    path = _segment(root)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(HEADER_BYTES + kept_bytes)
        file.truncate(size)
    _without_mark(root)
    spool = await _goes_on(root)
    assert not spool.set_aside
    assert [row["seq"] for row in rows(root, "a")] == [1]


async def test_a_segment_of_zeros_is_damage(tmp_path: Path) -> None:
    await _fill(tmp_path / "root", 30, BIG, crash_to=tmp_path / "copy")
    root = tmp_path / "copy"
    path = _segment(root)
    path.write_bytes(bytes(path.stat().st_size))
    spool = await _goes_on(root)
    assert len(spool.set_aside) == 1
    assert rows(root, "a")[-1]["seq"] > NUMBERS_SKIPPED


async def test_numbers_that_only_delivery_remembers_are_reported_missing(tmp_path: Path) -> None:
    await _fill(tmp_path / "root", 30, BIG, crash_to=tmp_path / "copy")
    root = tmp_path / "copy"
    _segment(root).unlink()
    _without_mark(root)
    async with Spool.open(root, limits=SMALL, instance="a", remembered_seq=lambda instance: 30) as spool:
        totals = spool.snapshot().totals
        assert (totals.admitted, totals.recorded) == (30, 30)
        assert totals.holds
        await recorded(SpoolRecorder(spool, Told()), call())
    with SpoolReader(root) as reader:
        groups = list(reader.groups("a"))
        assert [group.missing for group in groups] == [30, 0]
        assert groups[0].lines == ()
        assert groups[1].first_seq > groups[0].last_seq > 30
        assert reader.read("a", groups[0].last_seq)[0] == groups[1]  # a hole is told once


@pytest.mark.parametrize("cut", [1, 100, 600, 0])  # bytes of the last frame; 0: all of them
@pytest.mark.parametrize("garbage", [0, 50, 5000])
@pytest.mark.parametrize("room", [0, 8192])  # taken ahead
async def test_a_torn_end_costs_only_what_was_torn_off(tmp_path: Path, cut: int, garbage: int, room: int) -> None:
    await _fill(tmp_path / "root", 30, BIG, crash_to=tmp_path / "copy")
    root = tmp_path / "copy"
    path = _segment(root)
    last = _frames(path)[-1]
    end = last.offset + last.length - (cut or last.length)
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(0, 2)
        file.write(b"\xff" * garbage)  # what a power cut may leave behind it
        file.truncate(end + garbage + room)
    _without_mark(root)
    spool = await _goes_on(root)
    found = rows(root, "a")
    assert [row["seq"] for row in found[:-1]] in ([*range(1, 30)], [*range(1, 31)])  # the torn one may be whole
    assert found[-1]["route"] == "/after"
    if not garbage:
        assert not spool.set_aside


async def test_a_torn_end_that_was_confirmed_is_damage(tmp_path: Path) -> None:
    """The mark knows better: that commit was on disk."""
    await _fill(tmp_path / "root", 30, BIG, crash_to=tmp_path / "copy")
    root = tmp_path / "copy"
    path = _segment(root)
    with path.open("r+b") as file:
        file.truncate(_end(path) - 100)
    spool = await _goes_on(root)
    assert len(spool.set_aside) == 1
    assert spool.snapshot().totals.recorded == 31
    assert spool.snapshot().totals.holds
    with SpoolReader(root) as reader:
        assert [group.missing for group in reader.groups("a") if not group.lines] == [1]


@pytest.mark.parametrize("number", [1, 2])
async def test_an_old_segment_that_is_none_any_more_is_set_aside(tmp_path: Path, number: int) -> None:
    await _fill(tmp_path, 60)
    assert len(segment_numbers(slot_dir(tmp_path, "a"))) > 3
    with SpoolReader(tmp_path) as reader:
        info = reader.segments("a")[number - 1]
        inside = reader.count("a", info.first_seq - 1, info.bound_seq - 1)
    info.path.write_bytes(b"not a segment" * 400)
    spool = await _goes_on(tmp_path)
    assert (spool.set_aside[0] / info.path.name).read_bytes() == b"not a segment" * 400
    with SpoolReader(tmp_path) as reader:
        groups = list(reader.groups("a"))
        assert sum(group.missing for group in groups) == inside
        assert sum(len(group.lines) for group in groups) == 61 - inside
        assert reader.totals("a").holds
        assert reader.totals("a").recorded == reader.count("a", 0, 61) == 61


async def test_broken_frames_in_a_sealed_segment_are_read_around(tmp_path: Path) -> None:
    await _fill(tmp_path, 60)
    with SpoolReader(tmp_path) as reader:
        info = reader.segments("a")[1]
    for frame in _frames(info.path)[1:-1:2]:
        flip(info.path, frame.offset + 40, 0xFF)
    with SpoolReader(tmp_path) as reader:
        groups = list(reader.groups("a"))
        lines = sum(len(group.lines) for group in groups)
        missing = sum(group.missing for group in groups)
        assert lines + missing == 60
        assert reader.count("a", 0, 60) == 60  # pending is what delivery will yet meet, holes included
        left = 60
        for group in groups:
            assert reader.count("a", group.first_seq - 1, 60) == left
            left -= len(group.lines) + group.missing
        assert 0 < missing < 60
        assert [g.first_seq for g in groups] == sorted(g.first_seq for g in groups)
        (report,) = verify(reader)
        assert report.problems
        assert report.records + report.missing == 60


async def test_a_flipped_byte_in_a_record_is_missing_and_never_handed_out(tmp_path: Path) -> None:
    await _fill(tmp_path, 60)
    with SpoolReader(tmp_path) as reader:
        info = reader.segments("a")[1]
        before = len(list(reader.groups("a")))
    data = info.path.read_bytes()
    flip(info.path, data.index(b"api.example.com"))
    with SpoolReader(tmp_path) as reader:
        groups = list(reader.groups("a"))
        assert len(groups) == before
        (hole,) = [group for group in groups if group.missing]
        assert (hole.missing, hole.lines, hole.first_seq) == (1, (), hole.last_seq)
        assert not any(b"aqi" in line or b"qpi" in line for group in groups for line in group.lines)


def _rewrite(path: Path, change: Callable[[Group], None]) -> None:
    """The same segment with other figures, its checksums right."""
    frames = _frames(path)
    with path.open("r+b") as file:
        for frame in frames:
            group = frame.group()
            change(group)
            write_all(file.fileno(), group.encode(frame.salt), frame.offset)


async def test_a_miscounted_row_is_found(tmp_path: Path) -> None:
    await _fill(tmp_path, 5, BIG)

    def one_more(group: Group) -> None:
        if group.last_seq >= 5:
            group.recorded += 1

    _rewrite(_segment(tmp_path), one_more)
    with SpoolReader(tmp_path) as reader:
        assert not reader.totals("a").holds
        (report,) = verify(reader)
        assert report.problems


async def test_a_salvaged_group_says_so(tmp_path: Path) -> None:
    await _fill(tmp_path / "root", 30, BIG, crash_to=tmp_path / "copy")
    root = tmp_path / "copy"
    path = _segment(root)
    flip(path, _end(path) // 2)
    spool = await _goes_on(root)
    assert len(spool.set_aside) == 1
    with SpoolReader(root) as reader:
        groups = list(reader.groups("a"))
    told = [group for group in groups if group.lines]
    assert [group.salvaged for group in told[:-1]] == [True] * (len(told) - 1)
    assert not told[-1].salvaged


@pytest.mark.parametrize("step", ["half a copy", "the copy", "the second name"])
async def test_a_crash_inside_a_repair_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """At each step the segment is what it was, or repaired."""
    await _fill(tmp_path, 60)
    path = _segment(tmp_path, 2)
    flip(path, _frames(path)[1].offset + 30)
    readable = rows(tmp_path, "a")

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if step == "half a copy":
            path.with_name(path.name + ".draft").write_bytes(b"half a copy")
        elif step == "the copy":
            patch.setattr("sidecar.spool.repair._keep", killed)
        else:
            patch.setattr(Path, "rename", killed)
        if step != "half a copy":
            with pytest.raises(Killed):
                repair(tmp_path, "a", path, 2)
    assert rows(tmp_path, "a") == readable
    flip(path, 3)  # and then its beginning is hit, so that the next opening looks at it
    spool = await _goes_on(tmp_path)
    assert len(spool.set_aside) == 1
    assert rows(tmp_path, "a")[:-1] == readable
    assert not list(path.parent.glob("*.draft"))


def _set_version(path: Path, version: int) -> None:
    data = bytearray(path.read_bytes())
    data[8:12] = version.to_bytes(4, "little")
    data[124:128] = zlib.crc32(data[:124]).to_bytes(4, "little")
    path.write_bytes(data)


async def test_a_newer_file_is_refused_by_name(tmp_path: Path) -> None:
    await _fill(tmp_path, 60)
    path = _segment(tmp_path, 2)
    _set_version(path, FORMAT + 1)
    with pytest.raises(SpoolError, match=r"00000002\.seg has format 2 .* newer release"):
        open_small(tmp_path, instance="a")
    _set_version(path, FORMAT)
    open_small(tmp_path, instance="a").close()  # the lock was let go of


async def test_a_directory_of_an_older_release_is_refused_by_name(tmp_path: Path) -> None:
    slot = slot_dir(tmp_path, "a")
    slot.mkdir(parents=True)
    (slot / "00000001.db").write_bytes(b"SQLite format 3\0" + bytes(4080))
    refusal = r"00000001\.db is of an older release.*SIDECAR_DATA_DIR"
    with pytest.raises(SpoolError, match=refusal):
        open_small(tmp_path)
    with SpoolReader(tmp_path) as reader, pytest.raises(SpoolError, match=refusal):
        reader.read("a", 0)
    assert [path.name for path in slot.iterdir() if path.suffix != ""] == ["00000001.db"]


def test_a_slot_in_use_names_who_has_it_and_unnamed_takes_another(tmp_path: Path) -> None:
    first = open_small(tmp_path)
    with pytest.raises(SpoolLocked, match=r"in use by process \d+: stop it") as caught:
        open_small(tmp_path, instance=first.instance)
    assert caught.value.pid is not None
    second = open_small(tmp_path)
    assert second.instance != first.instance
    first.close()
    again = open_small(tmp_path)
    assert again.instance == first.instance  # a free slot is continued before a new one is made
    again.close()
    second.close()


def test_a_place_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file where a directory should be")
    with pytest.raises(SpoolError, match="spool"):
        open_small(tmp_path)
    with pytest.raises(SpoolError, match="cannot name a spool"):
        open_small(tmp_path / "other", instance="../x")


async def test_a_segment_whose_making_was_interrupted_is_removed(tmp_path: Path) -> None:
    await _fill(tmp_path, 5)
    slot = slot_dir(tmp_path, "a")
    header = _segment(tmp_path).read_bytes()[:HEADER_BYTES]
    for leftover in (b"", header[:50], bytes(8192), header + bytes(8192)):
        path = segment_path(slot, segment_numbers(slot)[-1] + 1)
        path.write_bytes(leftover)
        spool = await _goes_on(tmp_path)
        assert not spool.set_aside
        assert not path.exists()


async def test_the_totals_go_on_when_every_segment_but_the_newest_is_gone(tmp_path: Path) -> None:
    await _fill(tmp_path, 60)
    async with open_small(tmp_path, instance="a") as spool:
        assert spool.retire(1 << 40, retention_s=0, retention_bytes=0) > 2
        assert rows(tmp_path, "a") == []
        assert spool.snapshot().totals.recorded == 60
        await recorded(SpoolRecorder(spool, Told()), call())
        await until(lambda: spool.snapshot().last_seq == 61)
    with SpoolReader(tmp_path) as reader:
        (report,) = verify(reader)
        assert not report.problems, report.problems
        assert (report.before, report.records) == (60, 1)
        assert spool.health().state is State.OK


@pytest.mark.parametrize("left", ["sealed", "unsealed"])
@pytest.mark.parametrize("with_what", [bytes(4096), b"\xff" * 4096])
async def test_a_bad_page_anywhere_in_the_newest_file_still_starts(tmp_path: Path, left: str, with_what: bytes) -> None:
    """Header, first frame, last: what can be read is kept, and the numbers go on behind it."""
    await _fill(tmp_path / "root", 120, BIG, crash_to=tmp_path / "copy")
    source = tmp_path / ("root" if left == "sealed" else "copy")
    size = _segment(source).stat().st_size
    for page in range(size // 4096):
        root = shutil.copytree(source, tmp_path / f"{page}")
        with _segment(root).open("r+b") as file:
            file.seek(page * 4096)
            file.write(with_what)
        spool = await _goes_on(root, BIG)
        assert spool.snapshot().totals.holds
        assert spool.snapshot().totals.recorded == 121
        assert len(rows(root, "a")) > 110
        shutil.rmtree(root)
