"""What lanes and the work beside them are given by their owner: no more of it than this is known to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from sidecar.delivery.limits import Limits
from sidecar.delivery.ports import Metrics, SpoolReader
from sidecar.delivery.state import DeliveryState
from sidecar.delivery.types import Now
from sidecar.model.delivery import Backend

_T = TypeVar("_T")


class Owner(Protocol):
    """`Delivery`, as the lanes see it."""

    reader: SpoolReader
    state: DeliveryState
    metrics: Metrics
    chance: random.Random
    limits: Limits

    async def in_state(self, work: Callable[[], _T]) -> _T:
        """Do blocking work in the one thread that `delivery.db` belongs to."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start an attempt as a task of the owner's group."""
        ...

    def parked_some(self, backend: str, reason: str, records: int) -> None:
        """Count what was parked, and say so from time to time."""
        ...

    def held(self, backend: Backend) -> str | None:
        """Why a backend is sent nothing just now, although it could be."""
        ...

    def look(self) -> tuple[Now, bool]:
        """Both clocks, and whether the wall clock has stepped."""
        ...
