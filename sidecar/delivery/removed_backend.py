"""What a backend had still to get when it was left out, or when its directory was copied: parked, and pending again.

A backend that is no longer configured: all that is pending for it is parked (`removed`) and stays visible; taken up
again, what was parked so is pending again. A copied directory: what its original may deliver is parked (`copied`), and
while nobody has decided, nothing goes to a backend that may have had it from elsewhere and would not know it again.

Parking goes in small steps beside the workers and continues where it stopped. Records made later are none of its
business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Final

import orjson

from sidecar.delivery.retry_policy import park_all
from sidecar.delivery.rows import Cursor, NewParked, Sealing, Settlement, StateError, Turn
from sidecar.delivery.store import DeliveryStore
from sidecar.delivery.tail import Item, items_of
from sidecar.delivery.types import REMOVED, Parking, SpoolReader
from sidecar.model.delivery import Abilities, Dedup
from sidecar.spool.types import SpoolError

_LOG = logging.getLogger(__name__)
COPIED: Final = "copied"  # parked: pending when the directory was copied, and left to the original
RETRY_S: Final = 60.0  # after a file that cannot be read or written
SLICE: Final = 200  # requests or records parked in one transaction: a few milliseconds

WallClock = Callable[[], float]
Told = Callable[[int], None]
"""How many records were parked in one step, as soon as it is on disk: the next one may fail."""


def may_double(abilities: Abilities, *, copied_s: float, now_s: float, margin_s: float) -> bool:
    """Whether a delivery that another instance may have made since `copied_s` would count again.

    What was not sealed when the copy was made may have been cut into other requests there, so a request's key tells
    only where a request is one event.
    """
    if abilities.knows_records:
        return False
    if abilities.dedup is Dedup.NONE:
        return True
    window_s = abilities.dedup_window_s
    if window_s is not None and not 0 <= now_s - copied_s < window_s - margin_s:
        return True
    return abilities.dedup is Dedup.REQUEST_KEY and abilities.events_max != 1


async def part_with(
    name: str, store: DeliveryStore, reader: SpoolReader, wall_s: WallClock, ends: Mapping[str, int]
) -> None:
    """Park everything sealed for a backend, and everything in the spools up to where they ended at the start."""
    steps: list[int] = []
    while True:
        try:
            await _park_pending(name, store, reader, wall_s, ends, REMOVED, steps.append)
            await store.run(store.parted, name)
            break
        except (StateError, SpoolError, OSError) as error:
            _LOG.error("a removed backend's records cannot be parked yet: %s", error)
            await asyncio.sleep(RETRY_S)
    if steps:
        _LOG.warning(
            "a backend is no longer configured; what it had still to get is parked",
            extra={"facts": {"backend": name, "records": sum(steps)}},
        )


async def leave(
    name: str, store: DeliveryStore, reader: SpoolReader, wall_s: WallClock, ends: Mapping[str, int], told: Told
) -> None:
    """Park what a backend had still to get of these spools, up to these numbers: another instance delivers it."""
    await _park_pending(name, store, reader, wall_s, ends, COPIED, told)


async def _park_pending(
    name: str,
    store: DeliveryStore,
    reader: SpoolReader,
    wall_s: WallClock,
    ends: Mapping[str, int],
    reason: str,
    told: Told,
) -> None:
    cursors = {cursor.instance: cursor for cursor in await store.run(store.cursors, name)}
    # Of a copy only what was in it: what it recorded itself is nobody else's. A removed backend gets nothing more.
    mine = {cursor.id for instance, cursor in cursors.items() if instance in ends or reason == REMOVED}
    await _park_sealed(name, store, wall_s, mine, reason, told)
    for instance, end in ends.items():
        # A spool that nothing was read of has a place too: its records are as pending as any.
        known = cursors.get(instance)
        cursor = known if known is not None else await store.run(store.start_cursor, name, instance)
        await _park_unread(cursor, store, reader, wall_s, end, reason, told)


async def _park_sealed(
    name: str, store: DeliveryStore, wall_s: WallClock, cursors: Collection[int], reason: str, told: Told
) -> None:
    requests = [request for request in await store.run(store.open_requests, name) if request.cursor in cursors]
    seen: set[tuple[int, int]] = set()  # a record of several events is in several requests
    for start in range(0, len(requests), SLICE):
        settled = []
        slice_ = requests[start : start + SLICE]
        for request in slice_:
            maybe = request.tries.risky or request.under_way or reason == COPIED
            decision = park_all(request.tries, len(request.members), Parking(reason, maybe_taken=maybe))
            settled.append(Settlement(request=request, decision=decision, history=request.history))
        await store.run(store.commit, Turn(now_s=wall_s(), settled=settled))
        before = len(seen)
        seen.update((request.cursor, member.seq) for request in slice_ for member in request.members)
        told(len(seen) - before)


async def _park_unread(
    cursor: Cursor,
    store: DeliveryStore,
    reader: SpoolReader,
    wall_s: WallClock,
    end: int,
    reason: str,
    told: Told,
) -> None:
    while cursor.seq < end:
        groups = await asyncio.to_thread(reader.read, cursor.instance, cursor.seq)
        items = [item for item in items_of(groups, cursor.seq) if item.seq <= end]
        if not items:
            break
        for start in range(0, len(items), SLICE):
            piece = items[start : start + SLICE]
            parked = [_parked(item, reason) for item in piece if item.hole is None]
            holes = [item.hole for item in piece if item.hole is not None]
            sealing = Sealing(cursor=cursor.id, from_seq=cursor.seq, to_seq=piece[-1].seq, parked=parked, holes=holes)
            await store.run(store.commit, Turn(now_s=wall_s(), sealing=sealing))
            cursor = replace(cursor, seq=piece[-1].seq)
            told(len(parked))


def _parked(item: Item, reason: str) -> NewParked:
    try:
        record_id = str(orjson.loads(item.line)["id"])
    except (ValueError, KeyError, TypeError):
        record_id = f"seq:{item.seq}"
    return NewParked(seq=item.seq, record_id=record_id, reason=reason, line=item.line, maybe_taken=reason == COPIED)
