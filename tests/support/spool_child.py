"""A process with a real spool, to be killed: it says on its standard output what it promised.

`A <id>` a call was let in, `I <id>` its intent must be on disk, `R <id>` its answer was let go of (its record is on
disk), `B <id> <seconds>` the same in `buffered` mode, with the loop's time of its end.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

from support.spool_fixtures import SMALL, Told, call
from support.spool_recorder import SpoolRecorder

from sidecar.spool import Spool, SpoolReader


def say(kind: str, id_: str) -> None:
    os.write(1, f"{kind} {id_}\n".encode())  # one write, so that a kill tears none


async def one_call(recorder: SpoolRecorder, chance: random.Random) -> None:
    exchange = call(url="https://api.example.com/" + "x" * chance.randrange(2000))
    assert recorder.admit(exchange)
    say("A", exchange.id)
    if chance.random() < 0.2:
        await asyncio.sleep(chance.random() * 0.06)  # open long enough for an intent, mostly
    released = asyncio.get_running_loop().create_future()

    def release(granted: bool) -> None:
        say("R", exchange.id)
        released.set_result(granted)

    ended_s = asyncio.get_running_loop().time()
    if recorder.complete(exchange, release):
        say("B", f"{exchange.id} {ended_s}")
    else:
        assert await released


async def client(recorder: SpoolRecorder, chance: random.Random) -> None:
    while True:
        await one_call(recorder, chance)
        await asyncio.sleep(chance.random() * 0.002)


async def stream(recorder: SpoolRecorder, reader: SpoolReader, instance: str) -> None:
    """One call that stays open: its intent is seen on disk by another pair of eyes before it is said to be."""
    exchange = call(route="/stream")
    assert recorder.admit(exchange)
    say("A", exchange.id)
    while not reader.totals(instance).open:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    say("I", exchange.id)


async def main(root: Path, seed: int, clients: int, durability: str, segment_bytes: int) -> None:
    chance = random.Random(seed)
    limits = replace(SMALL, segment_bytes=segment_bytes)
    async with Spool.open(root, limits=limits, instance="a") as spool, asyncio.TaskGroup() as tasks:
        recorder = SpoolRecorder(spool, Told(), commit_wait_s=30, durability=durability)
        os.write(1, b"up\n")
        tasks.create_task(stream(recorder, SpoolReader(root), "a"))
        for _ in range(clients):
            tasks.create_task(client(recorder, random.Random(chance.random())))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])))
