"""The file backend killed at random moments: every record is in its files once, whole, and in no half line."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson
from support.backend_fixtures import record, record_id
from support.backend_trials import made

from sidecar.backends.file import FileBackend

BATCHES = 400
ROUNDS = 12

# Sends what has no verdict yet, again and again from the oldest on, as delivery does after a restart.
SENDER = """
import asyncio, sys
from pathlib import Path
from support.backend_fixtures import record
from sidecar.backends.file import FileBackend
from support.backend_trials import made

async def main(data_dir: str, first: int) -> None:
    backend = made(FileBackend, path=data_dir + "/out.ndjson", data_dir=Path(data_dir), rotate_bytes="20000")
    print("ready", flush=True)
    for number in range(first, 400):
        (sealed,) = backend.encode([record(2 * number), record(2 * number + 1)]).sealed
        print(number, *(type(v).__name__ for v in await backend.send(sealed)), flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def test_a_killed_writer_leaves_each_record_once(tmp_path: Path) -> None:
    tests = Path(__file__).parent.parent
    chance = random.Random(20261121)
    settled = 0
    for _ in range(ROUNDS):
        child = subprocess.Popen(
            [sys.executable, "-c", SENDER, str(tmp_path), str(settled)],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": f"{tests}:{tests.parent}"},
        )
        assert child.stdout is not None
        for _ in range(chance.randint(1, 40)):
            child.stdout.readline()
        child.kill()
        said = [line.split() for line in child.stdout.read().splitlines() if line.startswith(tuple("0123456789"))]
        child.stdout.close()
        child.wait()
        done = [int(line[0]) for line in said if len(line) == 3]
        # The last verdict is forgotten, as when the kill comes before delivery has stored it.
        settled = max(settled, max(done, default=settled) - 1)
    finish(tmp_path)
    files = sorted(tmp_path.glob("out*.ndjson"))
    assert len(files) > 1, "the file was rotated on the way"
    assert all(path.read_bytes().endswith(b"\n") for path in files)
    ids = Counter(orjson.loads(line)["id"] for path in files for line in path.read_bytes().splitlines())
    assert ids == Counter(record_id(number) for number in range(2 * BATCHES))


def finish(data_dir: Path) -> None:
    """Everything once more, from the beginning: what is there must be known."""
    subprocess.run(
        [sys.executable, "-c", SENDER, str(data_dir), "0"],
        check=True,
        capture_output=True,
        env={"PYTHONPATH": f"{Path(__file__).parent.parent}:{Path(__file__).parent.parent.parent}"},
    )


async def test_a_batch_is_cut_off_when_its_key_was_not_committed(tmp_path: Path) -> None:
    backend = made(FileBackend, path=str(tmp_path / "out.ndjson"), data_dir=tmp_path)
    one, two = (backend.encode([record(number)]).sealed[0] for number in (1, 2))
    await backend.send(one)
    await backend.aclose()
    with (tmp_path / "out.ndjson").open("ab") as file:
        file.write(two.body[:50])
    again = made(FileBackend, path=str(tmp_path / "out.ndjson"), data_dir=tmp_path)
    await again.send(two)
    await again.aclose()
    assert (tmp_path / "out.ndjson").read_bytes() == one.body + two.body
