"""What all calls of one proxy share, and the shapes of what it is given from outside."""

from __future__ import annotations

import logging
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from sidecar.gate.admission import Admission
from sidecar.model.exchange import Recorder, Subscriber
from sidecar.model.seldom import Seldom
from sidecar.proxy.drains import REASONS, Drains
from sidecar.proxy.headers import HeaderRules
from sidecar.proxy.upstream import Upstream
from sidecar.settings import OnDisconnect, ProxySettings
from sidecar.usage import RawHeaders, Taps

log = logging.getLogger(__name__)

NEVER: Final = float("inf")  # no deadline

Attribute = Callable[[RawHeaders, str, str | None], tuple[Subscriber | None, Mapping[str, str]]]
"""(fields that go upstream, target, client's address) -> who pays, and what else the record says."""


class PlainAttribution(Protocol):
    """`attribute`, for calls that differ in nothing that matters from one that was seen before."""

    @property
    def reads(self) -> frozenset[bytes]:
        """Names (lower case) of all fields by which it answers; beside them it looks at the target alone."""
        ...

    def plainly(
        self, headers: RawHeaders, target: str, client_ip: str | None
    ) -> tuple[Subscriber | None, Mapping[str, str]] | None:
        """The same answer, and nothing is counted; None where each such call has something to be counted."""
        ...


AttributeByBody = Callable[[Subscriber | None, Callable[[str], str | None]], Subscriber | None]
"""(who the head named, look-up of a member of the request's body) -> who pays."""

Route = Callable[[str, str], str | None]
"""(method, path) -> the pattern it belongs to."""


class ProxyMetrics(Protocol):
    """What the hop counts; one call per happening."""

    def request_rejected(self, reason: str) -> None: ...
    def upstream_retried(self) -> None: ...
    def upstream_failed(self, reason: str) -> None: ...
    def redirected(self, what: str) -> None: ...
    def drains_changed(self, delta: int) -> None: ...
    def connections_changed(self, delta: int) -> None: ...
    def limit_reached(self, name: str) -> None: ...


class OpenCall(Protocol):
    """A call under way, as the sweep and the stop see it."""

    deadline: float  # loop time

    def expired(self) -> None: ...
    def stop(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class Hop:
    """What all calls of one proxy share."""

    settings: ProxySettings
    headers: HeaderRules
    upstream: Upstream
    recorder: Recorder
    taps: Taps
    attribute: Attribute
    attribute_by_body: AttributeByBody | None = None  # None: no member of a body could say it
    route: Route
    metrics: ProxyMetrics
    loop: AbstractEventLoop
    gate: Admission | None = None  # None: no limit is set, and nothing is asked
    now: float = 0.0  # loop time as of the last sweep: good enough for deadlines, and free
    calls: set[OpenCall] = field(default_factory=set)
    drains: Drains = field(init=False)
    seldom: Seldom = field(default_factory=Seldom)
    stopping: bool = False
    idle: Callable[[], None] | None = None  # called when the last call is over

    def __post_init__(self) -> None:
        self.drains = Drains(self.settings.drains)

    def disconnect_policy(self, route: str | None) -> OnDisconnect:
        """What to do when the client leaves a call on this route."""
        own = (found.on_disconnect for found in self.settings.routes if found.pattern == route)
        return next((policy for policy in own if policy is not None), self.settings.on_disconnect)

    def upstream_failed(self, reason: str, words: str) -> None:
        """A call got no response. `words` are ours or the system's, for a person."""
        self.metrics.upstream_failed(reason)
        calls = self.seldom.due(f"upstream {reason}", self.loop.time())
        if calls is not None:
            log.warning(
                "the upstream gives no answer: %s", words,
                extra={"facts": {"reason": reason, "upstream": self.settings.upstream_url, "calls": calls}},
            )  # fmt: skip

    def not_drained(self, limit: str) -> None:
        """The response of a client that left is not read on, though its usage was still to come."""
        self.metrics.limit_reached(limit)
        calls = self.seldom.due(limit, self.loop.time())
        if calls is not None:
            log.warning(
                "an answer is not read on, so its usage stays unknown: %s", REASONS[limit],
                extra={"facts": {"limit": limit, "slots": self.drains.slots, "calls": calls}},
            )  # fmt: skip
