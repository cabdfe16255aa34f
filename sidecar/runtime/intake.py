"""The half that serves: spool, recorder and hop of one process.

There is one in the only process, or one in each worker. It knows nothing of backends; what it commits it tells to
`committed`, and whoever bills reads it from disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sidecar.proxy import Proxy
from sidecar.runtime import factory
from sidecar.runtime.admin import Readiness
from sidecar.runtime.metrics import Metrics
from sidecar.settings import Address, Settings
from sidecar.spool import Snapshot, Spool
from sidecar.spool.recorder import SpoolRecorder
from sidecar.storage.sockets import listening


@dataclass(slots=True, kw_only=True)
class Traffic:
    """An open intake. `listen` lets calls in."""

    spool: Spool
    recorder: SpoolRecorder
    proxy: Proxy
    counted: Metrics
    stopping: bool = False

    async def snapshots(self) -> dict[str, Snapshot]:
        """Totals and last number of each slot that is written here, of this moment."""
        return {self.spool.instance: self.spool.snapshot()}

    async def metrics(self) -> Metrics:
        return self.counted

    @property
    def lost_at_stop(self) -> bool:
        """Whether records were left over that the disk did not take: known once the spool is closed."""
        return self.spool.unwritten > 0

    async def readiness(self) -> Readiness:
        health = self.recorder.health()
        notes = (health.reason,) if health.reason else ()
        if self.stopping:
            return Readiness(ready=False, state="stopping", notes=notes)
        return Readiness(ready=not self.recorder.refusing, state=health.state.value, notes=notes)

    def reload(self) -> None:
        """Read the listener's certificate anew."""
        self.proxy.reload_tls()

    def end_at_once(self) -> None:
        """Nothing to see to: this process is the one that ends."""


class Intaking(Protocol):
    """A hop that serves before there is a spool."""

    @property
    def instance(self) -> str: ...
    def take(self, spool: Spool) -> tuple[SpoolRecorder, Proxy]: ...


@asynccontextmanager
async def serving(
    settings: Settings,
    *,
    key: bytes,
    metrics: Metrics,
    committed: Callable[[], None],
    remembered_seq: Callable[[str], int] = lambda instance: 0,
    early: Intaking | None = None,
) -> AsyncIterator[Traffic]:
    """Open a slot and the hop behind it. Leaving is the drain: no new calls, open ones finish within
    `SIDECAR_STOP_S`, what they left is committed, the slot is let go. `early`: the hop that serves already. Raises the
    parts' own errors."""
    factory.raise_file_limit(settings)
    async with AsyncExitStack() as stack:
        instance = None if early is None else early.instance
        opening = partial(
            Spool.open, settings.data_dir, instance=instance, metrics=metrics, remembered_seq=remembered_seq
        )
        spool = await asyncio.to_thread(opening)
        await stack.enter_async_context(spool)
        if spool.stopped:
            metrics.lost("stopped", spool.stopped)
        spool.on_committed(committed)
        committed()  # what was settled or salvaged while it opened
        if early is not None:
            recorder, proxy = early.take(spool)
            stack.push_async_exit(recorder)
        else:
            recorder = await stack.enter_async_context(factory.recorder(settings, spool, metrics))
            proxy = factory.proxy(settings, recorder, metrics, key)
            await proxy.start()
        traffic = Traffic(spool=spool, recorder=recorder, proxy=proxy, counted=metrics)
        stack.push_async_callback(proxy.aclose)
        stack.push_async_callback(proxy.stop, settings.stop_s)
        stack.callback(partial(setattr, traffic, "stopping", True))
        factory.calm_collector()
        yield traffic


async def listen(proxy: Proxy, address: Address, *, tls: bool) -> str:
    """Open the port for calls; where it is, as a URL. Raises `SocketError`."""
    with listening(address, "SIDECAR_LISTEN"):
        if address.path:
            return url_of(await proxy.listen(path=address.path))
        return url_of(await proxy.listen(host=address.host, port=address.port), tls=tls)


def only_fault(
    group: BaseExceptionGroup[BaseException], known: tuple[type[BaseException], ...]
) -> BaseException | None:
    """What went wrong at a start, out of the groups of the parts that were open already: an error that says itself what
    is to be done. None where anything else is among them."""
    faults = [only_fault(e, known) if isinstance(e, BaseExceptionGroup) else e for e in group.exceptions]
    return faults[0] if all(isinstance(fault, known) for fault in faults) else None


def url_of(bound: tuple[str, int] | str, *, tls: bool = False) -> str:
    """`http://127.0.0.1:8080`, also for what listens everywhere; `unix:/path`."""
    if isinstance(bound, str):
        return f"unix:{bound}"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound[0], bound[0])
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{bound[1]}"
