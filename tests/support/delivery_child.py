"""Runs delivery in processes that die: started once, it forks one child for each line of JSON on its standard input.

A child delivers a fixed spool to one backend, redrives what was parked, forgets half, and answers with the balance;
or it kills itself at the n-th happening of a kind: a statement sent to `delivery.db`, an offer about to be made, an
offer just taken. Forking keeps hundreds of such runs within seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import IO, Any

import orjson
from support.delivery_fixtures import QUICK, World, until
from support.fake_backend import FakeBackend, faults

from sidecar.delivery import database
from sidecar.model.delivery import Abilities, Atomicity, Dedup

DAY_S = 86_400.0
MODES = {
    "batch": Abilities(
        events_max=8, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.REQUEST_KEY, dedup_window_s=86_400
    ),
    "events": Abilities(events_max=8, atomicity=Atomicity.PREFIX, dedup=Dedup.EVENT_ID, dedup_window_s=86_400),
    "single": Abilities(dedup=Dedup.REQUEST_KEY, dedup_window_s=86_400, concurrency=4),
    "none": Abilities(dedup=Dedup.NONE, concurrency=4),
}
FAULTS = {"none": ["retry:http_429"]}
RECORDS = 40


class Fuse:
    """Kills the process at the n-th happening of one kind."""

    def __init__(self, kind: str, left: int) -> None:
        self.kind, self.left = kind, left

    def __call__(self, kind: str) -> None:
        if kind == self.kind:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


async def deliver(order: dict[str, Any]) -> dict[str, Any]:
    directory, mode, run = Path(order["directory"]), order["mode"], order["run"]
    fuse = Fuse(order.get("kind", ""), order.get("at", 0))
    world = World(directory, limits=QUICK)
    if not world.path.exists():
        world.begin("fake")
    ids = world.spool.add(RECORDS, group=7)
    backend = FakeBackend(
        MODES[mode],
        path=directory / "backend.ndjson",
        flavour=str(run),  # every run is a software update
        events_of=lambda r: ("a", "b") if mode == "events" else ("",),
        behaviour=faults(run, 0.2, FAULTS.get(mode, ["retry:http_503", "lose_after", "lose_before"])),
        on_send=fuse,
    )
    redriven = directory / "redriven"
    if not redriven.exists():
        backend.poison = {ids[5], ids[17], ids[18]}
    fused(fuse)
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: delivery.totals(world.spool.upto())["fake"].pending == 0)
        redriven.touch()
        backend.poison = set()
        await delivery.redrive()
        await until(lambda: delivery.totals(world.spool.upto())["fake"].pending == 0)
        await delivery.forget({"one": RECORDS // 2})
        totals = world.balance(delivery)["fake"]
        return {
            "delivered": totals.delivered,
            "parked": dict(totals.parked),
            "total": totals.total,
            "unknown": [row.event_id for row in delivery.parked() if row.maybe_taken],
        }


def fused(fuse: Fuse) -> None:
    """Let every statement of the writing connection burn the fuse, right before it runs."""
    plain = database._open_writer

    def opened(path: Path) -> Any:
        connection, created = plain(path)
        connection.set_trace_callback(lambda _: fuse("statement"))
        return connection, created

    database._open_writer = opened


def serve(
    child: Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]], orders: IO[bytes], to: IO[bytes]
) -> None:
    """Fork a child for each order, and say how it ended."""
    for line in orders:
        order = orjson.loads(line)
        answer, child_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(answer)
            result = asyncio.run(child(order))
            os.write(child_end, orjson.dumps(result))
            os._exit(0)
        os.close(child_end)
        with os.fdopen(answer, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        to.write(orjson.dumps({"code": code, "result": orjson.loads(text) if text else None}) + b"\n")
        to.flush()


if __name__ == "__main__":
    serve(deliver, sys.stdin.buffer, sys.stdout.buffer)
