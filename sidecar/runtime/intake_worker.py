"""One of several processes that serve: the traffic half, told by its supervisor what to do.

    python -m sidecar.runtime.intake_worker LISTENER_FD WIRE_FD

It holds the data directory's lock together with the supervisor, has a spool slot of its own, and ends by draining:
when told to, when signalled, and when its supervisor is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any, Final

from sidecar.backends import backend_settings
from sidecar.runtime import factory
from sidecar.runtime import logging as logs
from sidecar.runtime.instance_lock import DataLock, LockError
from sidecar.runtime.intake import Traffic, only_fault, serving
from sidecar.runtime.ipc import CANNOT_START, LOST, Wire
from sidecar.runtime.metrics import Metrics
from sidecar.settings import Settings, load
from sidecar.spool import SpoolError

log = logging.getLogger("sidecar.worker")

START_FAULTS: Final = (LockError, SpoolError, OSError)
TELL_S: Final = 0.005  # commits within this time are told as one: delivery reads whole groups anyway


class _Teller:
    """Tells the supervisor that something was committed, at most once in `TELL_S`."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._timer: asyncio.TimerHandle | None = None

    def committed(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TELL_S, self._tell)

    def _tell(self) -> None:
        self._timer = None
        self._wire.send({"committed": True})


async def work(settings: Settings, listener: socket.socket, wire_socket: socket.socket, opened: asyncio.Event) -> int:
    """Serve on the given socket until told to stop; the exit code."""
    wire = await Wire.over(wire_socket)
    first = await wire.receive()
    if first is None:
        return 0  # the supervisor is gone already
    remembered: dict[str, int] = first["remembered"]
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # A service manager signals every process of a service: then the supervisor waits as long as we do.
    loop.add_signal_handler(signal.SIGTERM, loop.call_later, settings.stop_delay_s, stop.set)
    # A terminal sends Ctrl-C to the whole group; when we stop is the supervisor's to say.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    with DataLock.join(settings.data_dir):
        async with serving(
            settings,
            key=factory.hash_key(settings),
            metrics=Metrics(),
            committed=_Teller(wire).committed,
            remembered_seq=lambda instance: remembered.get(instance, 0),
        ) as traffic:
            await traffic.proxy.listen(sock=listener)
            opened.set()
            wire.send({"ready": traffic.spool.instance})
            listening = asyncio.create_task(_obey(wire, traffic, stop))
            await stop.wait()
        # The last commits are told before the line is cut.
        wire.send({"committed": True})
    listening.cancel()
    await wire.aclose()
    return LOST if traffic.lost_at_stop else 0


async def start(settings: Settings, listener: socket.socket, wire_socket: socket.socket) -> int:
    """`work`, and the exit code: a worker that could not open its parts says why in one line."""
    opened = asyncio.Event()
    try:
        return await work(settings, listener, wire_socket, opened)
    except (BaseExceptionGroup, *START_FAULTS) as error:
        fault = only_fault(error, START_FAULTS) if isinstance(error, BaseExceptionGroup) else error
        if opened.is_set() or fault is None:
            raise
        log.error("this worker cannot start: %s", fault)
        return CANNOT_START


async def _obey(wire: Wire, traffic: Traffic, stop: asyncio.Event) -> None:
    while (message := await wire.receive()) is not None:
        if "ask" in message:
            wire.send({"answer": message["ask"], **await _state(traffic)})
        elif message.get("do") == "reload":
            traffic.reload()
        elif message.get("do") == "stop":
            stop.set()
    stop.set()  # the supervisor is gone: finish what is open, and make room for the next instance


async def _state(traffic: Traffic) -> dict[str, Any]:
    readiness = await traffic.readiness()
    [(instance, snapshot)] = (await traffic.snapshots()).items()
    return {
        "instance": instance,
        "totals": asdict(snapshot.totals),
        "last_seq": snapshot.last_seq,
        "ready": readiness.ready,
        "state": readiness.state,
        "notes": list(readiness.notes),
        "counts": traffic.counted.state(),
    }


def main() -> int:
    listener_fd, wire_fd = (int(text) for text in sys.argv[1:3])
    settings = load(os.environ, backend_settings=backend_settings())
    logs.set_up(settings.log_level.value.upper())
    listener = socket.socket(fileno=listener_fd)
    wire_socket = socket.socket(fileno=wire_fd)
    with asyncio.Runner(loop_factory=factory.loop_factory()) as runner:
        return runner.run(start(settings, listener, wire_socket))


if __name__ == "__main__":
    sys.exit(main())
