"""`docs/spool-format.md` is enough: a reader that was written from that page alone reads what the spool wrote."""

from __future__ import annotations

import asyncio
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import orjson
import pytest
from support.spool_fixtures import Told, call, crashed_copy, open_small, recorded, rows
from support.spool_recorder import SpoolRecorder

PAGE = Path(__file__).parent.parent.parent / "docs" / "spool-format.md"

# --- the reader: nothing of ours is used in it -------------------------------------------------------------


def frame_at(data: bytes, at: int, salt: bytes) -> dict[str, Any] | None:
    if data[at : at + 4] != b"\xffFRM" or len(data) - at < 96:
        return None
    check, length = struct.unpack_from("<II", data, at + 4)
    if zlib.crc32(data[at + 8 : at + length]) != check or data[at + 12 : at + 20] != salt:
        return None
    commit, first, ns, admitted, total = struct.unpack_from("<QQQQQ", data, at + 20)
    flags, count, *sizes, origins = struct.unpack_from("<IIIIIII", data, at + 60)
    parts, start = [], at + 88
    for size in (*sizes, origins * 24):
        parts.append(data[start : start + size])
        start += size
    assert struct.unpack_from("<I4s", data, start) == (length, b"END\xff")
    records = [orjson.loads(line) for line in parts[0].splitlines()]
    assert len(records) == count
    return {
        "length": length,
        "commit": commit,
        "first": first,
        "ns": ns,
        "admitted": admitted,
        "recorded": total,
        "flags": flags,
        "records": records,
        "parts": parts,
    }


def frames_of(data: bytes) -> list[dict[str, Any]]:
    magic, version, _, salt, instance = struct.unpack_from("<8sI4xQ8s64s", data)
    assert magic == b"\x89MSPOOL\n"
    assert version == 1
    assert instance.rstrip(b"\0")
    assert struct.unpack_from("<I", data, 124)[0] == zlib.crc32(data[:124])
    found, at = [], 128
    while 0 <= at < len(data):
        frame = frame_at(data, at, salt)
        if frame is not None:
            found.append(frame)
        at = at + frame["length"] if frame is not None else data.find(b"\xffFRM", at + 1)
    return found


def records_of(slot: Path) -> list[dict[str, Any]]:
    segments = [frames_of(path.read_bytes()) for path in sorted(slot.glob("*.seg"))]
    segments = [frames for frames in segments if frames]
    found: list[dict[str, Any]] = []
    for number, frames in enumerate(segments):
        bound = segments[number + 1][0]["commit"] if number + 1 < len(segments) else 1 << 64
        found += [record for frame in frames if frame["commit"] < bound for record in frame["records"]]
    return found


# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [False, True])
async def test_a_stranger_reads_what_the_spool_wrote(tmp_path: Path, damaged: bool) -> None:
    async with open_small(tmp_path / "root", instance="a") as spool:
        recorder = SpoolRecorder(spool, Told())
        for _ in range(30):
            await asyncio.gather(*(recorded(recorder, call()) for _ in range(2)))
        await asyncio.to_thread(spool._writer.maintenance.quiet)
        crashed_copy(tmp_path / "root", tmp_path / "copy")
    for root in (tmp_path / "root", tmp_path / "copy"):  # sealed, and as a kill leaves it
        slot = root / "spool" / "a"
        if damaged:
            path = sorted(slot.glob("*.seg"))[1]
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0x10
            path.write_bytes(data)
        found = records_of(slot)
        assert found == rows(root, "a")
        assert 50 < len(found) < 60 if damaged else len(found) == 60
        last = [frame for path in sorted(slot.glob("*.seg")) for frame in frames_of(path.read_bytes())][-1]
        assert (last["admitted"], last["recorded"]) == (60, 60)


def test_the_example_of_the_page_is_true() -> None:
    lines = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} )+)", PAGE.read_text(), re.MULTILINE)
    data = bytes.fromhex("".join(lines))
    (frame,) = frames_of(data)
    assert frame["records"] == [{"seq": 1}]
    assert (frame["commit"], frame["first"], frame["admitted"], frame["recorded"]) == (2, 1, 2, 1)
    assert frame["ns"] == 1_700_000_000 * 10**9
    records, intents, lost, closes, origins = frame["parts"]
    assert (records, intents, lost, closes) == (b'{"seq":1}\n', b"", b'{"stopped":1}', b"x")
    assert origins == bytes(range(16)) + (5).to_bytes(8, "little")
