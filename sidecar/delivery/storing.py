"""`delivery.db` as one lane uses it: from the event loop, and patiently.

What must always hold: a step that found no room on the disk is asked for again until it is stored, and nothing of its
lane goes on meanwhile, so no verdict is lost to a full disk. Any other trouble with the file is the lane's: it opens
the file again here and believes what it says.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from sidecar.delivery.owner import Owner
from sidecar.delivery.state import StateFull
from sidecar.delivery.state.rows import Cursor, Redrive, Request, Sealing, Settlement, Turned, Unskip

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

FULL_RETRY_S = 1.0  # how often a full disk is asked again whether a verdict fits


class Storing:
    """The steps of one backend."""

    def __init__(self, name: str, owner: Owner) -> None:
        self._name, self._owner, self._state = name, owner, owner.state

    async def turn(
        self, settlements: Sequence[Settlement], begin: Sequence[Request], step: Sealing | None, now_s: float
    ) -> Turned:
        """What was said, what is offered again, what is sealed: one transaction."""
        ids = [request.id for request in begin]
        load = [request.id for request in begin if request.sealed is None]
        return await self._patiently(functools.partial(self._state.turn, settlements, ids, load, now_s, step))

    async def redrive(self, step: Redrive, now_s: float) -> list[int]:
        return await self._patiently(functools.partial(self._state.redrive, step, now_s))

    async def unskip(self, step: Unskip, now_s: float) -> list[int]:
        return await self._patiently(functools.partial(self._state.unskip, step, now_s))

    async def lines(self, request: int) -> list[bytes]:
        return await self._patiently(functools.partial(self._state.lines, request))

    async def start_cursor(self, instance: str) -> Cursor:
        return await self._patiently(functools.partial(self._state.start_cursor, self._name, instance))

    async def open_again(self) -> tuple[list[Cursor], list[Request]]:
        """A new connection, and all that it finds of this backend."""
        state, name = self._state, self._name
        await self._owner.in_state(state.reopen)
        cursors = await self._owner.in_state(functools.partial(state.cursors, name))
        return cursors, await self._owner.in_state(functools.partial(state.open_requests, name))

    async def _patiently(self, work: Callable[[], _T]) -> _T:
        told = False
        while True:
            try:
                return await self._owner.in_state(work)
            except StateFull as error:
                if not told:
                    _LOG.error(str(error), extra={"facts": {"backend": self._name}})
                told = True
                await asyncio.sleep(FULL_RETRY_S)
