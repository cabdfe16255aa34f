"""The request's way: let in, tapped, sent on, and its body after it as far as the upstream takes it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from sidecar.model.exchange import Exchange, Outcome
from sidecar.proxy import local_responses
from sidecar.proxy.aiohttp_compat import EMPTY_PAYLOAD, RawRequestMessage, StreamReader
from sidecar.proxy.context import Hop
from sidecar.proxy.ending import Ending
from sidecar.proxy.headers import trace_id
from sidecar.proxy.include_usage import Gathering, head_of, may_change
from sidecar.proxy.local_responses import OwnAnswer
from sidecar.proxy.request_body import Kept, Upload
from sidecar.proxy.upstream import TIMEOUT, UnreachableError, UpstreamConnection
from sidecar.usage import RawHeaders, RequestTap

if TYPE_CHECKING:
    from sidecar.proxy.client_connection import Client

log = logging.getLogger(__name__)

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY", "PROPFIND", "REPORT"})


class Sending(Ending):
    """The half of a call that faces the client's request."""

    __slots__ = (
        "_asked", "_gathering", "_head", "_heard", "_idempotent", "_idle_timeout_s", "_kept", "_payload", "_retried",
        "_upgrade", "_upload",
    )  # fmt: skip

    def __init__(self, hop: Hop, client: Client, message: RawRequestMessage, payload: StreamReader) -> None:
        super().__init__(hop, client, message, upload_done=payload is EMPTY_PAYLOAD)
        self._payload = payload
        self._upload: Upload | None = None
        self._gathering: Gathering | None = None
        self._asked = False  # usage was asked for on the client's behalf
        self._head = b""
        self._kept: Kept | None = None  # the request as sent, while a retry may need it
        self._idle_timeout_s = hop.rules.idle_timeout_s
        self._upgrade = False
        self._idempotent = False
        self._heard = False  # a byte of the answer has come
        self._retried = False

    def start(self) -> None:
        """Let the call in and send it on."""
        hop, message, client = self._hop, self._message, self.client
        assert client is not None
        rules = hop.headers
        method, target = message.method, message.path
        if message.upgrade and not self._http10:
            self._upgrade = client.may_switch(message)
        line, authority = rules.request_line(method, target)
        raw = message.raw_headers
        head = rules.request(raw, client.peer, upgrade=self._upgrade, http10=self._http10, authority=authority)
        client_ip = rules.client_ip(client.peer, head.forwarded_for)
        url, path = rules.record_url(target)
        fields = head.fields
        subscriber, dimensions = hop.attribute(fields, target, client_ip)
        exchange = self._exchange = Exchange(
            method=method,
            url=url,
            route=hop.route(method, path),
            request_headers=head.names,
            client_ip=client_ip,
            user_agent=rules.agent(head.user_agent),
            trace_id=None if head.traceparent is None else trace_id(head.traceparent),
            subscriber=subscriber,
            dimensions=dimensions,
        )
        if not hop.recorder.admit(exchange):
            self._recorded = self._over = True
            client.reject(local_responses.SPOOL_FULL, "spool_full")
            return
        hop.calls.add(self)
        refused = self._refused(head.transfer_encoding)
        if refused is not None:
            self._answer_own(refused, Outcome.REFUSED)
            return
        self._request_tap = self._tap_request(method, target, fields)
        self._idempotent = head.idempotency_key or method in IDEMPOTENT
        self._head = line + head.lines
        tap = self._request_tap
        if not self.upload_done:
            if tap is not None and self._may_ask(tap) and may_change(method, raw):
                self._gathering = Gathering(Upload(self._payload, chunked=False, tap=None), tap)
                self.deadline = hop.loop.time() + self._idle_timeout_s
                self._gather()
                return
            self._upload = Upload(self._payload, chunked=bool(message.chunked), tap=tap)
        self._set_out()

    def _gather(self) -> None:
        gathering, before = self._gathering, self._exchange.request_bytes
        assert gathering is not None
        if gathering.upload.reading:
            return
        body = gathering.take()
        size = self._exchange.request_bytes = gathering.upload.size_bytes
        if body is None:
            if size > before:
                self.deadline = self._hop.now + self._idle_timeout_s
            self._read_on()
            return
        self.upload_done = True
        self._gathering = None
        if gathering.asked:
            self._asked = True
            self._head = self._head_of(len(body))
        self._head += body
        self._set_out()

    def _head_of(self, size_bytes: int) -> bytes:
        """The request's head for a body of another length."""
        client, message, rules = self.client, self._message, self._hop.headers
        assert client is not None
        line, authority = rules.request_line(message.method, message.path)
        fields = head_of(message.raw_headers, size_bytes)
        head = rules.request(fields, client.peer, upgrade=False, http10=self._http10, authority=authority)
        return line + head.lines

    def _set_out(self) -> None:
        """On a connection that is at hand, or a new one."""
        hop = self._hop
        connection = hop.upstream.take()
        if connection is None:
            self._task = hop.loop.create_task(self._connect())
        else:
            self._send(connection)

    def _refused(self, coding: bytes | None) -> OwnAnswer | None:
        """What the parser lets through and we do not."""
        message = self._message
        if message.version.major != 1 or message.version.minor > 1:
            return local_responses.BAD_VERSION
        if coding is not None and (self._http10 or coding.strip().lower() != b"chunked"):
            return local_responses.AMBIGUOUS
        if message.method == "CONNECT":
            return local_responses.UNKNOWN_METHOD
        return None

    def _tap_request(self, method: str, target: str, raw: RawHeaders) -> RequestTap | None:
        try:
            return self._hop.taps.request(method, target, raw)
        except Exception:
            log.exception("the request tap failed; the call goes on without it")
            return None

    def _may_ask(self, tap: RequestTap) -> bool:
        try:
            return tap.may_ask
        except Exception:
            log.exception("the request tap failed; nothing is asked for")
            return False

    async def _connect(self) -> None:
        try:
            connection = await self._hop.upstream.connect()
        except TimeoutError:
            within = f"no connection within {self._hop.rules.connect_timeout_s:g} s"
            self._unreachable(local_responses.CONNECT_TIMEOUT, TIMEOUT, within)
        except UnreachableError as error:
            self._unreachable(local_responses.UNREACHABLE, error.reason, error.words)
        else:
            if self._over:
                connection.release()
            else:
                self._send(connection)
        finally:
            self._task = None

    def _unreachable(self, own: OwnAnswer, reason: str, words: str) -> None:
        self._hop.upstream_failed(reason, words)
        self._answer_own(own, Outcome.UNREACHABLE, f"{own.message} ({reason})")

    def pump(self) -> None:
        """Move what has come of the upload to the upstream, as far as the upstream takes it."""
        if self._gathering is not None:
            self._gather()
            return
        connection, upload = self.connection, self._upload
        if upload is None or self.upload_done or upload.reading:
            return
        if connection is None or self._send_full or self._recorded:
            return
        hop = self._hop
        wire = upload.take()
        done = self.upload_done = upload.done
        self._exchange.request_bytes = upload.size_bytes
        if wire:
            if self._kept is not None:
                self._kept.add(wire)
            connection.write(wire)
            answer = self.answer
            waiting = done and not (answer is not None and answer.started)
            self.deadline = hop.now + (hop.rules.response_timeout_s if waiting else hop.rules.idle_timeout_s)
        if not done:
            self._read_on()

    def _see_upload(self) -> None:
        upload = self._upload
        if upload is None or upload.size_bytes or upload.done or upload.reading:
            return
        if self._payload.exception() is None:
            upload.take()
            self._exchange.request_bytes = upload.size_bytes

    def _read_on(self) -> None:
        """A read has made room: let the parser go on with what it holds, in a turn of its own."""
        client = self.client
        if client is not None and not self._send_full and client.resume_upload():
            self._hop.loop.call_soon(client.parse_on)

    def upload_broke(self, own: OwnAnswer) -> None:
        """The client's body turned out malformed: nothing of it may be taken for whole upstream."""
        self._answer_own(own, Outcome.REFUSED)

    def _send(self, connection: UpstreamConnection) -> None:
        """Put the request on this connection."""
        raise NotImplementedError
