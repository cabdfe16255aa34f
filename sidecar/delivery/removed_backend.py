"""Parting with a backend that is no longer configured: all that it had still to get is parked, and stays visible.

Taking it up again: what was parked so is pending again.

Parting runs once after a start without it, in small steps beside the lanes, and goes on where it stopped. Records made
later are none of its business.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol, TypeVar

import orjson

from sidecar.delivery.copied import COPIED
from sidecar.delivery.owner import Owner
from sidecar.delivery.ports import SpoolReader
from sidecar.delivery.retry_policy import park_all
from sidecar.delivery.state import DeliveryState, StateError
from sidecar.delivery.state.rows import Cursor, NewParked, Parked, Sealing, Settlement
from sidecar.delivery.types import REMOVED, Now, Parking
from sidecar.spool.types import SpoolError

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
RETRY_S: Final = 60.0  # after a file that cannot be read or written
SLICE: Final = 200  # requests or records parked in one transaction: a few milliseconds


class Books(Protocol):
    """What parking needs: a running delivery has it, and so has a command that holds the lock."""

    @property
    def reader(self) -> SpoolReader: ...

    @property
    def state(self) -> DeliveryState: ...

    async def in_state(self, work: Callable[[], _T]) -> _T: ...

    def look(self) -> tuple[Now, bool]: ...


async def part_with(name: str, owner: Owner, ends: Mapping[str, int]) -> None:
    """Park everything sealed for a backend, and everything in the spools up to where they ended at the start."""
    while True:
        try:
            await _park_all(name, owner, ends)
        except (StateError, SpoolError, OSError) as error:
            _LOG.error("a removed backend's records cannot be parked yet: %s", error)
            await asyncio.sleep(RETRY_S)
        else:
            return


class Returning(Protocol):
    """A lane, as far as it is needed here."""

    async def take_back(self, rows: Sequence[Parked]) -> int: ...


class Desk(Owner, Protocol):
    def parked(self, *, backend: str | None, reason: str | None, after: int, limit: int) -> list[Parked]: ...


async def take_back(name: str, lane: Returning, owner: Desk) -> None:
    """Let go what was parked because a backend was left out: it is configured again. Runs once after every start, so
    that one that was cut short is finished; what may have been taken and would not be recognised stays."""
    count: int | None = None
    while count is None:
        try:
            count = await _take_back(name, lane, owner)
        except (StateError, SpoolError, OSError) as error:
            _LOG.error("what a backend had still to get when it was left out cannot be taken up yet: %s", error)
            await asyncio.sleep(RETRY_S)
    if count:
        _LOG.warning(
            "a backend is configured again; what was parked when it was left out is pending again",
            extra={"facts": {"backend": name, "events": count}},
        )


async def _take_back(name: str, lane: Returning, owner: Desk) -> int:
    count = after = 0
    while True:
        look = functools.partial(owner.parked, backend=name, reason=REMOVED, after=after, limit=SLICE)
        page = await asyncio.to_thread(look)
        if page:
            count += await lane.take_back(page)
        if len(page) < SLICE:
            return count
        after = page[-1].id


async def leave(name: str, owner: Books, ends: Mapping[str, int]) -> int:
    """Park what a backend had still to get of these spools, up to these numbers: another instance delivers it."""
    cursors = {cursor.instance: cursor for cursor in await owner.in_state(lambda: owner.state.cursors(name))}
    mine = {cursor.id for instance, cursor in cursors.items() if instance in ends}
    count = await _park_sealed(name, owner, COPIED, mine)
    for instance, end in ends.items():
        count += await _park_rest(cursors.get(instance) or await _begun(name, owner, instance), owner, end, COPIED)
    return count


async def _begun(name: str, owner: Books, instance: str) -> Cursor:
    """A place in a spool that nothing was read of: its records are as pending as any."""
    return await owner.in_state(functools.partial(owner.state.start_cursor, name, instance))


async def _park_all(name: str, owner: Owner, ends: Mapping[str, int]) -> None:
    count = await _park_sealed(name, owner)
    cursors = {cursor.instance: cursor for cursor in await owner.in_state(lambda: owner.state.cursors(name))}
    for instance, end in ends.items():
        count += await _park_rest(cursors.get(instance) or await _begun(name, owner, instance), owner, end)
    await owner.in_state(functools.partial(owner.state.parted, name))
    if count:
        _LOG.warning(
            "a backend is no longer configured; what it had still to get is parked",
            extra={"facts": {"backend": name, "records": count}},
        )


async def _park_sealed(name: str, owner: Books, reason: str = REMOVED, of: Collection[int] | None = None) -> int:
    state, count = owner.state, 0
    requests = await owner.in_state(lambda: state.open_requests(name))
    if of is not None:
        requests = [request for request in requests if request.cursor in of]
    for start in range(0, len(requests), SLICE):
        settlements = []
        for request in requests[start : start + SLICE]:
            maybe = request.tries.risky or request.under_way or reason == COPIED
            decision = park_all(request.tries, len(request.members), Parking(reason, maybe_taken=maybe))
            settlements.append(Settlement(request=request, decision=decision, history=request.history))
            count += request.records
        now = owner.look()[0].wall_s
        await owner.in_state(functools.partial(state.turn, settlements, (), (), now))
    return count


async def _park_rest(cursor: Cursor, owner: Books, end: int, reason: str = REMOVED) -> int:
    reader, state, count = owner.reader, owner.state, 0
    while cursor.seq < end:
        groups = await asyncio.to_thread(functools.partial(reader.read, cursor.instance, cursor.seq))
        lines = [
            (seq, line)
            for group in groups
            for seq, line in enumerate(group.lines, group.first_seq)
            if cursor.seq < seq <= end
        ]
        if not lines:
            break
        for start in range(0, len(lines), SLICE):
            piece = lines[start : start + SLICE]
            parked = [
                NewParked(seq=s, record_id=_id(line, s), reason=reason, line=line, maybe_taken=reason == COPIED)
                for s, line in piece
            ]
            step = Sealing(cursor=cursor.id, from_seq=cursor.seq, to_seq=piece[-1][0], parked=parked)
            await owner.in_state(functools.partial(state.seal, step, owner.look()[0].wall_s))
            cursor = replace(cursor, seq=piece[-1][0])
            count += len(piece)
    return count


def _id(line: bytes, seq: int) -> str:
    try:
        return str(orjson.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        return f"seq:{seq}"
