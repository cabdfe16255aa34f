"""The power goes: nothing that was not synced can be relied on, and still every acknowledged record is there, once.

A child runs under a library that lists what it does to its files (`power_cut.c`). The list is then cut at many
places, and from each of them a disk is made that forgot a share of what was never synced, sector by sector; the
harshest forgets all of it. The spool opens on every one of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.mishaps import Watching
from support.oracle import SETTINGS, Oracle, judge
from support.power_cut import Disk, Step, acknowledge, build, preload, read_steps, taken_over
from support.spool_fixtures import SMALL, rows
from support.tiny import tiny_upstream
from support.whole import Whole

from sidecar.spool import Spool, SpoolReader, verify

TESTS = Path(__file__).parent.parent
CUTS = int(os.environ.get("CRASH_ROUNDS", "25")) * 3
CHILD = """
import asyncio, os, sys
from pathlib import Path
from support.spool_fixtures import SMALL, Told, call
from support.spool_recorder import SpoolRecorder
from sidecar.spool import Spool

async def main():
    log = os.open(os.environ["POWER_CUT_LOG"], os.O_WRONLY | os.O_APPEND)
    async with Spool.open(Path(sys.argv[1]), limits=SMALL, instance="a") as spool:
        recorder = SpoolRecorder(spool, Told(), commit_wait_s=30)
        for number in range(150):
            url = "https://api.example.com/" + "x" * (number * 37 % 2000)
            exchanges = [call(url=url) for _ in range(number % 3 + 1)]
            waiting = [asyncio.get_running_loop().create_future() for _ in exchanges]
            for exchange, future in zip(exchanges, waiting):
                recorder.admit(exchange)
                recorder.complete(exchange, future.set_result)
            assert all(await asyncio.gather(*waiting))
            for exchange in exchanges:
                os.write(log, f"a\\t{exchange.id}\\t0\\t0\\n".encode())

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux":
        pytest.skip("needs Linux, for a library that stands before the C library")
    library = build(tmp_path_factory.mktemp("library"))
    if library is None:
        pytest.skip("needs a C compiler (cc or gcc), for a library that lists writes and syncs")
    return library


class Listed:
    """What happened to the files below `root`. No dataclass: Hypothesis would print megabytes of it."""

    def __init__(self, root: str, steps: list[Step]) -> None:
        self.root, self.steps = root, steps


@pytest.fixture(scope="module")
def listed(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Listed:
    """What a spool does to its files over some 300 records, several segments and a clean end."""
    base = tmp_path_factory.mktemp("watched")
    root = base / "root"
    root.mkdir()
    subprocess.run(
        [sys.executable, "-c", CHILD, str(root)],
        check=True,
        env=os.environ | preload(library, root, base / "log") | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )
    found = read_steps(base / "log")
    assert sum(step.letter == "a" for step in found) == 300
    assert sum(step.letter == "s" for step in found) > 150
    return Listed(str(root), found)


@settings(max_examples=CUTS, deadline=None)
@given(where=st.floats(0, 1), keep=st.sampled_from([0.0, 0.0, 0.5, 0.9, 1.0]), seed=st.integers(0, 1 << 32))
@example(where=1.0, keep=0.0, seed=0)
@example(where=0.0, keep=0.0, seed=0)
@example(where=1.0, keep=0.5, seed=0)  # around the removal of a segment that was made ahead
@example(where=0.57421875, keep=0.5, seed=1)  # a last transaction that is there in parts
def test_what_was_acknowledged_is_there_after_a_cut(listed: Listed, where: float, keep: float, seed: int) -> None:
    happened = listed.steps[: round(where * len(listed.steps))]
    disk = Disk(listed.root)
    for step in happened:
        disk.play(step)
    acknowledged = [step.path for step in happened if step.letter == "a"]
    base = Path(tempfile.mkdtemp(prefix="power-cut-"))
    try:
        disk.after_cut(base / "root", random.Random(seed), keep)
        Spool.open(base / "root", limits=SMALL, instance="a").close()
        found = Counter(row["id"] for row in rows(base / "root", "a"))
        gone = [one for one in acknowledged if found[one] != 1]
        assert not gone, f"{len(gone)} of {len(acknowledged)} acknowledged records are not there once"
        assert max(found.values(), default=1) == 1
        with SpoolReader(base / "root") as reader:
            assert reader.totals("a").holds
            # A frame that is there in parts lacks sectors, so it is told from one that was hit.
            assert not (base / "root" / "set-aside").exists(), "a cut is no damage"
            assert not any(report.problems for report in verify(reader)), verify(reader)
    finally:
        shutil.rmtree(base)


def test_the_model_would_notice_a_missing_sync(listed: Listed) -> None:
    """A cut where the syncs of the segments were left out for a while: records are gone, or this could not fail."""
    syncs = 0
    disk = Disk(listed.root)
    acknowledged = set()
    for step in listed.steps:
        if step.letter == "s" and step.path.endswith(".seg"):
            syncs += 1
            if syncs > 40:
                continue
        disk.play(step)
        if step.letter == "a":
            acknowledged.add(step.path)
        if syncs > 60:
            break
    base = Path(tempfile.mkdtemp(prefix="power-cut-"))
    try:
        disk.after_cut(base / "root", random.Random(1), 0.0)
        Spool.open(base / "root", limits=SMALL, instance="a").close()
        assert acknowledged - {row["id"] for row in rows(base / "root", "a")}
    finally:
        shutil.rmtree(base)


class Noting(Oracle):
    """Adds each obligation to the list of what happened to the files, so that both have one order."""

    log: Path

    async def _call(self, session: aiohttp.ClientSession, call: str, kind: str, *, in_target: bool = False) -> bool:
        owed = await super()._call(session, call, kind, in_target=in_target)
        if owed:
            acknowledge(self.log, call)
        return owed


@pytest.mark.timeout(120)
@pytest.mark.parametrize("keep", [0.0, pytest.param(0.5, marks=pytest.mark.long)])
async def test_the_whole_after_power_cuts(tmp_path: Path, library: Path, keep: float) -> None:
    """Killed, and everything forgotten that was never synced, several times over: recorded once, delivered once."""
    chance = random.Random(20261121)
    receiver = Watching()
    url = await receiver.start()
    owed: dict[str, str] = {}
    whole: Whole | None = None
    try:
        async with tiny_upstream() as upstream:
            whole = Whole(
                tmp_path / "data0",
                upstream,
                **SETTINGS,
                SIDECAR_BACKENDS="ledger,webhook",
                SIDECAR_WEBHOOK_URL=f"{url}/webhook",
            )
            whole.data_dir.mkdir()
            for number in range(3):
                log, root = tmp_path / f"log{number}", whole.data_dir
                log.touch()
                disk = Disk(str(root))
                taken_over(disk, root)
                whole.env |= preload(library, root, log) | {"SIDECAR_DATA_DIR": str(root)}
                await whole.start()
                oracle = Noting(lambda: whole.proxy_url, seed=number, clients=4, pause_s=0.01)
                oracle.log = log
                load = asyncio.create_task(oracle.run())
                async with asyncio.timeout(30):
                    while len(oracle.owed) < chance.randrange(30, 90):
                        await asyncio.sleep(0.005)
                await whole.kill()
                oracle.stop()
                await load
                owed |= oracle.owed
                for step in read_steps(log):
                    disk.play(step)
                whole.data_dir = tmp_path / f"data{number + 1}"
                disk.after_cut(whole.data_dir, chance, keep)
                # It stands for the same disk after the cut: that its files have other inodes is the model's doing.
                (whole.data_dir / "place").unlink(missing_ok=True)
            whole.env = {k: v for k, v in whole.env.items() if k != "LD_PRELOAD"}
            whole.env["SIDECAR_DATA_DIR"] = str(whole.data_dir)
            async with whole:
                balance = await whole.settled()
                records = await whole.records()
                assert await whole.stop() == 0
    finally:
        if whole is not None and whole.process is not None:
            await whole.kill()
        await receiver.aclose()
    judge(owed, records)
    assert balance["holds"], balance
    assert balance["recorded"] == len(records)
    taken = Counter(record["id"] for record in receiver.billed("webhook"))
    assert taken == Counter(record["id"] for record in records)
    assert all(len(digests) == 1 for digests in receiver.digests.values())
