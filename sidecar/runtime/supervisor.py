"""The supervisor: holds what must outlive a process, starts the processes, and starts those again that die.

It holds the data directory's lock and every listening socket: calls, scrapes and what the others tell each other wait
in a queue while a process is started again, and are not refused. It serves nothing and meters nothing itself, so there
is little in it that can die.

The others are forked from it: everything that they need is imported here once, and its memory is shared. So there is no
thread and no event loop in this process. What a worker leaves open when it dies is settled by the process that meters,
which is told of every coming and going.

A stop goes in order: no more calls, open ones end, what they left is recorded and delivered, the admin port closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from sidecar.runtime import certificates, factory
from sidecar.runtime import logging as logs
from sidecar.runtime.disk import LOOK_S, NoRoomError, no_room, text_of
from sidecar.runtime.faults import faults
from sidecar.runtime.instance_lock import DataLock, InUseError, LockError, Reload
from sidecar.runtime.metering import Start, meter
from sidecar.runtime.seam import ASK_S
from sidecar.runtime.seam_protocol import Address, listen_at_seam
from sidecar.runtime.serving import serve
from sidecar.runtime.wire import WireEnd
from sidecar.settings import Address as Listen
from sidecar.settings import OnSpoolFull, Settings, SettingsError
from sidecar.settings.renewal import renewed
from sidecar.spool.frames import SOURCE_BYTES
from sidecar.storage.files import Trouble
from sidecar.storage.sockets import listening, remove

log = logging.getLogger("sidecar.supervisor")

BACKLOG: Final = 4096  # connections waiting to be accepted, for each worker
START_S: Final = 60.0  # for those that serve: they open no file
RESTART_S_MIN: Final = 0.1  # pause before the second start in a row; doubles while it keeps dying
RESTART_S_MAX: Final = 5.0
STEADY_S: Final = 60.0  # a process that lived so long starts again without a pause
# What the process that meters may take at its end: the last delivery pass, a disk that takes nothing, answers.
METERING_STOP_S: Final = 40.0
Read = Callable[[], Settings]

OK: Final = 0
FAILED: Final = 1
STOPPERS: Final = (signal.SIGINT, signal.SIGTERM)
OWN_NAME: Final = Path("/proc/self/comm")
METERING: Final = "metering"
SERVING: Final = "serving"


class StartError(Exception):
    """A process cannot start. The text says what to do about it; `code` is the exit code of the command."""

    def __init__(self, text: str, code: int = FAILED) -> None:
        super().__init__(text)
        self.code = code


@dataclass(slots=True, eq=False)
class Process:
    """One place among the processes, over restarts."""

    role: str
    number: int = 0  # of the worker
    listeners: Sequence[socket.socket] = ()
    pid: int = 0  # 0: not running
    wire: WireEnd | None = None
    source: bytes = b""  # of one that serves: another with each start
    ready: bool = False
    was_ready: bool = False  # once, in any life
    cannot: tuple[str, int] | None = None  # why it cannot start, and the exit code for that
    began_s: float = 0.0
    pause_s: float = 0.0
    due_s: float = 0.0  # when it is to be started again
    code: int = 0  # its last exit code; negative: a signal
    replaced: bool = False  # it was told to hand over: another one follows at once

    def __str__(self) -> str:
        return "the metering process" if self.role == METERING else f"worker {self.number}"


@dataclass(slots=True)
class Sockets:
    """What listens, and where."""

    workers: list[list[socket.socket]] = field(default_factory=list)  # for each worker, one an address
    admin: socket.socket | None = None
    seam: socket.socket | None = None
    seam_address: Address = field(default_factory=Address)
    proxy_url: str = ""
    admin_url: str = ""
    paths: list[Path] = field(default_factory=list)  # to be taken away at the end

    def of_workers(self) -> set[socket.socket]:
        return {sock for socks in self.workers for sock in socks}


class Supervisor:
    """`run` once."""

    def __init__(self, settings: Settings, read: Read | None = None) -> None:
        """`read`: reads the settings anew and judges them, for SIGHUP; None: they are those of the start."""
        self._settings = settings
        self._read = read
        self._lock: DataLock | None = None
        self._held: Trouble | None = None  # why the lock could not be taken yet
        self._look_s = 0.0  # when to try again
        self._key = b""
        self._sockets = Sockets()
        self._metering = Process(METERING)
        self._serving: list[Process] = []
        self._instance: str | None = None
        self._died: dict[bytes, int] = {}  # who served and died while nobody metered, and the worker's number
        self._selector = selectors.DefaultSelector()
        self._stops = 0  # how often we were asked to stop
        self._reload = False
        self._reloads = 0
        self._waiting_settings: list[str] = []  # that differ and need a restart
        self._reload_note: Reload | None = None
        self._before: Settings | None = None  # while new settings come into force: the ones that held
        self._failed = False  # something ended that should not have, or left records behind
        self._leaving = False  # calls are still taken, each as the last on its connection
        self._draining = False
        self._woken: tuple[socket.socket, socket.socket] | None = None

    def run(self) -> int:
        """Until SIGTERM or SIGINT, and `SIDECAR_STOP_DELAY_S` longer; a second one ends the delay, the next everything.
        SIGHUP reads settings, certificates and secrets anew. The exit code; raises what keeps it from starting.
        """
        settings = self._settings
        signal.signal(signal.SIGHUP, self._asked_to_reload)  # heard also while the lock is waited for
        try:
            self._take_lock()
            self._key = factory.kept_hash_key(settings) or factory.new_hash_key()
            self._open_sockets()
            factory.raise_file_limit(settings)
            factory.calm_collector()
            self._listen_to_signals()
            self._start(self._metering)
            self._wait(lambda: self._metering.ready)
            certificates.keep(settings)
            self._serving = [Process(SERVING, n, socks) for n, socks in enumerate(self._sockets.workers)]
            for process in self._serving:
                self._start(process)
            self._wait(lambda: all(process.ready for process in self._serving), limit_s=START_S)
            self._announce()
            urls = {"proxy": self._sockets.proxy_url, "admin": self._sockets.admin_url}
            if not settings.serve.admin_listen.path:
                urls["page"] = self._sockets.admin_url + "/"
            log.info("ready", extra={"facts": urls})
            self._wait(lambda: self._stops > 0)
            self._stop()
        finally:
            self._end()
        # Python ends with the system's own handlers again: one more signal would make a failure of a clean end.
        for number in STOPPERS:
            signal.signal(number, signal.SIG_IGN)
        return FAILED if self._failed else OK

    # --- what is held ------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        settings = self._settings
        try:
            self._lock = DataLock.take(settings.data_dir, wait_s=settings.serve.stop_s)
        except (LockError, OSError) as error:
            found = no_room(settings.data_dir, error)
            if found is None:
                raise
            if settings.spool.on_spool_full is OnSpoolFull.REFUSE:
                raise NoRoomError(f"cannot start: {text_of(settings.data_dir, found)}") from error
            self._held = found
            self._look_s = time.monotonic() + LOOK_S

    def _try_lock(self) -> None:
        """There was no room for it at the start. Whoever else found room first has it."""
        self._look_s = time.monotonic() + LOOK_S
        try:
            self._lock = DataLock.take(self._settings.data_dir)
        except InUseError as error:
            log.error("%s", error)
            self._failed = True
            self._stops += 1
            return
        except (LockError, OSError):
            return
        self._held = None
        self._announce()
        self._tell(self._metering, {"do": "locked"})

    def _announce(self) -> None:
        if self._lock is not None and self._serving and all(process.was_ready for process in self._serving):
            self._lock.announce(admin=self._sockets.admin_url, proxy=self._sockets.proxy_url, reload=self._reload_note)

    def _open_sockets(self) -> None:
        settings, sockets = self._settings, self._sockets
        with listening(settings.serve.listen, "SIDECAR_LISTEN"):
            sockets.workers, sockets.proxy_url = bind(
                settings.serve.listen, settings.serve.workers, tls=settings.proxy.tls_cert_file is not None
            )
        if settings.serve.listen.path:
            sockets.paths.append(Path(settings.serve.listen.path))
        with listening(settings.serve.admin_listen, "SIDECAR_ADMIN_LISTEN"):
            [[sockets.admin]], sockets.admin_url = bind(settings.serve.admin_listen, 1, first=True)
        if settings.serve.admin_listen.path:
            sockets.paths.append(Path(settings.serve.admin_listen.path))
        sockets.seam, sockets.seam_address = listen_at_seam(settings.data_dir, held=self._lock is not None)
        if sockets.seam_address.path is not None:
            sockets.paths.append(sockets.seam_address.path)

    # --- processes ---------------------------------------------------------------------------------

    def _start(self, process: Process) -> None:
        """Raises `OSError` where the system has no process or descriptors for a first start. Later it is tried again:
        the others serve on, and keep what they have to tell."""
        process.ready, process.cannot, process.due_s = False, None, 0.0
        process.began_s = time.monotonic()
        try:
            self._fork(process)
        except OSError as error:
            if not process.was_ready:
                raise
            log.error("%s cannot be started, which is tried again: %s", process, error.strerror or error)
            self._start_later(process)

    def _fork(self, process: Process) -> None:
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            if process.role == SERVING:
                process.source = os.urandom(SOURCE_BYTES)
                # Told before it begins: only who is expected is heard.
                self._tell(self._metering, {"came": process.source.hex(), "worker": process.number})
            self._selector.register(ours, selectors.EVENT_READ, process)
            pid = os.fork()
        except OSError:
            with contextlib.suppress(KeyError):
                self._selector.unregister(ours)
            ours.close()
            theirs.close()
            if process.source:
                self._tell(self._metering, {"gone": process.source.hex()})
                process.source = b""
            raise
        if not pid:
            self._become(process, ours, theirs)
        theirs.close()
        process.pid, process.wire = pid, WireEnd(ours)
        if process.role == METERING:
            self._died.clear()

    def _start_later(self, process: Process) -> None:
        process.due_s = time.monotonic() + process.pause_s
        process.pause_s = min(max(process.pause_s * 2, RESTART_S_MIN), RESTART_S_MAX)

    def _become(self, process: Process, ours: socket.socket, theirs: socket.socket) -> None:
        """In the child: be it, and end. Nothing of the supervisor's stays open, or its end would not be noticed."""
        code = FAILED
        try:
            for number in (*STOPPERS, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # what is to be done is the supervisor's to say
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            ours.close()
            self._selector.close()
            for other in (self._metering, *self._serving):
                if other.wire is not None:
                    other.wire.sock.close()
            for sock in self._woken or ():
                sock.close()
            settings, sockets = self._settings, self._sockets
            who = {"role": process.role}
            if process.role == SERVING:
                who["worker"] = str(process.number)
            logs.set_up(settings.serve.log_level.value.upper(), settings.serve.log_format, **who)
            with contextlib.suppress(OSError):  # what `ps` and `top` show, where there is such a file
                name = f"serve-{process.number}" if process.role == SERVING else "meter"
                OWN_NAME.write_text(f"sidecar-{name}")
            assert sockets.seam is not None
            assert sockets.admin is not None
            if process.role == METERING:
                for sock in sockets.of_workers():
                    sock.close()
                work = meter(
                    settings,
                    self._start_of_metering(),
                    key=self._key,
                    seam=sockets.seam,
                    admin=sockets.admin,
                    wire_socket=theirs,
                )
            else:
                for sock in sockets.of_workers() - set(process.listeners):
                    sock.close()
                sockets.admin.close()
                sockets.seam.close()
                work = serve(
                    settings,
                    key=self._key,
                    address=sockets.seam_address,
                    source=process.source,
                    worker=process.number,
                    listeners=process.listeners,
                    wire_socket=theirs,
                    read=self._read,
                )
            code = _run(work)
        except BaseException:
            log.exception("%s has died", process)
        finally:
            with contextlib.suppress(Exception):
                logging.shutdown()
            os._exit(code)

    def _start_of_metering(self) -> Start:
        alive = {process.source: process.number for process in self._serving if process.source}
        return Start(sources={**self._died, **alive}, gone=tuple(self._died), instance=self._instance, held=self._held)

    def _tell(self, process: Process, fields: dict[str, Any]) -> None:
        if process.wire is not None:
            process.wire.send(fields)

    def _hear(self, process: Process) -> None:
        assert process.wire is not None
        told = process.wire.receive()
        if told is None:
            self._selector.unregister(process.wire.sock)
            return
        for fields in told:
            if "cannot" in fields:
                process.cannot = (fields["cannot"], fields["code"])
            elif "ready" in fields:
                process.ready = process.was_ready = True
                self._instance = fields.get("instance") or self._instance
                if process.role == METERING and self._before is not None:
                    self._renewed()
                if process.role == SERVING and self._leaving:
                    self._tell(process, {"do": "leave"})

    def _collect(self) -> None:
        """Those that have ended: what they said last, why they ended, and what follows. The first process of a
        container is given orphans of others besides, whose place in the system's table it has to free."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for process in (self._metering, *self._serving):
                if process.pid == pid:
                    self._ended(process, os.waitstatus_to_exitcode(status))

    def _ended(self, process: Process, code: int) -> None:
        process.pid, process.ready, process.code = 0, False, code
        if process.wire is not None:
            if process.wire.sock in {key.fileobj for key in self._selector.get_map().values()}:
                self._hear(process)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(process.wire.sock)
            process.wire.sock.close()
            process.wire = None
        if process.role == SERVING and process.source:
            self._tell(self._metering, {"gone": process.source.hex()})
            if not self._metering.pid:
                self._died[process.source] = process.number
            process.source = b""
        if self._draining and (process.role == SERVING or not any(other.pid for other in self._serving)):
            self._failed = self._failed or code != 0
            return
        if not process.was_ready:
            text, wrong = process.cannot or (f"{process} {_how(code)}: its log lines above say why", FAILED)
            raise StartError(text, wrong)
        if process.replaced and code == 0:
            process.replaced, process.due_s = False, time.monotonic()
            return
        was_old, process.replaced = process.replaced, False
        why = process.cannot[0] if process.cannot else _how(code)
        if process.role == METERING and self._before is not None and not was_old:  # the new one never was ready
            self._settings, self._before = self._before, None
            self._said_of_reload([f"{why}; the settings that held before are in force again"], [])
        log.error("%s %s: it is started again", process, why)
        if time.monotonic() - process.began_s >= STEADY_S:
            process.pause_s = 0.0
        self._start_later(process)

    # --- waiting -----------------------------------------------------------------------------------

    def _listen_to_signals(self) -> None:
        woken = self._woken = socket.socketpair()
        for sock in woken:
            sock.setblocking(False)
        signal.set_wakeup_fd(woken[1].fileno(), warn_on_full_buffer=False)
        self._selector.register(woken[0], selectors.EVENT_READ, None)
        for number in STOPPERS:
            signal.signal(number, self._asked_to_stop)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1

    def _asked_to_reload(self, number: int, frame: FrameType | None) -> None:
        self._reload = True

    def _wait(self, done: Callable[[], bool], *, limit_s: float | None = None) -> bool:
        """Look after everything until it is done, or asked to stop (again), or the time is over: False."""
        until_s = None if limit_s is None else time.monotonic() + limit_s
        stops = self._stops
        while not done():
            if self._stops != stops:
                return False
            now_s = time.monotonic()
            if until_s is not None and now_s >= until_s:
                return False
            due = [process.due_s for process in (self._metering, *self._serving) if process.due_s]
            due += [] if until_s is None else [until_s]
            due += [self._look_s] if self._held is not None else []
            for key, _ in self._selector.select(max(min(due) - now_s, 0.0) if due else None):
                if key.data is None:
                    assert self._woken is not None
                    self._woken[0].recv(4096)
                else:
                    self._hear(key.data)
            self._collect()
            now_s = time.monotonic()
            for process in (self._metering, *self._serving):
                if process.due_s and process.due_s <= now_s:
                    self._start(process)
            if self._held is not None and self._look_s <= now_s:
                self._try_lock()
            if self._reload:
                self._reload = False
                self._renew()
        return True

    # --- new settings ------------------------------------------------------------------------------

    def _renew(self) -> None:
        """Read everything anew. What is wrong changes nothing and is said.

        The process that meters is replaced by one that has the new settings: it lets the requests to backends end that
        are under way, and what is told meanwhile is kept by those that serve, as when it dies. These take the new
        settings over in place, once it is there, so that no call is cut and no connection closed.
        """
        if self._stops:
            return  # whoever meters has to hear what is open until its end
        if self._before is not None:
            self._reload = True  # the last one first
            return
        self._reloads += 1
        waiting: list[str] = []
        if self._read is not None:
            try:
                settings, waiting = self._read_anew(self._read)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with them, the old ones hold
                problems = getattr(error, "problems", None) or [str(error)]
                self._said_of_reload(list(problems), [])
                return
            self._before, self._settings = self._settings, settings
            logging.getLogger("sidecar").setLevel(settings.serve.log_level.value.upper())
        else:
            self._before = self._settings
        if waiting:
            log.warning("these settings wait for a restart: %s", ", ".join(waiting))
        self._waiting_settings = waiting
        if self._metering.pid and self._read is not None:
            self._metering.replaced = True
            self._tell(self._metering, {"do": "hand_over"})
        elif self._metering.ready:
            self._renewed()

    def _read_anew(self, read: Read) -> tuple[Settings, list[str]]:
        """What holds from now on, and what waits for a restart; raises what is wrong with them."""
        settings, waiting = renewed(self._settings, read())
        # Judged again without what waits: a limit may be of a dimension that is as new as it.
        if waiting and (problems := faults(settings, starting=True)):
            raise SettingsError([*problems, f"it takes a restart, by which {', '.join(waiting)} would come into force"])
        return settings, waiting

    def _renewed(self) -> None:
        """Whoever meters has the new settings: now those that serve."""
        self._before = None
        certificates.keep(self._settings)
        for process in self._serving:
            self._tell(process, {"do": "reload"})
        self._said_of_reload([], self._waiting_settings)

    def _said_of_reload(self, problems: Sequence[str], waiting: Sequence[str]) -> None:
        if problems:
            log.error("the settings were not reloaded, the old ones hold: %s", "; ".join(problems))
        else:
            log.info("the settings were reloaded")
        self._tell(self._metering, {"reloaded": list(problems)})
        if self._lock is not None:
            self._reload_note = Reload(self._reloads, tuple(problems), tuple(waiting))
            self._announce()

    # --- the end -----------------------------------------------------------------------------------

    def _stop(self) -> None:
        settings = self._settings
        facts = {"stop_delay_s": settings.serve.stop_delay_s, "stop_s": settings.serve.stop_s}
        log.info("stopping", extra={"facts": facts})
        self._tell(self._metering, {"do": "stopping"})
        if settings.serve.stop_delay_s:
            # Whoever sends us calls learns by /readyz that they shall go elsewhere; those that come meanwhile are
            # served. Who asks no /readyz learns it by its connections, which end each with a response.
            self._leaving = True
            for process in self._serving:
                self._tell(process, {"do": "leave"})
            self._wait(lambda: False, limit_s=settings.serve.stop_delay_s)
            log.info("taking no more calls")
        self._draining = True
        for process in self._serving:
            process.due_s = 0.0
            self._tell(process, {"do": "stop"})
        # Ours too: as long as one of us holds a listening socket, connections wait in its queue for nobody.
        for sock in self._sockets.of_workers():
            sock.close()
        if not self._drained(self._serving, settings.serve.stop_s + 2 * ASK_S + settings.spool.commit_wait_s):
            return
        self._metering.due_s = 0.0
        self._tell(self._metering, {"do": "stop"})
        if self._drained([self._metering], METERING_STOP_S):
            log.info("stopped")

    def _drained(self, processes: Sequence[Process], limit_s: float) -> bool:
        """Wait until they have ended; those that take too long are killed. False: asked again, so all end at once."""
        stops = self._stops
        if not self._wait(lambda: not any(process.pid for process in processes), limit_s=limit_s):
            if self._stops != stops:
                # What is committed stays committed, what is open is settled at the next start: as after a crash.
                log.warning("asked a second time: ending at once")
                self._failed = True
                return False
            for process in processes:
                if process.pid:
                    log.error("%s did not end in time and is killed: its open calls are settled later", process)
                    os.kill(process.pid, signal.SIGKILL)
            self._wait(lambda: not any(process.pid for process in processes))
        return True

    def _end(self) -> None:
        """Whatever is still there ends now; every path and the lock are let go of."""
        for process in (*self._serving, self._metering):
            if process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, 0)
                process.pid = 0
        for path in self._sockets.paths:
            with contextlib.suppress(OSError):
                remove(path)
        if self._lock is not None:
            self._lock.release()


def _run(work: Coroutine[Any, Any, int]) -> int:
    with asyncio.Runner(loop_factory=factory.loop_factory()) as runner:
        return runner.run(work)


# --- sockets that listen -------------------------------------------------------------------------------


def _how(code: int) -> str:
    """How a process ended, by `waitstatus_to_exitcode`."""
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time one, between those that have names
        return f"was killed by signal {-code}"


def bind(
    address: Listen, count: int, *, tls: bool = False, first: bool = False
) -> tuple[list[list[socket.socket]], str]:
    """For each of `count` processes its listening sockets, one for each address that the name stands for (or for the
    `first` alone), and the URL. Raises `OSError`.

    Several share the port with SO_REUSEPORT, so that the kernel spreads connections (one shared socket gives nearly all
    of them to one process) and a process that is started again listens where the dead one did.
    """
    if address.path:
        sock = _bound(socket.AF_UNIX, socket.SOCK_STREAM, 0, address.path)
        return [[sock]] * count, url_of(address.path)
    infos = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    infos = list(dict.fromkeys(infos))[: 1 if first else None]
    if count > 1:
        for family, kind, proto, _, where in infos:
            # Sockets that share a port would share it with another program of the same user that does so too.
            with socket.socket(family, kind, proto) as trial:
                _reuse(trial, where)
                trial.bind(where)
    made: list[list[socket.socket]] = [[] for _ in range(count)]
    port = address.port
    try:
        for family, kind, proto, _, where in infos:
            for socks in made:
                target = (where[0], port, *where[2:])
                socks.append(sock := _bound(family, kind, proto, target, shared=count > 1))
                port = sock.getsockname()[1]  # port 0: the others join the one that was given
    except OSError:
        for sock in (sock for socks in made for sock in socks):
            sock.close()
        raise
    host = made[0][0].getsockname()[0]
    return made, url_of((str(host), int(port)), tls=tls)


def _bound(family: int, kind: int, proto: int, where: Any, *, shared: bool = False) -> socket.socket:
    sock = socket.socket(family, kind, proto)
    try:
        if family != socket.AF_UNIX:
            _reuse(sock, where)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _reuse(sock: socket.socket, where: Any) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:
        # `::` takes IPv4 as well; the system's default may leave that out.
        both = where[0] == "::" and socket.has_dualstack_ipv6()
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)


def url_of(bound: tuple[str, int] | str, *, tls: bool = False) -> str:
    """`http://127.0.0.1:8080`, also for what listens everywhere; `unix:/path`."""
    if isinstance(bound, str):
        return f"unix:{bound}"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound[0], bound[0])
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{bound[1]}"
