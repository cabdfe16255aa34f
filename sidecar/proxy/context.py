"""What all calls of one proxy share, and the shapes of what it is given from outside."""

from __future__ import annotations

import logging
from asyncio import AbstractEventLoop
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic_ns, time_ns
from typing import Final, Protocol

from sidecar.gate.admission import Admission
from sidecar.model.exchange import Exchange, PlainExchange, Recorder, Release, Subscriber
from sidecar.model.seldom import Seldom
from sidecar.proxy.destinations import Destinations
from sidecar.proxy.drains import REASONS, Drains
from sidecar.proxy.headers import HeaderRules
from sidecar.proxy.upstream import Upstream
from sidecar.settings import OnDisconnect, ProxySettings
from sidecar.settings import Route as RouteSettings
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

    def by_target(self, target: str) -> Hashable | None:
        """All that it reads of a target: of two with the same it says the same. None where there is something to be
        counted."""
        ...


AttributeByBody = Callable[[Subscriber | None, Callable[[str], str | None]], Subscriber | None]
"""(who the head named, look-up of a member of the request's body) -> who pays."""

Route = Callable[[str, str], str | None]
"""(method, path) -> the pattern it belongs to."""


class ProxyMetrics(Protocol):
    """What the hop counts; one call per happening."""

    def request_rejected(self, reason: str) -> None: ...
    def upstream_retried(self) -> None: ...
    def upstream_failed(self, reason: str, upstream: str | None) -> None: ...
    def not_recorded(self, route: str) -> None: ...
    def redirected(self, what: str) -> None: ...
    def drains_changed(self, delta: int) -> None: ...
    def connections_changed(self, delta: int) -> None: ...
    def limit_reached(self, name: str) -> None: ...


class Unrecorded:
    """In the place of the recorder, for calls on a route with `record = false`: they are never let into the balance,
    and counted here. They have no id."""

    def __init__(self, counted: Callable[[str], None]) -> None:
        self._counted = counted

    def admit(self, exchange: Exchange | PlainExchange) -> bool:
        exchange.started_ns, exchange.started_mono_ns = time_ns(), monotonic_ns()
        self._counted((exchange.route if isinstance(exchange, Exchange) else exchange.shape.route) or "")
        return True

    def complete(self, exchange: Exchange | PlainExchange, release: Release | None) -> bool:
        return True


class OpenCall(Protocol):
    """A call under way, as the sweep and the stop see it."""

    deadline: float  # loop time

    def expired(self) -> None: ...
    def stop(self) -> None: ...


@dataclass(slots=True, frozen=True, kw_only=True)
class Reading:
    """What reads along with the calls to one upstream: whose API it is decides how usage and credentials are read."""

    taps: Taps
    attribute: Attribute
    plainly: PlainAttribution | None = None  # `attribute` for calls on the short way; None: none may take it


@dataclass(slots=True, eq=False, kw_only=True)
class Destination:
    """One upstream, with all that is its own."""

    name: str | None  # None: there is one only
    url: str  # as it was set, for people
    headers: HeaderRules
    upstream: Upstream | None  # None: calls that match no upstream
    reading: Reading
    timeout_s: float  # to the head of a response


@dataclass(slots=True, kw_only=True)
class Hop:
    """What all calls of one proxy share."""

    settings: ProxySettings
    rest: Destination  # what matches no other; of one upstream alone all calls
    others: Destinations[Destination] | None = None  # None: there is one only
    named: Sequence[Destination] = ()  # of `others`, without `rest`
    recorder: Recorder
    attribute_by_body: AttributeByBody | None = None  # None: no member of a body could say it
    route: Route
    metrics: ProxyMetrics
    loop: AbstractEventLoop
    gate: Admission | None = None  # None: no limit is set, and nothing is asked
    now: float = 0.0  # loop time as of the last sweep: good enough for deadlines, and free
    idle_until: float = field(init=False)  # when a call on which something moves now has been silent for too long
    calls: set[OpenCall] = field(default_factory=set)
    drains: Drains = field(init=False)
    unrecorded: Unrecorded = field(init=False)
    by_route: Mapping[str, RouteSettings] = field(init=False)
    seldom: Seldom = field(default_factory=Seldom)
    leaving: bool = False  # calls are taken, and each is the last on its connection
    stopping: bool = False
    idle: Callable[[], None] | None = None  # called when the last call is over

    def __post_init__(self) -> None:
        self.drains = Drains(self.settings.drains)
        self.use(self.settings)
        self.unrecorded = Unrecorded(self.metrics.not_recorded)

    def use(self, settings: ProxySettings) -> None:
        self.settings = settings
        self.tick(self.now)
        self.by_route = {route.pattern: route for route in settings.routes}

    def tick(self, now: float) -> None:
        """Time has passed."""
        self.now = now
        self.idle_until = now + self.settings.idle_timeout_s

    @property
    def headers(self) -> HeaderRules:
        """For what is the same whatever the upstream: the clients' addresses."""
        return self.rest.headers

    def choose(self, target: str, fields: RawHeaders) -> tuple[Destination, str]:
        """Which upstream a call is for, and the target as that one gets it."""
        return (self.rest, target) if self.others is None else self.others.choose(target, fields)

    def records(self, route: str | None) -> bool:
        """Whether calls on this route are recorded."""
        own = self.by_route.get(route) if route is not None else None
        return own is None or own.record

    def timeout_s(self, to: Destination, route: str | None) -> float:
        """How long the head of a response may take: the route's own time, or the upstream's."""
        own = self.by_route.get(route) if route is not None else None
        return to.timeout_s if own is None or own.timeout_s is None else own.timeout_s

    def disconnect_policy(self, route: str | None) -> OnDisconnect:
        """What to do when the client leaves a call on this route."""
        own = self.by_route.get(route) if route is not None else None
        return self.settings.on_disconnect if own is None or own.on_disconnect is None else own.on_disconnect

    def upstream_failed(self, to: Destination, reason: str, words: str) -> None:
        """A call got no response. `words` are ours or the system's, for a person."""
        self.metrics.upstream_failed(reason, to.name)
        calls = self.seldom.due(f"upstream {to.name} {reason}", self.loop.time())
        if calls is not None:
            facts = {"reason": reason, "upstream": to.url, "calls": calls}
            which = "the upstream" if to.name is None else f"the upstream {to.name}"
            log.warning(
                "%s gives no response: %s",
                which,
                words,
                extra={"facts": facts if to.name is None else {**facts, "name": to.name}},
            )

    def not_drained(self, limit: str) -> None:
        """The response of a client that left is not read on, though its usage was still to come."""
        self.metrics.limit_reached(limit)
        calls = self.seldom.due(limit, self.loop.time())
        if calls is not None:
            log.warning(
                "a response is not read on, so its usage stays unknown: %s",
                REASONS[limit],
                extra={"facts": {"limit": limit, "slots": self.drains.slots, "calls": calls}},
            )
