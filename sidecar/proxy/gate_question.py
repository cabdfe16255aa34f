"""What one call asks of the gate: whether it may be made, and how much of a limit it takes.

The call reads of its body what the gate wants to see of it (`RequestBody.look_ahead`), puts the question, and waits in
phase `ADMISSION` until the verdict comes. What was set aside by it is corrected here once more when the call ends:
where nothing went upstream all of it is free again, and where the client never finished its body only what came counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sidecar.gate.admission import Admission, Verdict, Weighed
from sidecar.gate.counters import DENIED, UNDECIDED
from sidecar.gate.estimate import READ_BYTES_MAX
from sidecar.model.exchange import Exchange, Gate
from sidecar.proxy.context import AttributeByBody
from sidecar.proxy.request_body import RequestBody
from sidecar.usage import RawHeaders


class GateQuestion:
    """Whether one call may be made. `verdict`: None: that is not known yet."""

    __slots__ = ("_exchange", "_gate", "_length", "_prepared", "_weighed", "reads_body", "sent", "verdict")

    def __init__(self, gate: Admission, exchange: Exchange, target: str, fields: RawHeaders) -> None:
        """`fields`: of the head as it came. `target`: as the upstream gets it."""
        self._gate = gate
        self._exchange = exchange
        self._prepared = gate.prepare(
            exchange.method,
            target,
            fields,
            subscriber=exchange.subscriber,
            dimensions=exchange.dimensions,
            route=exchange.route,
            upstream=exchange.upstream,
        )
        self._length, may_wait = _body_ahead(fields)
        self.reads_body = self._prepared.reads_body and may_wait  # what the gate is asked waits for some of it
        self._weighed: Weighed | None = None
        self.verdict: Verdict | None = None
        self.sent = False  # some of the call has gone upstream

    @property
    def is_put(self) -> bool:
        return self._weighed is not None

    @staticmethod
    def is_enough(body: RequestBody) -> bool:
        """Whether as much of the body has come as is looked at."""
        return body.done or body.size_bytes >= READ_BYTES_MAX

    def put(self, body: RequestBody | None, by_body: AttributeByBody | None, then: Callable[[Verdict], None]) -> None:
        """Ask, by what has come of the body. `then` is told the verdict, which may be before this returns."""
        gate, exchange = self._gate, self._exchange
        who = None if by_body is None else (lambda member: by_body(exchange.subscriber, member))
        came = b"" if body is None else body.ahead
        weighed = self._weighed = gate.weigh(self._prepared, came, self._length, who)
        verdict = gate.at_once(weighed)
        if verdict is None:
            gate.ask(weighed, exchange.id, then)
        else:
            then(verdict)

    def undecided(self) -> Verdict:
        """What holds where a fault of ours keeps it from being decided."""
        prepared = self._prepared
        return self._gate.undecided(prepared.method, prepared.target, prepared.upstream)

    def of_message(self) -> Gate | None:
        """For the record of a message, where the call is a socket by now."""
        gate, weighed = self._exchange.gate, self._weighed
        return None if gate is None or weighed is None else self._gate.of_message(weighed, gate)

    def too_late(self, verdict: Verdict) -> None:
        """The verdict came when the call was over."""
        self._gate.cancelled(verdict.gate)

    def settle(self, body: RequestBody | None) -> None:
        """The call ends: its record says what was decided, and what is set aside for it."""
        exchange, weighed = self._exchange, self._weighed
        if not self.sent:
            self._take_back()
        elif body is not None and not body.done and weighed is not None:
            assert exchange.gate is not None
            exchange.gate = self._gate.unfinished(weighed, exchange.gate, body.size_bytes)

    def _take_back(self) -> None:
        given = self._exchange.gate
        if given is None:
            self._exchange.gate = Gate(UNDECIDED, source="", sent=False)
        elif given.decision != DENIED:
            self._gate.cancelled(given)
            self._exchange.gate = replace(given, reserved={}, sent=False)


def _body_ahead(fields: RawHeaders) -> tuple[int | None, bool]:
    """The length of the body, where it is said, and whether it may be waited for: a client that waits for a 100 sends
    none before the upstream has spoken."""
    length, waits = None, True
    for name, value in fields:
        lower = name.lower()
        if lower == b"content-length" and value.isdigit():
            length = int(value)
        elif lower == b"expect":
            waits = False
    return length, waits
