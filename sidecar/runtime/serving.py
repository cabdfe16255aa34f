"""A process that serves: the hop and its recorder, and the link over which it tells what it saw. No file, no database,
no delivery.

It ends by draining: when its supervisor says so, and when that is gone.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from sidecar.gate.admission import Admission, Policy
from sidecar.proxy import Proxy
from sidecar.proxy.tls import why_unreadable
from sidecar.runtime import factory, gate_factory
from sidecar.runtime.hop_counts import HopCounts
from sidecar.runtime.seam_link import Link
from sidecar.runtime.seam_protocol import Address, Status
from sidecar.runtime.wire import CANNOT_START, LOST, Wire
from sidecar.settings import Settings
from sidecar.settings.renewal import renewed
from sidecar.spool.recorder import Recorder

log = logging.getLogger("sidecar.serving")

MEET_S: Final = 10.0  # how long a start waits for whoever meters; then calls are served all the same
TICK_S: Final = 1.0  # how old what the hop counted may be that nobody asked for


@dataclass(slots=True, kw_only=True)
class Serving:
    """An open hop. `proxy.listen` lets calls in."""

    settings: Settings
    key: bytes
    proxy: Proxy
    recorder: Recorder
    link: Link
    counts: HopCounts
    gate: Admission | None = None  # also while no limit is set any more, for the calls that are open
    left: int = 0  # records that nobody took until the end

    def status(self, asked: int) -> Status:
        health = self.recorder.health()
        return Status(
            asked,
            self.recorder.unseen,
            self.counts.connections,
            self.counts.drains,
            health.state.value,
            health.reason,
            self.recorder.refusing,
        )

    async def renew(self, read: Callable[[], Settings]) -> None:
        """Read the settings anew, and use what of them may change while calls go on. They were judged by who asks for
        it; what cannot be used all the same changes nothing."""
        self.proxy.reload_tls()
        self.proxy.reload_secrets()
        try:
            settings, policy = await asyncio.to_thread(self._read_anew, read)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with them, calls go on by the old ones
            log.error("the settings were not reloaded, the old ones hold: %s", error)
            return
        gate = self.gate
        if policy is not None and gate is None:
            gate = gate_factory.admission(policy)
        try:
            self.proxy.renew(
                settings=settings.proxy,
                recorder=self.recorder if gate is None else gate_factory.GatedRecorder(self.recorder, gate),
                taps=factory.telling_taps(settings, self.counts, factory.routes(settings)),
                readings=factory.readings(settings, self.counts, self.key),
                route=factory.routes(settings).match,
                gate=gate if policy is not None else None,
            )
        except (OSError, ValueError) as error:
            log.error("the settings were not reloaded, the old ones hold: %s", why_unreadable(error))
            return
        if policy is not None and gate is not None:
            if self.gate is None:
                self.gate = gate
                self.link.ask_for(gate)
            else:
                gate.renew(policy)
        self.settings = settings

    def _read_anew(self, read: Callable[[], Settings]) -> tuple[Settings, Policy | None]:
        settings, _ = renewed(self.settings, read())
        return settings, gate_factory.policy(settings, factory.usage_taps(settings, lambda kind: None), self.key)


@asynccontextmanager
async def serving(
    settings: Settings, *, key: bytes, address: Address, source: bytes, worker: int = 0
) -> AsyncIterator[Serving]:
    """Open the hop. Leaving is the drain: no new calls, open ones finish within `SIDECAR_STOP_S`, what they left is
    acknowledged. Raises what certificates that cannot be read raise."""
    async with AsyncExitStack() as stack:
        counts = HopCounts()
        policy = gate_factory.policy(settings, factory.usage_taps(settings, lambda kind: None), key)
        gate = None if policy is None else gate_factory.admission(policy)
        link = Link(
            address,
            source,
            worker,
            lambda asked: found.status(asked),  # noqa: PLW0108 - it is made below
            gate,
        )
        recorder = Recorder(link, counts, settings.spool, source=source)
        given = recorder if gate is None else gate_factory.GatedRecorder(recorder, gate)
        proxy = factory.proxy(settings, given, counts, key, gate)
        await proxy.start()
        found = Serving(settings=settings, key=key, proxy=proxy, recorder=recorder, link=link, counts=counts, gate=gate)
        link.start(recorder)
        stack.push_async_callback(_part, found)
        ticking = asyncio.create_task(_tick(found))
        stack.callback(ticking.cancel)
        stack.push_async_callback(proxy.aclose)
        stack.push_async_callback(proxy.stop, settings.serve.stop_s)
        try:
            async with asyncio.timeout(MEET_S):
                await link.met.wait()
        except TimeoutError:
            log.error("the metering process does not answer: calls are served, and what they leave waits in memory")
        factory.calm_collector()
        yield found


async def _part(found: Serving) -> None:
    """The last acknowledgements, and a clean end of the link. What was read there is the other end's to see to."""
    await found.recorder.aclose()
    if not await found.link.aclose():
        found.left = found.recorder.waiting_records
        if found.left:
            log.error(
                "%d calls were served and their records are lost: nobody took them until the end",
                found.left,
                extra={"facts": {"calls": found.left, "kept_in_balance": False}},
            )


async def _tick(found: Serving) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        try:
            found.recorder.flush()
            if found.gate is not None and found.gate.has_to_tell:
                found.link.tell_gate()  # a lease lasts until here
        except Exception:
            log.exception("what was counted could not be told; the next turn tries again")


async def serve(
    settings: Settings,
    *,
    key: bytes,
    address: Address,
    source: bytes,
    worker: int,
    listeners: Sequence[socket.socket],
    wire_socket: socket.socket,
    read: Callable[[], Settings] | None = None,
) -> int:
    """Serve on the given sockets until told to stop; the exit code. `read`: reads the settings anew."""
    wire = await Wire.over(wire_socket)
    opened = False
    try:
        async with serving(settings, key=key, address=address, source=source, worker=worker) as found:
            for listener in listeners:
                await found.proxy.listen(sock=listener)
            opened = True
            wire.send(ready=True)
            while (told := await wire.receive()) is not None and told.get("do") != "stop":
                if told.get("do") == "leave":
                    found.proxy.leave()
                elif told.get("do") == "reload":
                    if read is None:
                        found.proxy.reload_tls()
                        found.proxy.reload_secrets()
                    else:
                        await found.renew(read)
            if told is None:
                log.warning("the supervisor is gone: open calls are finished, and no more are taken")
    except OSError as error:
        if opened:
            raise
        wire.send(cannot=f"cannot start: {error}", code=1)
        await wire.aclose()
        return CANNOT_START
    await wire.aclose()
    return LOST if found.left else 0
