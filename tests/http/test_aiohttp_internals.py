"""What the hop takes from aiohttp beyond its documented interface is as it was when it was read.

These tests fail when aiohttp changes one of those parts; `sidecar/proxy/aiohttp_compat.py` is the
one place to mend then. The traps seen there are shown as they are, so that it is noticed when one closes.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import BaseConnector
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler
from support.rawhttp import Hop, RawUpstream, answering, on_both_loops, reply

import sidecar.proxy
from sidecar.proxy.aiohttp_compat import ClientProtocol, Connector, Server, UpstreamProtocol, refusal
from sidecar.proxy.client_connection import Client
from sidecar.proxy.upstream import UpstreamConnection

ROOM = Path(sidecar.proxy.__file__).parent


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_version_that_was_read() -> None:
    assert aiohttp.__version__.startswith("3.14."), "read aiohttp_compat.py against the new version"


def test_the_parts_are_where_they_were() -> None:
    assert parameters(BaseConnector.connect) == ["self", "req", "traces", "timeout"]
    assert parameters(RequestHandler.__init__)[:2] == ["self", "manager"]
    for name in (
        "keepalive_timeout",
        "access_log",
        "max_line_size",
        "max_field_size",
        "max_headers",
        "lingering_time",
        "read_bufsize",
        "auto_decompress",
        "loop",
    ):
        assert name in parameters(RequestHandler.__init__)
    assert parameters(web.Server.__init__)[:2] == ["self", "handler"]
    for name in ("feed_data", "message_consumed", "set_upgraded", "pause_reading"):
        assert callable(getattr(HttpRequestParser, name))
    for name in ("read_nowait", "at_eof", "is_eof"):
        assert callable(getattr(StreamReader, name))
    for name in ("_pause_transport_reading", "_resume_transport_reading"):
        assert callable(getattr(RequestHandler, name))


def test_the_c_parser_is_in_use() -> None:
    """The Python one is ten times slower, and lenient in other places."""
    assert HttpRequestParser.__module__ == "aiohttp._http_parser"


def test_no_name_of_ours_hides_one_of_aiohttps() -> None:
    def own(cls: type, base: type) -> set[str]:
        names = set(cls.__dict__) | set(cls.__dict__.get("__slots__", ()))
        tree = ast.parse(Path(inspect.getfile(cls)).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                names |= {
                    target.attr
                    for target in ast.walk(node)
                    if isinstance(target, ast.Attribute)
                    and isinstance(target.ctx, ast.Store)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                }
        return {name for name in names if not name.startswith("__")}

    async def theirs() -> tuple[set[str], set[str]]:
        loop = asyncio.get_running_loop()
        front = RequestHandler(web.Server(lambda request: None), loop=loop)  # type: ignore[arg-type, return-value]
        back = ResponseHandler(loop)
        return set(dir(front)), set(dir(back)) | set(vars(back))

    front, back = asyncio.run(theirs())
    overridden_front = {
        "start",
        "pause_reading",
        "resume_reading",
        "connection_made",
        "connection_lost",
        "data_received",
        "pause_writing",
        "resume_writing",
        "_messages",
        "_parser",
        "_task_handler",
    }
    overridden_back = {
        "should_close",
        "data_received",
        "eof_received",
        "connection_made",
        "connection_lost",
        "pause_writing",
        "resume_writing",
        "_buffer",
    }
    assert (own(ClientProtocol, RequestHandler) | own(Client, RequestHandler)) & front == overridden_front
    assert (own(UpstreamProtocol, ResponseHandler) | own(UpstreamConnection, ResponseHandler)) & back == overridden_back


def test_nobody_else_touches_aiohttps_private_names() -> None:
    for path in ROOM.glob("*.py"):
        imported = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        ours = {name for name in imported if name and name.partition(".")[0] == "aiohttp"}
        if path.name != "aiohttp_compat.py":
            assert ours <= {"aiohttp"}, path


@on_both_loops
async def test_the_connector_makes_our_connections_and_keeps_none() -> None:
    async with RawUpstream(answering(reply())) as upstream:
        loop = asyncio.get_running_loop()
        made: list[UpstreamProtocol] = []

        def make() -> UpstreamProtocol:
            made.append(UpstreamProtocol(loop))
            return made[-1]

        connector = Connector(
            make,
            loop=loop,
            host="127.0.0.1",
            port=upstream.port,
            tls=None,
            server_name=None,
            socket_path=None,
            connect_timeout_s=1,
        )
        leases = []
        for count in (1, 2, 3):
            leases.append(await connector.connect())
            assert len(made) == count
            assert leases[-1].protocol is made[-1]
            assert made[-1].is_connected()
            if count == 1:
                leases[-1].release()
                assert not made[-1].is_connected()
            elif count == 2:
                made[-1].abort()
                leases[-1].close()
        await connector.aclose()
        assert not made[-1].is_connected()
        leases[-1].close()


async def test_an_open_connection_holds_nothing_that_only_aiohttps_own_way_needs() -> None:
    """With ten thousand streams open each of these is megabytes."""
    loop = asyncio.get_running_loop()
    server = Server(lambda server: ClientProtocol(server, loop, **limits), loop)
    limits = {"target_bytes_max": 99, "field_bytes_max": 999, "fields_max": 9}
    client = server()
    client.connection_made(asyncio.Transport())
    assert client._task_handler is None
    assert client._messages.maxlen == 0
    upstream = UpstreamConnection(cast(Any, None), loop)
    assert upstream._buffer.maxlen == 0
    shared_names_max = 30  # of CPython: an instance with more has a table of names of its own
    assert len(vars(upstream)) < shared_names_max
    await asyncio.sleep(0)  # the task that aiohttp began has ended


async def test_the_server_says_so_when_a_setting_is_misspelt() -> None:
    """aiohttp's own `__call__` swallows the TypeError and drops all settings."""
    loop = asyncio.get_running_loop()

    def make(server: Server) -> RequestHandler:
        return RequestHandler(server, loop=loop, no_such_setting=1)  # type: ignore[call-arg]

    with pytest.raises(TypeError):
        Server(make, loop)()


async def _parser(**limits: int) -> Any:
    class Paused:
        def pause_reading(self) -> None: ...
        def resume_reading(self, resume_parser: bool = True) -> None: ...

    return HttpRequestParser(
        Paused(),  # type: ignore[arg-type]
        asyncio.get_running_loop(),
        2**16,
        auto_decompress=False,
        **cast("dict[str, Any]", {"max_line_size": 100, "max_field_size": 200, "max_headers": 5, **limits}),
    )


HEAD = b"GET /%b HTTP/1.1\r\nHost: h\r\n%b\r\n"


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (b"BREW / HTTP/1.1\r\nHost: h\r\n\r\n", "method"),
        (HEAD % (b"a" * 200, b""), "target"),
        (HEAD % (b"", b"X: " + b"a" * 300 + b"\r\n"), "head"),
        (HEAD % (b"", b"X: 1\r\n" * 9), "head"),
        (HEAD % (b"", b"X : 1\r\n"), "other"),
    ],
)
async def test_why_the_parser_refuses(request_: bytes, why: str) -> None:
    with pytest.raises(HttpProcessingError) as raised:
        (await _parser()).feed_data(request_)
    assert refusal(raised.value, 100) == why


async def test_the_traps_that_are_stepped_around() -> None:
    parser = await _parser()
    parser.feed_data(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: 1\r\nB: 2\r\n\r\n")
    messages, _, _ = parser.feed_data(HEAD % (b"", b""))
    assert messages[0][0].raw_headers[0] == (b"B", b"2"), "trailers no longer leak: Client._chunked may be simpler"

    parser = await _parser()
    messages, _, _ = parser.feed_data(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    with pytest.raises(HttpProcessingError):
        parser.feed_data(b"zz\r\n")
    assert messages[0][1].exception() is None, "the body is told of a bad chunk now"

    parser = await _parser()
    messages, switched, tail = parser.feed_data(
        HEAD % (b"", b"Connection: upgrade\r\nUpgrade: other\r\n") + HEAD % (b"2", b"")
    )
    assert (len(messages), switched, tail) == (1, False, b""), "bytes behind an upgrade are no longer lost"

    parser = await _parser()
    messages, _, _ = parser.feed_data(
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
    )
    assert messages, "the parser refuses stacked codings by itself now"


async def test_a_parser_that_reads_ahead_stops_at_its_limit() -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(HEAD % (b"x", b"") * 100)
        for _ in range(100):
            await client.message()
