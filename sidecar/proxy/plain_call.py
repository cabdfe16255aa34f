"""The short way of a plain call: one request that came whole, and nothing to be judged.

Which way a request takes is decided before its first byte is parsed, by what came: a whole plain head (`plain_head`)
and its whole body, on a connection on which nothing else is under way. Where the body is still to come the client's
connection waits for it, a moment. All others go through `client_connection` and `call`.

From there on only four things go the short way: a whole plain response in one read; a document in pieces; a plain
stream, of which every read is whole chunks of whole events up to the last one; and the commit of the record. Whatever
else happens (another response, a client that leaves or is slow, a lost connection, a deadline, a stop) makes it a
`Call`, which is in phase `CONNECTING` where there is no upstream connection yet, or `WAITING` and has read nothing of
the response, or in phase `STREAMING` at the border of a chunk or between two pieces of a sized body, and *that* is told
what happened. So there is one set of rules for everything that can go wrong.

What the record says is worked out once for each shape of head; a call adds times, sizes and its two bodies, of which
the usage is read later and elsewhere (`model.exchange.PlainExchange`).
"""

from __future__ import annotations

import logging
from asyncio import Task, current_task
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic_ns
from typing import Any, Final, NamedTuple, Protocol

from aiohttp import HttpVersion11

from sidecar.gate.admission import Prepared
from sidecar.model.exchange import (
    HEADER_NAME_CHARS_MAX,
    HEADER_NAMES_CHARS_MAX,
    URL_CHARS_MAX,
    USER_AGENT_CHARS_MAX,
    Exchange,
    Gate,
    PlainExchange,
    RequestShape,
    ResponseShape,
)
from sidecar.proxy.call import Call
from sidecar.proxy.connecting import NotConnectedError, connect
from sidecar.proxy.context import NEVER, Destination, Hop, PlainAttribution
from sidecar.proxy.downstream import Downstream
from sidecar.proxy.headers import METER_ID, Peer, ResponseHead, trace_id
from sidecar.proxy.local_responses import LocalResponse
from sidecar.proxy.plain_head import CHUNKED, Aimed, PlainMessage, Shape
from sidecar.proxy.plain_requests import PlainRequests
from sidecar.proxy.plain_responses import PlainResponses
from sidecar.proxy.plain_stream import KEPT_BYTES_MAX, LAST_CHUNK, PlainStream, in_chunks, not_known_yet
from sidecar.proxy.request_body import IDEMPOTENT, may_change
from sidecar.proxy.response_parser import all_alike, chunk_of_read
from sidecar.proxy.upstream import Upstream, UpstreamConnection
from sidecar.usage import RawHeaders
from sidecar.usage.formats.content_encoding import is_one_step
from sidecar.usage.keeping import DocumentKeeping, Keeping, keeping
from sidecar.usage.plain_calls import fields_of
from sidecar.usage.response_reader import stream_starts

log = logging.getLogger(__name__)

BODY_BYTES_MAX: Final = 65_536  # of either body: it is kept until the usage was read
STREAM_BODIES_BYTES_MAX: Final = 32 << 20  # of all requests whose responses stream: kept until those are over
KEEPINGS_MAX: Final = 1_024  # remembered, by pairs of shapes
# Kinds of heads are learned when they come for the second time: of paths with an id in them each comes once.
SIGHTS = 2
# What a reader of usage asks of a request's head.
_READ: Final = frozenset({b"content-type", b"content-encoding"})

Fields = list[tuple[bytes, bytes]]


class PlainClient(Downstream, Protocol):
    """The client's connection, as a plain call sees it."""

    call: Call | PlainCall | None
    deadline: float
    plainly: bool  # nothing but plain requests has come, and nothing is in the way of the next one
    like: Shape[Any] | None  # of the last plain request

    def wait_for_rest(self, data: bytes) -> bool:
        """Keep the beginning of a plain request for the rest to come, which is told with it. False: it is not waited
        for."""
        ...


@dataclass(slots=True, eq=False)
class _Answer:
    """What is known of responses of one shape."""

    shape: ResponseShape
    stream_starts: tuple[bytes, ...]  # how a whole body begins that is to be read along, because it may be a stream


@dataclass(slots=True, eq=False)
class _Asked:
    """What is known of requests of one shape."""

    shape: RequestShape
    read: bool  # whether anybody reads the bodies
    idempotent: bool
    to: Destination
    upstream: Upstream
    timeout_s: float
    prepared: Prepared | None  # None: nobody asks whether it may be made
    answered: Shape[_Answer] | None = None  # what one was answered with last: the next one's is likely like it


class _Aim(NamedTuple):
    """What depends on a target."""

    to: Destination
    upstream: Upstream
    reading: PlainAttribution
    target: str  # as that upstream gets it, below its base
    line: bytes  # the request line that goes there
    authority: str | None
    url: str  # as a record says it
    route: str | None
    kind: Hashable  # the same where all is the same but for targets, lines and URLs


@dataclass(slots=True, frozen=True)
class _Message:
    """A plain request as the careful way would have parsed it."""

    method: str
    path: str
    raw_headers: RawHeaders
    version = HttpVersion11
    should_close = False
    upgrade = False
    chunked = False

    @property
    def headers(self) -> dict[str, str]:
        return {}  # asked for upgrades alone


class PlainCalls:
    """What the plain calls of one proxy share."""

    def __init__(self, hop: Hop, base: bytes) -> None:
        """`base`: of the one upstream's URL."""
        self.hop = hop
        self._base = base
        self._numbers = 0
        self.stream_body_bytes = 0  # of requests whose responses are under way in pieces
        self._learn()

    def forget(self) -> None:
        """Learn anew what calls are like: what was made of them may not hold any more. Their numbers go on."""
        self._requests.forget()
        self.responses.forget()
        self._learn()

    def _learn(self) -> None:
        hop = self.hop
        settings = hop.settings
        matters = frozenset[bytes]() if hop.gate is None else hop.gate.reads
        for to in (hop.rest, *hop.named):
            if to.reading.plainly is not None:
                matters |= to.reading.plainly.reads
        self._requests: PlainRequests[_Asked] = PlainRequests(
            describe=self._describe,
            aim=None if hop.others is not None and hop.others.by_host else self._aimed,
            authority=None if settings.preserve_host else hop.headers.authority,
            base=self._base,
            matters=matters,
            head_bytes_max=settings.head_bytes,
            fields_max=settings.head_fields_max,
            target_bytes_max=settings.target_bytes,
            sights=SIGHTS,
            not_passed=None if hop.others is None else lambda asked: asked.to.headers.not_passed,
            forward=hop.headers.forward,
            joined=hop.headers.joined,
        )
        dropped = frozenset({METER_ID}) if settings.meter_id_header else frozenset[bytes]()
        self.responses: PlainResponses[_Answer] = PlainResponses(
            describe=self._describe_response, dropped=dropped, sights=SIGHTS
        )
        self._keepings: dict[tuple[int, int], Keeping | DocumentKeeping | None] = {}

    def take(self, client: PlainClient, data: bytes) -> bool:
        """Let the call in and send it on, or have the client wait for the rest of it; False: it is none of ours, and
        nothing has happened."""
        hop = self.hop
        try:
            read = self._requests.read(data, client.peer, client.like)
        except Exception:
            log.exception("a request could not be read the short way; it goes the careful one")
            return False
        if read is None or len(hop.calls) >= hop.settings.calls_max:
            return False
        shape, wire, _, body, left, aimed, trace, chain = read
        client.like = shape
        if len(body) + left > BODY_BYTES_MAX:
            return False
        asked = shape.facts
        if left:  # without a connection at hand one is made while the body comes
            return asked.upstream.idle > 0 and client.wait_for_rest(data)
        connection = asked.upstream.take()
        if connection is None and asked.prepared is not None:
            return False  # limits are told whether anything of it was sent
        call = PlainCall(self, client, connection, asked, aimed, data, wire, body)
        if trace:
            call.trace_id = trace_id(trace)
        if chain:
            call.client_ip = asked.to.headers.client_ip(client.peer, chain)
        if connection is not None and asked.prepared is not None:
            call.gate = self._allowed(asked.prepared, body)
            if call.gate is None:
                connection.release()
                return False
        if not hop.recorder.admit(call):
            if call.gate is not None and hop.gate is not None:
                hop.gate.cancelled(call.gate)
            if connection is not None:
                connection.release()
            return False
        hop.calls.add(call)
        client.call = call
        client.deadline = NEVER
        if connection is None:
            call.connect()
        else:
            connection.owner = call
            connection.write(wire)
        return True

    def _allowed(self, prepared: Prepared, body: bytes) -> Gate | None:
        """None: it is asked the careful way."""
        gate = self.hop.gate
        if gate is None:
            return None
        try:
            return gate.quickly(prepared, body)
        except Exception:
            log.exception("whether a call may be made could not be decided the short way; the careful one decides")
            return None

    def keeping(self, asked: _Asked, response: ResponseShape, head: bytes) -> Keeping | DocumentKeeping | None:
        """What is kept of a body in answer to that, of which not all has come; None: it is to be read along."""
        shape = asked.shape
        key = shape.number, response.number
        try:
            return self._keepings[key]
        except KeyError:
            if len(self._keepings) >= KEEPINGS_MAX:
                self._keepings.clear()
            found = self._keepings[key] = keeping(
                asked.to.reading.taps, shape.method, shape.target, shape.fields, response.status, fields_of(head)
            )
            return found

    def _describe(self, method: str, target: str, fields: Fields, peer: object) -> tuple[_Asked, bytes] | None:
        """What the careful way makes of such a request; None where it has something to count or to change in each."""
        assert isinstance(peer, Peer)
        aim = self._aim(method, target, fields)
        if aim is None:
            return None
        hop, to, target = self.hop, aim.to, aim.target
        rules = to.headers
        agents = [value for name, value in fields if name.lower() == b"user-agent"]
        if _cut_in_record(fields) or any(len(value) > USER_AGENT_CHARS_MAX for value in agents):
            return None
        head = rules.request(fields, peer, authority=aim.authority)
        if len(head.fields) != len(fields):
            return None  # `Connection` takes some out
        attributed = aim.reading.plainly(head.fields, target, rules.client_ip(peer, None))
        if attributed is None:
            return None
        subscriber, dimensions = attributed
        try:
            tap = to.reading.taps.request(method, target, head.fields)
            if tap is not None and tap.may_ask and may_change(method, fields):
                return None
        except Exception:
            log.exception("a usage reader failed; such calls are handled with care")
            return None
        self._numbers += 1
        shape = RequestShape(
            number=self._numbers,
            method=method,
            target=target,
            fields=tuple(field for field in fields if field[0].lower() in _READ),
            read=tap is not None,
            url=aim.url,
            route=aim.route,
            request_headers=head.names,
            user_agent=rules.agent(head.user_agent),
            subscriber=subscriber,
            dimensions=dict(dimensions),
            upstream=to.name,
        )
        prepared = None
        if hop.gate is not None:
            prepared = hop.gate.prepare(
                method,
                target,
                fields,
                subscriber=subscriber,
                dimensions=dimensions,
                route=shape.route,
                upstream=to.name,
            )
        idempotent = head.idempotency_key or method in IDEMPOTENT
        timeout_s = hop.timeout_s(to, aim.route)
        return _Asked(shape, shape.read, idempotent, to, aim.upstream, timeout_s, prepared), aim.line + head.lines

    def _aimed(self, method: str, target: str) -> tuple[Hashable, Aimed] | None:
        found = self._aim(method, target)
        return None if found is None else (found.kind, Aimed(found.line.rstrip(), found.url, found.target))

    def _aim(self, method: str, target: str, fields: Sequence[tuple[bytes, bytes]] = ()) -> _Aim | None:
        """Where a call goes and what it is there; None where the careful way has something to count each time.
        `fields` choose an upstream where some are chosen by the host."""
        hop = self.hop
        to, target = hop.choose(target, fields)
        rules, reading = to.headers, to.reading
        if to.upstream is None or reading.plainly is None:
            return None
        line, authority = rules.request_line(method, target)
        if len(line) + len(rules.record_base) > URL_CHARS_MAX:
            return None
        who = reading.plainly.by_target(target)
        if who is None:
            return None
        url, path = rules.record_url(target)
        route = hop.route(method, path)
        if not hop.records(route):
            return None
        try:
            read_as = reading.taps.kind(method, target)
        except Exception:
            log.exception("a usage reader failed; such calls are handled with care")
            return None
        meant = None if hop.gate is None else hop.gate.meant(method, target, to.name)
        kind = method, to.name, route, who, read_as, meant
        return _Aim(to, to.upstream, reading.plainly, target, line, authority, url, route, kind)

    def _describe_response(self, status: int, fields: Fields) -> tuple[_Answer, bytes] | None:
        if _cut_in_record(fields):
            return None
        try:
            head = ResponseHead(self.hop.headers, fields, status=status)
        except ValueError:
            return None
        self._numbers += 1
        shape = ResponseShape(number=self._numbers, status=status, response_headers=head.names)
        types = [value for name, value in fields if name.lower() == b"content-type"]
        coded = any(name.lower() == b"content-encoding" for name, _ in fields)
        starts = () if coded else stream_starts(status, types[0].decode() if types else "")
        return _Answer(shape, starts), b"".join(head.parts)


def _cut_in_record(fields: Fields) -> bool:
    """Whether a record would keep the names in part, which is counted each time."""
    names = [len(name) for name, _ in fields]
    return max(names, default=0) > HEADER_NAME_CHARS_MAX or sum(names) > HEADER_NAMES_CHARS_MAX


class PlainCall(PlainExchange):
    """One call on the short way, and what its record will say: one object, since each costs as much as it does.

    It is recorded once `response` is set. Until it is let in nobody knows of it."""

    __slots__ = (
        "_aimed", "_asked", "_calls", "_closes", "_connecting", "_data", "_out", "_stream", "_wire", "client",
        "connection", "deadline",
    )  # fmt: skip

    upload_done: Final = True
    upload_came: Final = True
    __repr__ = object.__repr__  # the exchange's would show bodies, and the loop shows who failed

    def __init__(
        self,
        calls: PlainCalls,
        client: PlainClient,
        connection: UpstreamConnection | None,
        asked: _Asked,
        aimed: Aimed | None,
        data: bytes,
        wire: bytes,
        body: bytes,
    ) -> None:
        """`aimed`: its own target, where the shape's differ. `data`: the request as it came, `wire`: as it goes on."""
        # What its record says. `Recorder.admit` adds the id and the times, the response the rest.
        self.shape = asked.shape
        self.url = None if aimed is None or aimed.url == asked.shape.url else aimed.url
        self.client_ip = client.peer.ip
        self.trace_id = None
        self.request_bytes = len(body)
        self.request_body = body if asked.read else b""
        self.first_byte_ms = self.duration_ms = self.response = self.gate = None
        self.first_token_ns = 0
        self._stream: PlainStream | None = None  # its response, while that is under way
        # The call. `_closes` and `_out` belong to a response that is there.
        self._calls = calls
        self._asked = asked
        self._aimed = aimed
        self._data = data
        self._wire = wire
        self.client: PlainClient | None = client
        self.connection = connection
        self._connecting: Task[None] | None = None
        self.deadline = calls.hop.now + asked.timeout_s

    def began_at(self, mono_ns: int) -> None:
        """When its first bytes came, where it was not let in then."""
        self.started_ns -= self.started_mono_ns - mono_ns
        self.started_mono_ns = mono_ns

    def connect(self) -> None:
        """There is no connection at hand: make one, and send the request."""
        self.deadline = NEVER
        self._connecting = self._calls.hop.loop.create_task(self._connect())

    async def _connect(self) -> None:
        hop = self._calls.hop
        try:
            connection = await connect(hop, self._asked.upstream)
        except NotConnectedError as error:
            why = error.why
            self._handle_with_care(lambda call: call.unreachable(why))
            return
        except Exception:
            log.exception("a call could not be handled")
            self.failed()
            return
        if self._connecting is None:  # it is over, and this was done before it could be told so
            connection.release()
            return
        self._connecting = None
        self.connection = connection
        self.deadline = hop.now + self._asked.timeout_s
        connection.owner = self
        connection.write(self._wire)

    # -- the three things that go the short way --------------------------------------------------

    def upstream_data(self, data: bytes) -> None:
        stream = self._stream
        if stream is None:
            try:
                self._response_came(data)
            except Exception:
                log.exception("a response could not be taken the short way")
                if self._is_held:
                    self._cut()
                else:
                    self._response_unusual(data)
            return
        known = chunk_of_read(len(data))
        try:
            passes = (
                known is not None
                and data.startswith(known[0])
                and (
                    (
                        data.startswith((likeness := stream.likeness).start, at := known[2])
                        and likeness.rest(data, at + likeness.size)
                    )
                    or (
                        data.endswith(stream.ends)
                        and stream.nothing_in(data)
                        and (not likeness.tries or likeness.other(data, at))
                    )
                )
            )
        except Exception:
            log.exception("a usage reader failed; the response is read along")
            stream.nothing_in = not_known_yet
            self._response_unusual(data)
            return
        try:
            if passes:
                stream.body_bytes += known[1]  # type: ignore[index]
                self.deadline = self._calls.hop.idle_until
                try:
                    self.client.transport.write(data)  # type: ignore[union-attr]
                except RuntimeError:  # of uvloop, where the client is gone: `client_left` will tell
                    return
            elif stream.likeness.size and (size := all_alike(data, stream.likeness)):
                stream.body_bytes += size
                self.deadline = self._calls.hop.idle_until
                self.client.send(data)  # type: ignore[union-attr]
            else:
                self._stream_on(stream, data)
        except Exception:
            log.exception("a call could not be handled")
            self.failed()

    def _response_came(self, data: bytes) -> None:
        calls, client, connection = self._calls, self.client, self.connection
        read = calls.responses.read(data, None, self._asked.answered)
        if read is None or client is None or connection is None:
            self._response_unusual(data)
            return
        shape, out, head, body, left, _, _, keep_alive = read
        self._asked.answered = shape
        wire_bytes = len(body)
        if left == CHUNKED and body.endswith(LAST_CHUNK):
            document = self._document(shape.facts.shape, head, body)
            if document is not None:
                body, left = document, 0
        if left or wire_bytes > BODY_BYTES_MAX or (shape.coded and self._asked.read and not is_one_step(body)):
            if not self._stream_begins(read, client):
                self._response_unusual(data)
            return
        if self._asked.read and body.startswith(shape.facts.stream_starts):
            self._response_unusual(data)
            return
        hop = calls.hop
        self.first_byte_ms = self.duration_ms = (monotonic_ns() - self.started_mono_ns) / 1e6
        self.response_bytes = len(body)
        if self._asked.read:
            self.response_head = head
            self.response_body = body
        else:
            self.response_head = self.response_body = b""
        self._closes = hop.leaving or hop.stopping or not (client.plainly or client.may_keep_alive(False))
        if self._closes or hop.settings.meter_id_header:
            out = self._with_own_fields(out, len(out) - wire_bytes - 2)
        self.response = shape.facts.shape
        try:
            on_record = hop.recorder.complete(self, self._release)
        except Exception:
            self.response = None  # it is not on record, and will be by the other way
            raise
        # Only now: were something to go wrong, a call without connection and record could be neither ended nor resumed.
        self.connection = None
        self._data = self._wire = b""  # the record is kept for a while
        if shape.close:
            connection.discard()
        else:
            connection.release(keep_alive or None)
        if on_record:
            client.send(out)
            self._over()
        else:
            self.deadline = NEVER
            self._out = out

    def _document(self, facts: ResponseShape, head: bytes, body: bytes) -> bytes | None:
        """What is in the chunks of a response that has come whole; None where it has not, or is read as a stream."""
        found = in_chunks(body)
        if found is None or not found[1]:
            return None
        document = b"".join(found[0])
        if self._asked.read:
            keeping = self._calls.keeping(self._asked, facts, head)
            if not (isinstance(keeping, DocumentKeeping) and keeping.begins(document) and keeping.may_wait(found[0])):
                return None
        return document

    def _with_own_fields(self, out: bytes, at: int) -> bytes:
        """The response, and what is ours to say in it. `at`: where its empty line begins."""
        named = self._calls.hop.settings.meter_id_header
        ours = b"X-Meter-Id: " + self.id.encode() + b"\r\n" if named else b""
        if self._closes:
            ours += b"Connection: close\r\n"
        return b"%b%b%b" % (out[:at], ours, out[at:])

    def _response_unusual(self, data: bytes) -> None:
        self._handle_with_care(lambda call: call.upstream_data(data))

    def _stream_begins(self, read: PlainMessage[_Answer], client: PlainClient) -> bool:
        """Whether that is the beginning of a body that may go the short way; then it is on its way."""
        calls, asked = self._calls, self._asked
        hop = calls.hop
        if hop.leaving or hop.stopping or hop.settings.meter_id_header or client.full or not client.plainly:
            return False
        shape, out, head, body, left, _, _, keep_alive = read
        keeping = None
        if asked.read:
            if len(body) + left > KEPT_BYTES_MAX:
                return False
            keeping = calls.keeping(asked, shape.facts.shape, head)
            if keeping is None:
                return False
            if isinstance(keeping, Keeping) and (left != CHUNKED or hop.attribute_by_body is not None):
                return False
            if calls.stream_body_bytes + len(self.request_body) > STREAM_BODIES_BYTES_MAX:
                return False
        stream = PlainStream(shape.facts.shape, head, keeping, left if left == CHUNKED else len(body) + left)
        found = stream.pieces(body)
        if found is None or not stream.keep(found[0], last=found[1]):
            return False
        self._stream = stream
        calls.stream_body_bytes += len(self.request_body)
        stream.reusable = not shape.close
        stream.keep_alive = keep_alive or None
        self._closes = False
        self._wire = b""  # it cannot go once more
        self._data = self._data.partition(b"\r\n\r\n")[0]
        self.first_byte_ms = (monotonic_ns() - self.started_mono_ns) / 1e6
        self._stream_moved(stream, client, out, last=found[1])
        return True

    def _stream_on(self, stream: PlainStream, data: bytes) -> None:
        """More of a body, which has to be looked into."""
        client = self.client
        if stream.ended:
            self._behind_the_end(stream, data)
            return
        found = stream.pieces(data)
        if client is None or found is None or not stream.keep(found[0], last=found[1]):
            self._response_unusual(data)
        else:
            self._stream_moved(stream, client, data, last=found[1])

    def _stream_moved(self, stream: PlainStream, client: PlainClient, out: bytes, *, last: bool) -> None:
        if last or stream.ended:
            self._stream_ends(stream, client, out, last=last)
        else:
            self.deadline = self._calls.hop.idle_until
            client.send(out)

    def _stream_ends(self, stream: PlainStream, client: PlainClient, out: bytes, *, last: bool) -> None:
        """All of it has come, or its own end mark has; `out` is what is left of it for the client."""
        self.first_token_ns = stream.first_token_ns
        self.response_bytes = stream.body_bytes
        self.duration_ms = (monotonic_ns() - self.started_mono_ns) / 1e6
        if stream.keeping is not None:
            self.response_head = stream.head
            self.response_body = b"".join(stream.kept)
        else:
            self.response_head = self.response_body = b""
        self.response = stream.facts
        try:
            on_record = self._calls.hop.recorder.complete(self, self._release)
        except Exception:
            self.response = None  # likewise
            raise
        self._calls.stream_body_bytes -= len(self.request_body)
        stream.kept = []
        if last:  # as above, not before
            self._give_back(stream)
        elif self.connection is not None:
            self.connection.pause(True)  # what follows an end mark waits outside
        if not on_record:
            self.deadline = NEVER
            self._out = out
        elif last:
            client.send(out)
            self._over()
        else:
            self._end_mark_may_leave(stream, client, out)

    def _give_back(self, stream: PlainStream) -> None:
        """The connection, behind the last chunk."""
        self._stream = None
        self._data = b""
        connection, self.connection = self.connection, None
        if connection is not None:
            if stream.reusable:
                connection.release(stream.keep_alive)
            else:
                connection.discard()

    def _end_mark_may_leave(self, stream: PlainStream, client: PlainClient, out: bytes) -> None:
        """It is on record; the last chunk is still to come."""
        client.send(out)
        stream.trailing = True
        self.deadline = self._calls.hop.idle_until
        if self.connection is not None and not client.full:
            self.connection.pause(False)
        if stream.behind:
            self.upstream_data(b"".join(stream.behind))

    def _behind_the_end(self, stream: PlainStream, data: bytes) -> None:
        client = self.client
        if not stream.trailing:
            stream.behind.append(data)
        elif data == LAST_CHUNK and client is not None:
            self._give_back(stream)
            client.send(data)
            self._over()
        else:
            self._response_unusual(data)

    def exchange(self) -> Exchange:
        exchange = super().exchange()
        stream = self._stream
        if stream is not None and self.response is None:
            exchange.status = stream.facts.status
            exchange.response_headers = stream.facts.response_headers
        return exchange

    def _release(self, send: bool) -> None:
        """The record is on disk, or it is decided that the response goes without, or not at all."""
        client = self.client
        if client is None:
            return  # it has left, and the call with it
        stream = self._stream
        try:
            if send and stream is not None:
                self._end_mark_may_leave(stream, client, self._out)
            elif send:
                client.send(self._out)
                self._over()
            else:
                self._cut()
        except Exception:
            log.exception("a call could not be handled")
            self._cut()

    def _over(self) -> None:
        hop = self._calls.hop
        hop.calls.discard(self)
        client, self.client = self.client, None
        if client is not None:
            try:
                client.call_over(not self._closes, True)
            except Exception:
                log.exception("a connection cannot go on behind its call, and is closed")
                client.close_soon()
        if hop.idle is not None and not hop.calls:
            hop.idle()

    # -- everything else -------------------------------------------------------------------------

    def _handle_with_care(self, tell: Callable[[Call], None]) -> None:
        """Go on as a `Call`, which is told what happened."""
        hop, client, connection = self._calls.hop, self.client, self.connection
        task, self._connecting = self._connecting, None
        if client is None or (connection is None and task is None):
            return
        if task is not None and task is not current_task(hop.loop):
            task.cancel()
        hop.calls.discard(self)
        asked, shape = self._asked, self.shape
        head = self._data.partition(b"\r\n\r\n")[0]
        message = _Message(shape.method, head.split(b" ", 2)[1].decode(), fields_of(head))
        call = Call.resume(
            hop,
            client,
            message,
            self.exchange(),
            connection,
            body=self.request_body,
            again=self._wire if self._may_go_again else None,
            deadline=self.deadline,
            to=asked.to,
            target=shape.target if self._aimed is None else self._aimed.target,
            timeout_s=asked.timeout_s,
        )
        if client.call is self:  # else it has left
            client.call = call
        self.client = self.connection = None
        stream, self._stream = self._stream, None
        if stream is not None:
            if self.response is None:
                self._calls.stream_body_bytes -= len(self.request_body)
            call.stream_on(stream.head + b"\r\n\r\n", stream.body_bytes, recorded=stream.trailing)
            if stream.keeping is not None and not stream.trailing:
                call.read_along(
                    partial(stream.keeping.read_along, kept=stream.kept, first_token_ns=stream.first_token_ns)
                )
        tell(call)

    @property
    def _may_go_again(self) -> bool:
        return self.connection is not None and self.connection.used and self._asked.idempotent and bool(self._wire)

    @property
    def _is_held(self) -> bool:
        """Whether it is on record, or about to be, and its end has not left."""
        return self.response is not None and (self._stream is None or not self._stream.trailing)

    def _cut(self) -> None:
        """On record, and held: the client gets nothing."""
        if self.client is not None:
            self.client.reset()
        self._leave()

    def _leave(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.discard()
        self._over()

    def upstream_lost(self, clean: bool, reset: bool) -> None:
        if self._is_held:
            self.connection = None
            self._cut()
        else:
            self._handle_with_care(lambda call: call.upstream_lost(clean, reset))

    def upstream_full(self, full: bool) -> None:
        """All that there is to send is sent."""

    def client_left(self, error: BaseException | None) -> None:
        if self._is_held:
            self.client = None
            self._leave()
        else:
            self._handle_with_care(lambda call: call.client_left(error))

    def client_full(self, full: bool) -> None:
        if self._connecting is None and not self._is_held:
            self._handle_with_care(lambda call: call.client_full(full))

    def expired(self) -> None:
        self._handle_with_care(lambda call: call.expired())

    def stop(self) -> None:
        if self._is_held:
            self._cut()
        else:
            self._handle_with_care(lambda call: call.stop())

    def failed(self) -> None:
        if self._is_held:
            self._cut()
        else:
            self._handle_with_care(lambda call: call.failed())

    def pump(self) -> None:
        """The request came whole."""

    def upload_broke(self, own: LocalResponse) -> None:
        """The request came whole."""
