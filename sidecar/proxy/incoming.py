"""What the head of a request comes to on the careful way: who gets it, the bytes that go upstream instead of it, how
its record begins, and whether we turn it away.

Nothing is kept, counted as a call or sent here; `Call.start` does that with what it is told. A plain call has the same
from look-ups (`PlainCalls`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.model.exchange import Exchange
from sidecar.model.target import is_authority
from sidecar.proxy import local_responses
from sidecar.proxy.aiohttp_compat import RawRequestMessage
from sidecar.proxy.context import Destination, Hop
from sidecar.proxy.headers import Peer, RequestHead, trace_id
from sidecar.proxy.local_responses import LocalResponse
from sidecar.proxy.request_body import IDEMPOTENT, head_of
from sidecar.usage import RawHeaders

# Not frozen, because one is made for each call of the careful way.


@dataclass(slots=True)
class Incoming:
    """One request, as its head says it."""

    to: Destination
    target: str  # as that upstream gets it
    head: bytes  # as it goes upstream
    fields: RawHeaders  # what there is to be read for the record
    exchange: Exchange
    recorded: bool  # calls on its route are
    idempotent: bool  # it may go a second time
    refused: LocalResponse | None  # None: it is passed on


def read_head(hop: Hop, message: RawRequestMessage, peer: Peer, *, switch: bool) -> Incoming:
    """`peer`: who sent it. `switch`: the protocol switch that it offers is passed on."""
    method, raw = message.method, message.raw_headers
    to, target = hop.choose(message.path, raw)
    rules = to.headers
    line, authority = rules.request_line(method, target)
    head = rules.request(raw, peer, upgrade=switch, http10=message.version.minor == 0, authority=authority)
    client_ip = rules.client_ip(peer, head.forwarded_for)
    url, path = rules.record_url(target)
    subscriber, dimensions = to.reading.attribute(head.fields, target, client_ip)
    exchange = Exchange(
        method=method,
        url=url,
        route=hop.route(method, path),
        request_headers=rules.names_for_record(head.names),
        client_ip=client_ip,
        user_agent=rules.agent(head.user_agent),
        trace_id=None if head.traceparent is None else trace_id(head.traceparent),
        subscriber=subscriber,
        dimensions=dimensions,
        upstream=to.name,
    )
    return Incoming(
        to,
        target,
        line + head.lines,
        head.fields,
        exchange,
        hop.records(exchange.route),
        head.idempotency_key or method in IDEMPOTENT,
        _refused(message, head, to),
    )


def head_for(size_bytes: int, message: RawRequestMessage, peer: Peer, to: Destination, target: str) -> bytes:
    """The head as it goes upstream before a body of another length than the client's."""
    line, authority = to.headers.request_line(message.method, target)
    fields = head_of(message.raw_headers, size_bytes)
    http10 = message.version.minor == 0
    return line + to.headers.request(fields, peer, upgrade=False, http10=http10, authority=authority).lines


def _refused(message: RawRequestMessage, head: RequestHead, to: Destination) -> LocalResponse | None:
    """What the parser lets through and we do not."""
    version, coding = message.version, head.transfer_encoding
    if version.major != 1 or version.minor > 1:
        return local_responses.BAD_VERSION
    if not is_authority(head.host):
        return local_responses.BAD_HOST
    if coding is not None and (version.minor == 0 or coding.strip().lower() != b"chunked"):
        return local_responses.AMBIGUOUS
    if message.method == "CONNECT":
        return local_responses.UNKNOWN_METHOD
    if to.upstream is None:
        return local_responses.NO_UPSTREAM
    return None
