"""An upstream that gives no answer is not silent: the reason stands in the record, the metric and the log.

The client's answer is a fixed text all the same: what is behind the proxy is none of its business.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trustme
from support.rawhttp import Conversation, Hop, Outcome, RawUpstream, on_both_loops

from sidecar.model.seldom import SELDOM_S, Seldom
from sidecar.proxy.upstream import why_unreachable

GET = b"GET /x HTTP/1.1\r\nHost: me\r\n\r\n"
UNREACHABLE = (502, "upstream_unreachable", "no connection to the upstream")
BROKEN = (502, "upstream_broke", "the upstream gave no valid response")
SLOW = (504, "upstream_connect_timeout", "the upstream accepted no connection in time")


async def _read_and_close(conversation: Conversation) -> None:
    await conversation.head()


async def _read_and_reset(conversation: Conversation) -> None:
    await conversation.head()
    conversation.reset()


async def _speak_ssh(conversation: Conversation) -> None:
    await conversation.send(b"SSH-2.0-OpenSSH_9.6\r\n")
    await conversation.rest()


async def _close_at_once(conversation: Conversation) -> None:
    conversation.drop()


@asynccontextmanager
async def nobody(tmp_path: Path) -> AsyncIterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@asynccontextmanager
async def nobody_by_either_address(tmp_path: Path) -> AsyncIterator[str]:
    async with nobody(tmp_path) as url:
        yield url.replace("127.0.0.1", "localhost")


@asynccontextmanager
async def no_such_host(tmp_path: Path) -> AsyncIterator[str]:
    yield "http://no-such-host.invalid"


@asynccontextmanager
async def no_socket(tmp_path: Path) -> AsyncIterator[str]:
    yield f"unix:{tmp_path}/nothing.sock"


@asynccontextmanager
async def untrusted(tmp_path: Path) -> AsyncIterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    async with RawUpstream(_read_and_close, tls=context) as upstream:
        yield upstream.url


@asynccontextmanager
async def plain_where_tls_is_meant(tmp_path: Path) -> AsyncIterator[str]:
    async with RawUpstream(_speak_ssh) as upstream:
        yield upstream.url.replace("http://127.0.0.1", "https://localhost")


@asynccontextmanager
async def full_queue(tmp_path: Path) -> AsyncIterator[str]:
    with socket.socket() as full:  # a listener whose queue is full lets further connections hang
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"
        for filler in fillers:
            filler.close()


def scripted(script: Callable[[Conversation], object]) -> Callable[[Path], AbstractAsyncContextManager[str]]:
    @asynccontextmanager
    async def running(tmp_path: Path) -> AsyncIterator[str]:
        async with RawUpstream(script) as upstream:  # type: ignore[arg-type]
            yield upstream.url

    return running


@pytest.mark.parametrize(
    ("where", "reason", "words", "outcome", "answer"),
    [
        (nobody, "refused", "refused", Outcome.UNREACHABLE, UNREACHABLE),
        (nobody_by_either_address, "refused", "refused", Outcome.UNREACHABLE, UNREACHABLE),
        (no_such_host, "dns", "", Outcome.UNREACHABLE, UNREACHABLE),
        (no_socket, "refused", "no such file", Outcome.UNREACHABLE, UNREACHABLE),
        (untrusted, "tls", "its certificate is not accepted", Outcome.UNREACHABLE, UNREACHABLE),
        (plain_where_tls_is_meant, "tls", "the tls handshake failed", Outcome.UNREACHABLE, UNREACHABLE),
        (full_queue, "timeout", "within 0.2 s", Outcome.UNREACHABLE, SLOW),
        (scripted(_read_and_close), "reset", "ended before the answer", Outcome.UPSTREAM_BROKE, BROKEN),
        (scripted(_read_and_reset), "reset", "ended before the answer", Outcome.UPSTREAM_BROKE, BROKEN),
        (scripted(_speak_ssh), "not_http", "", Outcome.UPSTREAM_BROKE, BROKEN),
    ],
    ids=[
        "refused", "refused-twice", "dns", "no-socket", "untrusted", "plain", "timeout", "closed", "reset", "not-http",
    ],
)  # fmt: skip
@on_both_loops
async def test_why_there_is_no_answer(
    where: Callable[[Path], AbstractAsyncContextManager[str]],
    reason: str,
    words: str,
    outcome: Outcome,
    answer: tuple[int, str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    status, kind, message = answer
    caplog.set_level(logging.WARNING, "sidecar")
    async with where(tmp_path) as url, Hop(url, upstream_connect_timeout_s=0.2 if where is full_queue else 10) as hop:
        for _ in range(2):
            head, body = await hop.call(GET)
            assert head.startswith(b"HTTP/1.1 %d " % status)
            assert json.loads(body) == {"error": {"type": kind, "message": message}}
    assert hop.counts.failures == [reason] * 2
    for exchange in hop.recorder.records:
        assert (exchange.outcome, exchange.status) == (outcome, status)
        assert (exchange.error or "").endswith(f" ({reason})")
    (line,) = [record for record in caplog.records if record.name.startswith("sidecar")]  # for two calls
    assert line.levelno == logging.WARNING
    assert words in line.getMessage().lower()
    assert line.facts["reason"] == reason  # type: ignore[attr-defined]


@on_both_loops
async def test_a_certificate_of_ours_that_is_wanted_is_tls(tmp_path: Path) -> None:
    """With TLS 1.3 a server says so behind the handshake, where a request may have left already."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    async with RawUpstream(_read_and_close, tls=context) as upstream:
        async with Hop(upstream.url, upstream_ca_file=str(tmp_path / "ca.pem")) as hop:
            head, _ = await hop.call(GET)
    assert head.startswith(b"HTTP/1.1 502 ")
    assert hop.counts.failures in (["tls"], ["reset"])  # a server's alert may be overtaken by its end


@on_both_loops
async def test_a_cut_answer_is_no_missing_one() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
        await asyncio.sleep(0.02)

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        assert (await hop.last(GET)).endswith(b"abc")
        assert (await hop.recorder.ended()).error == "the answer was cut off"
    assert hop.counts.failures == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ECONNREFUSED, "x"), "refused"),
        (ConnectionRefusedError(), "refused"),
        (OSError(errno.ENOENT, "x"), "refused"),
        (OSError(errno.EACCES, "x"), "refused"),
        (OSError(errno.ECONNRESET, "x"), "reset"),
        (ConnectionResetError(), "reset"),
        (ConnectionAbortedError(), "reset"),
        (BrokenPipeError(), "reset"),
        (OSError(errno.ETIMEDOUT, "x"), "timeout"),
        (OSError(errno.ENETUNREACH, "x"), "no_route"),
        (OSError(errno.EHOSTUNREACH, "x"), "no_route"),
        (OSError(errno.EMFILE, "x"), "no_resources"),
        (OSError(errno.EADDRNOTAVAIL, "x"), "no_resources"),
        (ssl.SSLError(1, "x"), "tls"),
        (UnicodeError("label too long"), "dns"),
        (OSError("Multiple exceptions: …"), "other"),
        (ValueError("secret"), "other"),
    ],
)
def test_each_kind_of_failure_has_its_word(error: Exception, reason: str) -> None:
    found, words = why_unreachable(error)
    assert found == reason
    assert words
    assert "secret" not in words
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        assert words == os.strerror(error.errno)


def test_a_line_a_minute_and_none_forgotten() -> None:
    seldom = Seldom()
    assert seldom.due("a", 0.0) == 1
    assert [seldom.due("a", now) for now in (0.1, 30.0, SELDOM_S - 1)] == [None] * 3
    assert seldom.due("b", 30.0) == 1
    assert seldom.due("a", SELDOM_S) == 4
    assert seldom.due("a", SELDOM_S + 1) is None
    for number in range(1_000):
        assert seldom.due(f"subject {number}", 0.0) == 1
