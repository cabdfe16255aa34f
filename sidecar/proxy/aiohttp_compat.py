"""Everything that the hop takes from aiohttp beyond its documented interface, in one place.

aiohttp gives the hop its request parser, its body reader with flow control, its server's
bookkeeping, and its connector (DNS cache, happy eyeballs, TLS, Unix sockets). What is not
needed for a hop (a task a request, request and response objects, a session) is left out by
overriding the few methods below. `tests/http/test_aiohttp_internals.py` fails when aiohttp
changes one of them; nothing else in the project touches a name of aiohttp that starts with `_`,
but for the class of the connections to backends (`storage/http_client.py`).

Seen with aiohttp 3.14.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, BaseTransport
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from ssl import SSLContext
from typing import Any, Final, Protocol

from aiohttp import ClientRequest, ClientTimeout, HttpVersion, TCPConnector, UnixConnector, web
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import BaseConnector, Connection
from aiohttp.http import HttpRequestParser
from aiohttp.http_exceptions import BadHttpMethod, HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from yarl import URL

__all__ = [
    "EMPTY_PAYLOAD", "PIPELINE_MAX", "ClientProtocol", "Connector", "HttpProcessingError", "Lease", "Messages",
    "RawRequestMessage", "Server", "StreamReader", "UpstreamProtocol", "refusal",
]  # fmt: skip

PIPELINE_MAX: Final = 32  # requests parsed ahead on one connection; aiohttp's figure
BODY_BUFFER_BYTES: Final = 131_072  # an unread upload is held at twice this: one full read of a socket fits

# In the place of queues of aiohttp's that nothing is put into here: each empty one takes 760 bytes of a connection.
_NOTHING_QUEUED: Final[deque[Any]] = deque(maxlen=0)

Lease = Connection


class RawRequestMessage(Protocol):
    """A request's head as aiohttp's parser gives it: of two classes, one in C and one in Python."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def version(self) -> HttpVersion: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def raw_headers(self) -> Sequence[tuple[bytes, bytes]]: ...
    @property
    def should_close(self) -> bool: ...
    @property
    def upgrade(self) -> bool: ...
    @property
    def chunked(self) -> bool: ...


Messages = Sequence[tuple[RawRequestMessage, StreamReader]]


class Server(web.Server):
    """aiohttp's low-level server, handing out our protocol.

    `__call__` is overridden whole: aiohttp's swallows a `TypeError` and then drops all its settings.
    """

    def __init__(self, make: Callable[[Server], RequestHandler], loop: AbstractEventLoop) -> None:
        super().__init__(_no_handler, loop=loop)
        self._make = make

    def __call__(self) -> RequestHandler:
        return self._make(self)


async def _no_handler(request: web.BaseRequest) -> web.StreamResponse:
    raise RuntimeError("requests are dispatched from data_received")


class ClientProtocol(RequestHandler):
    """A client connection: aiohttp's parser and bookkeeping without its task a request.

    A subclass overrides `data_received`, calls `parse`, and dispatches in the same loop turn. Uploads
    are read with `StreamReader.read_nowait`; the reader pauses us through `pause_reading`.
    """

    __slots__ = ("_held", "_limits", "_stopped", "upload_paused")

    def __init__(
        self, server: Server, loop: AbstractEventLoop, *, target_bytes_max: int, field_bytes_max: int, fields_max: int
    ) -> None:
        if field_bytes_max == target_bytes_max:
            field_bytes_max += 1  # `refusal` tells the two limits apart by their figure
        self._limits = target_bytes_max, field_bytes_max, fields_max
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=0,  # a timer a connection; the proxy sweeps instead
            access_log=None,  # type: ignore[arg-type]
            max_line_size=target_bytes_max,
            max_field_size=field_bytes_max,
            max_headers=fields_max,
            lingering_time=0,
            read_bufsize=BODY_BUFFER_BYTES,
            auto_decompress=False,
        )
        self._messages = _NOTHING_QUEUED
        self.upload_paused = False  # by the body reader
        self._held = False  # by `pause`
        self._stopped = False  # what the transport was told

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self._task_handler = None  # of `start`, which ends at once; a task takes 690 bytes

    async def start(self) -> None:
        """aiohttp's loop over requests: not needed, and not run."""

    def parse(self, data: bytes) -> tuple[Messages, bool, bytes]:
        """(requests whose head is read, switched to another protocol, what came behind). May raise
        `HttpProcessingError`, whose text holds bytes of the request and must not be shown."""
        parser = self._parser
        if parser is None:
            return (), False, b""
        messages, switched, tail = parser.feed_data(data)
        return messages, switched, tail

    def parser_anew(self) -> None:
        """Another parser, in the place of one that met something malformed and takes nothing more."""
        target_bytes_max, field_bytes_max, fields_max = self._limits
        self._parser = HttpRequestParser(
            self,
            self._loop,
            BODY_BUFFER_BYTES,
            max_line_size=target_bytes_max,
            max_field_size=field_bytes_max,
            max_headers=fields_max,
            payload_exception=RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=PIPELINE_MAX,
        )

    def parser_idle_again(self) -> None:
        """A pipelined request was taken up; the parser may read one more ahead."""
        if self._parser is not None:
            self._parser.message_consumed()

    def parser_resume_http(self) -> None:
        """A protocol switch was declined: what follows is HTTP again."""
        if self._parser is not None:
            self._parser.set_upgraded(False)

    def pause_reading(self) -> None:
        """Called by the body reader when it is full: stop the parser and the socket."""
        if not self.upload_paused and self._parser is not None:
            self.upload_paused = True
            self._parser.pause_reading()
            self._tell_transport()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Called by the body reader on every read; aiohttp's own would parse from inside of it.
        What the parser still holds is parsed after the read, by who calls `resume_upload`."""

    def resume_upload(self) -> bool:
        """After a read has made room: read on. True when the parser may hold bytes to be parsed."""
        if not self.upload_paused:
            return False
        self.upload_paused = False
        self._tell_transport()
        return True

    def pause(self, paused: bool) -> None:
        """Stop or go on reading for a reason of our own."""
        self._held = paused
        self._tell_transport()

    @property
    def _is_held(self) -> bool:
        """Whether reading stands still for a reason of our own."""
        return self._held

    def _tell_transport(self) -> None:
        """One of two reasons is enough to stop; both must be gone to go on."""
        stop = self._held or self.upload_paused
        if stop != self._stopped:
            self._stopped = stop
            if stop:
                self._pause_transport_reading()
            else:
                self._resume_transport_reading()


def refusal(error: HttpProcessingError, target_bytes_max: int) -> str:
    """Why the parser refused, as one of: method, target, head, other."""
    if isinstance(error, BadHttpMethod):
        return "method"
    if isinstance(error, LineTooLong):
        return "target" if str(target_bytes_max) in map(str, error.args) else "head"
    if error.message.startswith("Too many headers"):
        return "head"
    return "other"


class UpstreamProtocol(ResponseHandler):
    """An upstream connection as the connector knows it. Mind that it is falsy (it has a length of 0)."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        super().__init__(loop)
        self._buffer = _NOTHING_QUEUED

    @property
    def should_close(self) -> bool:
        """Asked at release. Ours are kept elsewhere: what is released is done with."""
        return True

    def eof_received(self) -> None:
        """aiohttp's drops a timer we do not have."""


class Connector:
    """aiohttp's connector, asked with one request object made once: DNS cache, happy eyeballs, TLS, Unix sockets.

    Its pool is not used: taking from it and giving back costs 2.5 µs a call, and it would hand a retry the next
    connection that may have died. `upstream.Upstream` keeps the idle ones.
    """

    def __init__(
        self,
        make: Callable[[], UpstreamProtocol],
        *,
        loop: AbstractEventLoop,
        host: str,
        port: int,
        tls: SSLContext | None,
        server_name: str | None,
        socket_path: str | None,
        connect_timeout_s: float,
    ) -> None:
        connector: BaseConnector
        # limit=0: the default of 100 would cap the streams that can be open at once.
        if socket_path is not None:
            connector = UnixConnector(socket_path, limit=0, loop=loop)
        else:
            connector = TCPConnector(limit=0, loop=loop)
        connector._factory = make  # type: ignore[assignment]
        self._connector = connector
        url = URL.build(scheme="https" if tls is not None else "http", host=host, port=port)
        self._request_with = partial(ClientRequest, "GET", url, loop=loop, server_hostname=server_name)
        self._request = self._request_with(ssl=tls or True)
        self._timeout = ClientTimeout(total=None, connect=connect_timeout_s)

    async def connect(self) -> Lease:
        """A new connection. Raises `TimeoutError`, `OSError` or `aiohttp.ClientError`."""
        return await self._connector.connect(self._request, [], self._timeout)

    def renew_tls(self, tls: SSLContext) -> None:
        """For connections made from now on."""
        self._request = self._request_with(ssl=tls)

    async def aclose(self) -> None:
        """Closes every connection, also those in use."""
        await self._connector.close()
