"""The operator's file: nothing that stands in it is cut off, nothing of ours stands twice, one process writes it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from support.backend_fixtures import record, record_id
from support.backend_trials import made

from sidecar.backends.file import ROTATE_BYTES_DEFAULT, FileBackend
from sidecar.model.delivery import Blocked, Delivered, Duplicate

HOLDER = """
import asyncio, sys
from pathlib import Path
from support.backend_fixtures import record
from sidecar.backends.file import FileBackend
from support.backend_trials import made

async def main() -> None:
    backend = made(FileBackend, path=sys.argv[1], data_dir=Path(sys.argv[2]))
    await backend.send(backend.encode([record(1)]).sealed[0])
    print("written", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


def make(base: Path, data: str = "data", rotate_bytes: int = ROTATE_BYTES_DEFAULT) -> FileBackend:
    (base / data).mkdir(exist_ok=True)
    backend: FileBackend = made(
        FileBackend, data_dir=base / data, path=str(base / "out.ndjson"), rotate_bytes=str(rotate_bytes)
    )
    return backend


async def put(backend: FileBackend, *numbers: int) -> list[object]:
    (sealed,) = backend.encode([record(number) for number in numbers]).sealed
    return list(await backend.send(sealed))


def ids(base: Path) -> list[str]:
    files = [*sorted(base.glob("out.2*.ndjson")), base / "out.ndjson"]
    return [orjson.loads(line)["id"] for path in files for line in path.read_bytes().splitlines()]


async def test_an_older_copy_of_the_data_directory_neither_cuts_nor_repeats(tmp_path: Path) -> None:
    first = make(tmp_path)
    await put(first, 0, 1)
    await first.aclose()
    shutil.copytree(tmp_path / "data", tmp_path / "older")
    later = make(tmp_path)
    for number in range(2, 8):
        await put(later, number)
    await later.aclose()
    before = (tmp_path / "out.ndjson").read_bytes()

    again = make(tmp_path, "older")
    assert await put(again, 2, 3, 4, 5, 20) == [Delivered()] * 5  # cut otherwise than the first time
    assert await put(again, 6, 7) == [Delivered()] * 2
    assert await put(again, 6, 7) == [Duplicate()] * 2
    await again.aclose()
    assert (tmp_path / "out.ndjson").read_bytes().startswith(before)
    assert ids(tmp_path) == [record_id(number) for number in (*range(8), 20)]


async def test_an_older_copy_knows_what_was_rotated_since(tmp_path: Path) -> None:
    first = make(tmp_path, rotate_bytes=4096)
    await put(first, 0)
    await first.aclose()
    shutil.copytree(tmp_path / "data", tmp_path / "older")
    later = make(tmp_path, rotate_bytes=4096)
    for number in range(1, 20):
        await put(later, number)
    await later.aclose()
    assert len(list(tmp_path.glob("out.2*.ndjson"))) > 1
    again = make(tmp_path, "older", rotate_bytes=4096)
    for number in range(1, 21):
        assert await put(again, number) == [Delivered()]
    await again.aclose()
    assert sorted(ids(tmp_path)) == sorted(record_id(number) for number in range(21))


@pytest.mark.parametrize("inode", ["same", "other"])
async def test_lines_of_others_stay_and_we_go_on_behind_them(tmp_path: Path, inode: str) -> None:
    backend = make(tmp_path)
    await put(backend, 1)
    with (tmp_path / "out.ndjson").open("ab") as file:
        file.write(b'{"id": "somebody"}\nno JSON at all')
    if inode == "other":
        shutil.copy(tmp_path / "out.ndjson", tmp_path / "copy")
        os.replace(tmp_path / "copy", tmp_path / "out.ndjson")
    before = (tmp_path / "out.ndjson").read_bytes()
    await put(backend, 2)
    await backend.aclose()
    assert (tmp_path / "out.ndjson").read_bytes() == before + b"\n" + record(2).json + b"\n"


async def test_a_line_of_ours_that_was_cut_short_is_no_half_line_for_good(tmp_path: Path) -> None:
    for shown in (5, 100):
        backend = make(tmp_path)
        await put(backend, shown)
        await backend.aclose()
        with (tmp_path / "out.ndjson").open("ab") as file:
            file.write(record(shown + 1).json[:300])
        again = make(tmp_path)
        await put(again, shown + 2)  # another comes first
        await put(again, shown + 1)
        await again.aclose()
    assert ids(tmp_path) == [record_id(number) for number in (5, 7, 6, 100, 102, 101)]


async def test_zeros_of_a_power_cut_are_written_over(tmp_path: Path) -> None:
    backend = make(tmp_path)
    await put(backend, 1)
    await backend.aclose()
    with (tmp_path / "out.ndjson").open("ab") as file:
        file.write(bytes(9000))
    again = make(tmp_path)
    await put(again, 2)
    await again.aclose()
    assert (tmp_path / "out.ndjson").read_bytes() == record(1).json + b"\n" + record(2).json + b"\n"


async def test_a_lost_memory_repeats_nothing(tmp_path: Path) -> None:
    backend = make(tmp_path)
    await put(backend, 1, 2, 3)
    await backend.aclose()
    for path in (tmp_path / "data").iterdir():
        path.unlink()
    again = make(tmp_path)
    await put(again, 2, 3, 4)
    await again.aclose()
    assert ids(tmp_path) == [record_id(number) for number in (1, 2, 3, 4)]


async def test_a_damaged_memory_says_what_to_do(tmp_path: Path) -> None:
    backend = make(tmp_path)
    await put(backend, 1)
    await backend.aclose()
    (tmp_path / "data" / "file.db").write_bytes(b"no database" * 900)
    again = make(tmp_path)
    (verdict,) = await put(again, 2)
    await again.aclose()
    assert isinstance(verdict, Blocked)
    assert "file.db is damaged: move it away" in verdict.reason


async def test_a_second_writer_is_told_who_has_the_file_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    tests = Path(__file__).parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out.ndjson"), str(tmp_path / "theirs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": f"{tests}:{tests.parent}"},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        backend = make(tmp_path)
        (verdict,) = await put(backend, 2)
        assert isinstance(verdict, Blocked)
        assert "out.ndjson is written by another" in verdict.reason
        if sys.platform == "linux":
            assert f"(pid {child.pid})" in verdict.reason
    finally:
        child.communicate()
    assert await put(backend, 2) == [Delivered()]
    await backend.aclose()
    assert ids(tmp_path) == [record_id(1), record_id(2)]


async def test_new_files_are_the_owners_alone_and_a_file_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        backend = make(tmp_path)
        await put(backend, 1)
        mine = [tmp_path / "out.ndjson", *(tmp_path / "data").iterdir()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in mine} == {0o600}
        (tmp_path / "out.ndjson").chmod(0o644)
        await put(backend, 2)
        assert stat.S_IMODE((tmp_path / "out.ndjson").stat().st_mode) == 0o644
        await backend.aclose()
    finally:
        os.umask(old)
