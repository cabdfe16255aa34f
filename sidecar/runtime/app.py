"""The whole: opened in order, closed in reverse, which is the drain.

One process serves and bills; with `SIDECAR_WORKERS` above 1 the serving half runs in workers and this one supervises.

Leaving `running` stops taking calls, lets those in flight finish, commits what they left, makes one last delivery
pass, closes the admin port and lets go of the data directory. A loop that dies takes the same way out with a non-zero
exit code, instead of leaving a proxy that no longer bills.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web

from sidecar.delivery import StateError, corrections
from sidecar.ledger import LedgerError
from sidecar.model.balance import Balance
from sidecar.runtime import factory, signals
from sidecar.runtime import logging as logs
from sidecar.runtime.admin import Instance, Readiness, application
from sidecar.runtime.admin.control import control
from sidecar.runtime.admin.guard import Guard, open_port
from sidecar.runtime.billing import Billing, Room, billing
from sidecar.runtime.directory_identity import As
from sidecar.runtime.early import Early, NoRoomError, no_room, serving_early, text_of
from sidecar.runtime.instance_lock import DataLock, LockError
from sidecar.runtime.intake import listen, only_fault, serving, url_of
from sidecar.runtime.metrics import Gauges, Metrics
from sidecar.runtime.supervisor import WorkerError, workers
from sidecar.settings import OnSpoolFull, Settings
from sidecar.spool import Snapshot, SpoolError, ground_warning, make_room
from sidecar.storage.files import Trouble
from sidecar.storage.sockets import CONTROL, SocketError, for_both_families, listen_privately, listening, remove

log = logging.getLogger("sidecar.app")

OK: Final = 0
FAILED: Final = 1
START_FAULTS: Final = (LockError, SpoolError, StateError, LedgerError, WorkerError, OSError)
ADMIN_STOP_S: Final = 1.0  # how long a scrape that is being answered may take at the end


class Intake(Protocol):
    """The serving half as seen from here: in this process (`traffic`) or in workers (`supervisor`)."""

    async def snapshots(self) -> dict[str, Snapshot]: ...

    async def metrics(self) -> Metrics: ...

    async def readiness(self) -> Readiness: ...

    @property
    def lost_at_stop(self) -> bool: ...

    def reload(self) -> None: ...

    def end_at_once(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class Sidecar:
    """A running whole: what the admin port asks, and where it listens."""

    bills: Billing
    intake: Intake
    counted: Metrics  # what delivery counts
    proxy_url: str = ""
    admin_url: str = ""
    stopping: bool = False  # from the wish to stop on, while calls are still taken too
    _last: Balance | None = None

    async def balance(self) -> Balance:
        try:
            found = await self.bills.balance(await self.intake.snapshots())
        except Exception:
            # The admin port outlives what it shows: at the very end it says what was last so.
            if not self.stopping or self._last is None:
                raise
            return self._last
        self._last = found
        return found

    async def stop(self) -> None:
        """We are leaving: not ready any more, for whatever reason."""
        self.stopping = True
        await self.balance()

    async def metrics(self) -> bytes:
        balance, status = await self.balance(), self.bills.delivery.status()
        gauges = Gauges(
            admitted=balance.admitted,
            recorded=balance.recorded,
            open=balance.open,
            holds=balance.holds,
            degraded=(await self.intake.readiness()).state in ("degraded", "full"),
            pending={name: totals.pending for name, totals in balance.backends.items()},
            parked=await asyncio.to_thread(self.bills.delivery.parked_now),
            copied=self.bills.copied is not None,
            disk_free_bytes=self.bills.free_bytes,
            disk_bytes=self.bills.disk_bytes,
            disk_low_bytes=self.bills.settings.disk_low_bytes,
            chunks_set_aside=self.bills.set_aside,
            ledger_bytes=self.bills.ledger_bytes,
            oldest_pending_s={s.backend: s.oldest_pending_s or 0.0 for s in status},
            retry_after_s={s.backend: s.paused_s for s in status},
        )
        together = await self.intake.metrics()
        if together is not self.counted:
            together.absorb(self.counted.state())
        return together.exposition(gauges)

    async def redrive(
        self,
        *,
        backend: str | None,
        reason: str | None,
        ids: Sequence[str] | None,
        since_s: float | None,
        resend_unknown: bool,
    ) -> dict[str, Any]:
        """Offer parked events again; what became of each. Raises `LookupError` for a backend that nobody knows."""
        delivery = self.bills.delivery
        if backend is not None and backend not in self.bills.backends:
            known = {name for name, _ in await asyncio.to_thread(delivery.parked_now)}
            if backend not in known:
                raise LookupError(self._no_backend(backend))
        told = await delivery.offer_again(
            backend=backend, reason=reason, ids=ids, since_s=since_s, resend_unknown=resend_unknown
        )
        return told.to_dict()

    async def retry(self, backend: str) -> dict[str, Any]:
        """End all waits of a backend. Raises `LookupError`, in words, for one that is not configured."""
        if backend not in self.bills.backends:
            raise LookupError(self._no_backend(backend))
        ended = self.bills.delivery.end_waits(backend)
        return asdict(ended) | {"any": ended.any}

    def _no_backend(self, name: str) -> str:
        return f"{name} is not one of the backends of this instance ({', '.join(self.bills.backends) or 'none'})"

    async def cancel(self, one: str, *, backend: str | None) -> list[dict[str, Any]]:
        outcomes = await corrections.cancel(one, self.bills.delivery, self.bills.backends, backend=backend)
        return [asdict(outcome) for outcome in outcomes]

    async def complain(self, backend: str, named: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        names = [corrections.Named(*one) for one in named]
        return [
            asdict(one) for one in await corrections.complain(backend, names, self.bills.delivery, self.bills.backends)
        ]

    async def adopt(self, how: str) -> dict[str, int] | None:
        """None where nothing was noticed, so that there is nothing to decide."""
        return None if self.bills.copied is None else await self.bills.adopt(As(how))

    async def readiness(self) -> Readiness:
        """Ready to take calls; a backend that is down or blocked is said, and is no reason to send traffic away."""
        intake, status = await self.intake.readiness(), self.bills.delivery.status()
        if self.stopping:
            intake = replace(intake, ready=False, state="stopping")
        notes = [f"{s.backend} is {s.state}: {s.reason}" for s in status if s.state != "up"]
        if self.bills.copied is not None:
            notes.insert(0, self.bills.copied.text)
        if self.bills.room is not Room.ENOUGH:
            notes.append(self.bills.room.value)
        backends: list[dict[str, object]] = [
            {"backend": s.backend, "state": s.state, "reason": s.reason, "retry_after_s": round(s.paused_s, 1)}
            for s in status
        ]
        return Readiness(ready=intake.ready, state=intake.state, notes=[*intake.notes, *notes], backends=backends)


@asynccontextmanager
async def running(settings: Settings, early: Early | None = None) -> AsyncIterator[Sidecar]:
    """The start-up list; read it backwards for the drain. Raises the parts' own errors, which say what to do.

    `early`: what serves already; it becomes a part of the whole.
    """
    # `last` closes after `stack`: the admin port answers while calls end and the last deliveries go out.
    async with AsyncExitStack() as last, AsyncExitStack() as stack:
        taking = partial(DataLock.take, settings.data_dir, wait_s=settings.stop_s)
        lock = last.enter_context(await asyncio.to_thread(taking))
        warning = ground_warning(settings.data_dir)
        if warning:
            log.warning(warning)
        if make_room(settings.data_dir):
            log.error("the disk is full: the reserve is let go, so that everything can be opened; make room")
        metrics = Metrics(backends=settings.backends) if early is None else early.counted
        bills = await stack.enter_async_context(billing(settings, metrics))
        intake, url = await _open_intake(stack, settings, lock, bills, metrics, early)
        sidecar = Sidecar(bills=bills, intake=intake, counted=metrics, proxy_url=url)
        await open_control(stack, settings.data_dir / CONTROL, sidecar)
        if early is None:
            sidecar.admin_url = await open_admin(last, settings, sidecar)
        else:
            last.push_async_callback(early.admin.aclose)
            sidecar.admin_url, early.whole = early.admin_url, sidecar
        stack.push_async_callback(sidecar.stop)
        lock.announce(admin=sidecar.admin_url, proxy=sidecar.proxy_url)
        log.info("ready", extra={"facts": {"proxy": sidecar.proxy_url, "admin": sidecar.admin_url}})
        yield sidecar
    log.info("stopped")


async def _open_intake(
    stack: AsyncExitStack, settings: Settings, lock: DataLock, bills: Billing, metrics: Metrics, early: Early | None
) -> tuple[Intake, str]:
    """Let calls in, here or in workers; the intake and its address."""
    if settings.workers > 1:
        lock.share()
        them = workers(settings, committed=bills.delivery.wake, remembered=bills.remembered, let_go=bills.reader.close)
        intake = await stack.enter_async_context(them)
        return intake, intake.url
    traffic = await stack.enter_async_context(
        serving(
            settings,
            key=factory.hash_key(settings, None if early is None else early.key),
            metrics=metrics,
            committed=bills.delivery.wake,
            remembered_seq=lambda instance: bills.remembered().get(instance, 0),
            early=early,
        )
    )
    if early is not None:
        return traffic, early.url
    return traffic, await listen(traffic.proxy, settings.listen, tls=settings.tls_cert_file is not None)


async def open_admin(stack: AsyncExitStack, settings: Settings, sidecar: Instance) -> str:
    """Open the admin port; it is closed with the stack. Answers where it is, as a URL."""
    address = settings.admin_listen
    guard = Guard.of(address, settings.admin_token, settings.admin_hosts)
    runner = web.AppRunner(application(sidecar, guard), access_log=None, shutdown_timeout=ADMIN_STOP_S)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site: web.BaseSite
    if address.path:
        site = web.UnixSite(runner, address.path)
    else:
        site = web.TCPSite(runner, address.host, address.port)
    with listening(address, "SIDECAR_ADMIN_LISTEN"):
        if not address.path and (both := for_both_families(address.host, address.port)) is not None:
            site = web.SockSite(runner, both)
        await site.start()
    if (open_to := open_port(settings)) is not None:
        log.warning(open_to)
    return url_of(runner.addresses[0])


async def open_control(stack: AsyncExitStack, path: Path, sidecar: Sidecar) -> None:
    """Let the instance's own user change something, over a socket in the data directory; closed with the stack.

    Where there can be none (a full disk, a mount that knows no sockets) calls are served all the same.
    """
    try:
        listener = listen_privately(path)
    except SocketError as error:
        log.warning("%s; commands that change something need the instance to be stopped", error)
        return
    stack.callback(_let_go, path)
    runner = web.AppRunner(control(sidecar), access_log=None, shutdown_timeout=ADMIN_STOP_S)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.SockSite(runner, listener).start()


def _let_go(path: Path) -> None:
    with suppress(OSError):
        remove(path)


async def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT, and `SIDECAR_STOP_DELAY_S` longer; a second one ends the delay, the next everything.
    SIGHUP reads the listener's certificate anew. Raises what kept it from starting, a part's own error.

    Where there is no room to begin and `SIDECAR_ON_SPOOL_FULL` is `pass`, calls are served all the same, by one
    process.
    """
    with signals.stop_event() as stop:
        try:
            return await _whole(settings, stop, None)
        except _Unable as unable:
            found = unable.found
        if settings.on_spool_full is OnSpoolFull.REFUSE:
            raise NoRoomError(f"cannot start: {text_of(settings.data_dir, found)}")
        settings = replace(settings, workers=1)
        async with serving_early(settings, found) as early:
            early.admin_url = await open_admin(early.admin, settings, early)
            while await early.room(stop):
                try:
                    return await _whole(settings, stop, early)
                except _Unable as unable:
                    log.warning("still no room to begin: %s", unable)
        return FAILED if early.waiting else OK


class _Unable(Exception):
    """A start that found no room, or nothing that may be written."""

    def __init__(self, fault: BaseException, found: Trouble) -> None:
        super().__init__(str(fault))
        self.found = found


async def _whole(settings: Settings, stop: asyncio.Event, early: Early | None) -> int:
    opened = False
    try:
        async with running(settings, early) as sidecar:
            opened = True
            await _serve_until(stop, sidecar, settings)
    except (BaseExceptionGroup, *START_FAULTS) as error:
        # What a start raises passes the groups of the parts that are open already.
        fault = only_fault(error, START_FAULTS) if isinstance(error, BaseExceptionGroup) else error
        if opened or fault is None:
            raise
        found = None if early is not None and early.taken else no_room(settings.data_dir, fault)
        if found is not None:
            raise _Unable(fault, found) from fault
        raise fault from None
    # Records that the disk did not take until the end: whoever stopped us has to hear of it.
    return FAILED if sidecar.intake.lost_at_stop else OK


async def _serve_until(stop: asyncio.Event, sidecar: Sidecar, settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, _reload, sidecar.intake)
    await stop.wait()
    sidecar.stopping = True
    log.info("stopping", extra={"facts": {"stop_delay_s": settings.stop_delay_s, "stop_s": settings.stop_s}})
    if settings.stop_delay_s:
        # Whoever sends us calls learns by /readyz that they shall go elsewhere; those that come meanwhile are served.
        hurry = asyncio.Event()
        for number in signals.STOPPERS:
            loop.add_signal_handler(number, hurry.set)
        with suppress(TimeoutError):
            async with asyncio.timeout(settings.stop_delay_s):
                await hurry.wait()
        log.info("taking no more calls")
    for number in signals.STOPPERS:
        loop.add_signal_handler(number, _end_at_once, sidecar.intake)


def _reload(intake: Intake) -> None:
    log.info("SIGHUP: the listener's certificate is read anew; secrets and all other settings are those of the start")
    intake.reload()


def _end_at_once(intake: Intake) -> None:
    """What is committed stays committed, what is open is settled at the next start: as after a crash."""
    log.warning("asked a second time: ending at once")
    intake.end_at_once()
    os._exit(FAILED)


def run(settings: Settings) -> int:
    """Serve with these settings; the exit code. Raises the parts' own errors from starting."""
    logs.set_up(settings.log_level.value.upper())
    with asyncio.Runner(loop_factory=factory.loop_factory()) as runner:
        try:
            return runner.run(serve(settings))
        except BaseExceptionGroup as group:
            log.error("a part has died; stopped, so that nothing runs that no longer bills", exc_info=group)
            return FAILED
