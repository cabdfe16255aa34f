"""Several workers on one port: who starts them, restarts one that dies, and adds up what they know.

The supervisor binds one SO_REUSEPORT socket a worker and hands it down, so that the kernel spreads connections (one
shared socket gives nearly all of them to one process) and a restarted worker listens where the dead one did:
connections that wait in its queue are not refused meanwhile. It serves nothing itself; it bills, and it answers the
admin port.

What a dead worker had counted is kept: a sum that went down would look like a restart to Prometheus.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sidecar.runtime.admin import Readiness
from sidecar.runtime.intake import url_of
from sidecar.runtime.ipc import CANNOT_START, LOST, Wire
from sidecar.runtime.metrics import Metrics
from sidecar.settings import Address, Settings
from sidecar.spool import Snapshot, SpoolTotals
from sidecar.storage.sockets import listening, remove

log = logging.getLogger("sidecar.supervisor")

BACKLOG: Final = 4096  # connections waiting to be accepted, for each worker
ASK_S: Final = 2.0  # a worker that has not answered by then is left out; its slot is read from disk
POLL_S: Final = 1.0  # how old the counts of a worker may be that dies
START_S: Final = 60.0  # a worker recovers its slot first; a million records take three seconds
RESTART_S_MIN: Final = 0.1  # first pause before a dead worker is started again; doubles while it keeps dying
RESTART_S_MAX: Final = 5.0
STEADY_S: Final = 60.0  # a worker that lived so long starts again without a pause


STATES: Final = ("stopping", "full", "degraded", "ok")  # the worst of all workers is the state of the whole


class WorkerError(Exception):
    """The workers do not start. The text says what to do about it."""


@dataclass(slots=True)
class _Worker:
    """One place among the workers, over restarts."""

    number: int
    listener: socket.socket
    process: asyncio.subprocess.Process | None = None
    wire: Wire | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    counts: Mapping[str, Any] = field(default_factory=dict)  # as of the last answer of this process
    waiting: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)


class Workers:
    """The workers as one intake (`app.Intake`)."""

    def __init__(
        self,
        settings: Settings,
        *,
        environ: Mapping[str, str],
        committed: Callable[[], None],
        remembered: Callable[[], Mapping[str, int]],
        let_go: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._committed = committed
        self._remembered = remembered
        self._let_go = let_go
        self._workers: list[_Worker] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._gone = Metrics()  # what dead workers had counted
        self._asks = itertools.count(1)
        self._stopping = False
        self._started = False
        self._refused = asyncio.Event()  # a worker said that it cannot start
        self.lost_at_stop = False  # a worker ended with records that the disk did not take
        self.url = ""

    def __repr__(self) -> str:
        return f"<Workers: {sum(w.ready.is_set() for w in self._workers)} of {len(self._workers)} ready>"

    # --- as an intake ------------------------------------------------------------------------------

    async def snapshots(self) -> dict[str, Snapshot]:
        """Of each worker that answers. What is left out is read from disk by the caller."""
        return {
            answer["instance"]: Snapshot(SpoolTotals(**answer["totals"]), answer["last_seq"])
            for answer in await self._ask_all()
        }

    async def metrics(self) -> Metrics:
        await self._ask_all()
        together = Metrics()
        together.absorb(self._gone.state())
        for worker in self._workers:
            together.absorb(worker.counts)
        return together

    async def readiness(self) -> Readiness:
        answers = await self._ask_all()
        missing = len(self._workers) - len(answers)
        notes = [note for answer in answers for note in answer["notes"]]
        if missing:
            notes.append(f"{missing} of {len(self._workers)} workers do not answer")
        states = {answer["state"] for answer in answers}
        state = "stopping" if self._stopping else next((s for s in STATES if s in states), "degraded")
        ready = not self._stopping and any(answer["ready"] for answer in answers)
        return Readiness(ready=ready, state=state, notes=notes)

    def reload(self) -> None:
        for worker in self._workers:
            if worker.wire is not None:
                worker.wire.send({"do": "reload"})

    def end_at_once(self) -> None:
        for worker in self._workers:
            if worker.process is not None and worker.process.returncode is None:
                worker.process.kill()

    # --- their life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind, start all, wait until each is ready. Raises `SocketError` or `WorkerError`."""
        listeners, self.url = _bind(self._settings.listen, self._settings.workers, self._settings.tls_cert_file)
        self._workers = [_Worker(number, listener) for number, listener in enumerate(listeners)]
        self._tasks = [asyncio.create_task(self._keep(worker)) for worker in self._workers]
        ready = asyncio.create_task(self._all_ready())
        refused = asyncio.create_task(self._refused.wait())
        try:
            done, _ = await asyncio.wait((ready, refused), timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            refused.cancel()
        if self._refused.is_set():
            raise WorkerError("a worker cannot start: its log line above says why")
        if not done:
            raise WorkerError(f"the workers are not ready after {START_S:.0f} s: see their log lines above")
        self._started = True
        self._tasks.append(asyncio.create_task(self._poll()))

    async def _all_ready(self) -> None:
        for worker in self._workers:
            await worker.ready.wait()

    async def stop(self) -> None:
        """Let every worker drain; end those by force that take longer than they may."""
        self._stopping = True
        await self._ask_all()
        for worker in self._workers:
            if worker.wire is not None:
                worker.wire.send({"do": "stop"})
        # Ours too: as long as one of us holds a listening socket, connections wait in its queue for nobody.
        for worker in self._workers:
            worker.listener.close()
        processes = [w.process for w in self._workers if w.process is not None and w.process.returncode is None]
        try:
            async with asyncio.timeout(self._settings.stop_s + 2 * ASK_S):
                await asyncio.gather(*(process.wait() for process in processes))
        except TimeoutError:
            for process in processes:
                if process.returncode is None:
                    log.error(
                        "worker %d did not end in time and is killed: its open calls are settled later", process.pid
                    )
                    process.kill()
                    await process.wait()
        self.lost_at_stop = any(process.returncode == LOST for process in processes)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.url and self._settings.listen.path:
            remove(Path(self._settings.listen.path))

    async def _keep(self, worker: _Worker) -> None:
        """Run one worker, again and again until we stop."""
        pause_s = RESTART_S_MIN
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            await self._run_once(worker)
            if self._stopping:
                return
            code = None if worker.process is None else worker.process.returncode
            if code == CANNOT_START and not self._started:
                self._refused.set()
                return
            log.error("worker %d ended with %s: it is started again", worker.number, code)
            pause_s = RESTART_S_MIN if loop.time() - began_s > STEADY_S else min(pause_s * 2, RESTART_S_MAX)
            await asyncio.sleep(pause_s)

    async def _run_once(self, worker: _Worker) -> None:
        if self._stopping:  # while it waited to be started again
            return
        ours, theirs = socket.socketpair()
        with theirs:
            fds = (worker.listener.fileno(), theirs.fileno())
            worker.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "sidecar.runtime.intake_worker"),
                *map(str, fds),
                pass_fds=fds,
                env=dict(self._environ),
            )
        worker.wire = await Wire.over(ours)
        worker.wire.send({"remembered": dict(await asyncio.to_thread(self._remembered))})
        try:
            await self._hear(worker, worker.wire)
        finally:
            worker.ready.clear()
            for waiting in worker.waiting.values():
                waiting.cancel()
            worker.waiting.clear()
            await worker.wire.aclose()
            worker.wire = None
        await worker.process.wait()
        # A worker that is killed while it commits leaves a commit in SQLite's log of which the log's index, in memory
        # shared by all who have the file open, knows nothing. The next to open looks again only if it is the first.
        await asyncio.to_thread(self._let_go)
        self._gone.absorb(worker.counts)
        worker.counts = {}
        self._committed()  # what it committed last

    async def _hear(self, worker: _Worker, wire: Wire) -> None:
        while (message := await wire.receive()) is not None:
            if "answer" in message:
                worker.counts = message["counts"]
                waiting = worker.waiting.pop(message["answer"], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            elif "committed" in message:
                self._committed()
            elif "ready" in message:
                worker.ready.set()
                self._committed()  # what it settled or salvaged while it opened
                log.info("worker %d is ready", worker.number, extra={"facts": {"instance": message["ready"]}})

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self._ask_all()

    async def _ask_all(self) -> list[dict[str, Any]]:
        """The state of each worker that answers in time."""
        answers = await asyncio.gather(*(self._ask(worker) for worker in self._workers))
        return [answer for answer in answers if answer is not None]

    async def _ask(self, worker: _Worker) -> dict[str, Any] | None:
        if worker.wire is None or not worker.ready.is_set():
            return None
        number = next(self._asks)
        waiting = worker.waiting[number] = asyncio.get_running_loop().create_future()
        worker.wire.send({"ask": number})
        try:
            async with asyncio.timeout(ASK_S):
                answer: dict[str, Any] = await waiting
                return answer
        except (TimeoutError, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None
        finally:
            worker.waiting.pop(number, None)


@asynccontextmanager
async def workers(
    settings: Settings,
    *,
    committed: Callable[[], None],
    remembered: Callable[[], Mapping[str, int]],
    let_go: Callable[[], None],
) -> AsyncIterator[Workers]:
    """All workers, started and ready. Leaving drains them. `let_go` closes what this process has open of the spool."""
    # What the command line changed must hold for the workers too: they read the environment.
    environ = {**os.environ, "SIDECAR_DATA_DIR": str(settings.data_dir.absolute())}
    them = Workers(settings, environ=environ, committed=committed, remembered=remembered, let_go=let_go)
    try:
        await them.start()
        yield them
    finally:
        await them.stop()


def _bind(address: Address, count: int, tls: Path | None) -> tuple[list[socket.socket], str]:
    """One listening socket a worker, and the URL; all on one address. Raises `SocketError`."""
    with listening(address, "SIDECAR_LISTEN"):
        if address.path:
            return [_bind_unix(address.path)] * count, f"unix:{address.path}"
        return _bind_tcp(address, count, tls)


def _bind_tcp(address: Address, count: int, tls: Path | None) -> tuple[list[socket.socket], str]:
    info = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, proto, _, where = info[0]
    with socket.socket(family, kind, proto) as trial:
        # Sockets that share a port would share it with another program of the same user that does so too.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(where)
    bound: list[socket.socket] = []
    try:
        for _ in range(count):
            listener = socket.socket(family, kind, proto)
            bound.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if where[0] == "::" and socket.has_dualstack_ipv6():
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(where)
            where = listener.getsockname()  # port 0: the others join the one that was given
            listener.listen(BACKLOG)
    except OSError:
        for listener in bound:
            listener.close()
        raise
    return bound, url_of((str(where[0]), int(where[1])), tls=tls is not None)


def _bind_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
