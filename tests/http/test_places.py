"""TLS and Unix sockets on both sides, a changed certificate, limits with their counters, and the graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from support.rawhttp import Conversation, Hop, Outcome, RawUpstream, answering, on_both_loops, reply, until

from sidecar.proxy import server, tls
from sidecar.proxy.call import Call

GET = b"GET /x HTTP/1.1\r\nHost: me\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls(authority: trustme.CA, *, ask_client: bool = False, names: list[str] | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    if ask_client:
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
    if names is not None:
        context.sni_callback = lambda sock, name, ctx: names.append(name)
    return context


def pem(authority: trustme.CA, path: Path, name: str = "localhost") -> tuple[str, str]:
    cert = authority.issue_cert(name)
    chain, key = path / f"{name}.pem", path / f"{name}.key"
    chain.write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
    key.write_bytes(cert.private_key_pem.bytes())
    return str(chain), str(key)


@on_both_loops
async def test_an_upstream_over_tls(authority: trustme.CA, tmp_path: Path) -> None:
    names: list[str] = []
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    chain, key = pem(authority, tmp_path, "client.example")
    seen: list[bytes] = []
    context = server_tls(authority, ask_client=True, names=names)
    rules: dict[str, Any] = {
        "upstream_ca_file": str(ca),
        "upstream_cert_file": chain,
        "upstream_key_file": key,
    }
    async with RawUpstream(answering(reply(b"safe"), seen=seen), tls=context) as upstream:
        async with Hop(upstream.url, **rules) as hop:
            for _ in range(2):
                assert (await hop.call(GET))[1] == b"safe"
            assert upstream.connections == 1
            assert names == ["localhost"]
        address = upstream.url.replace("localhost", "127.0.0.1")
        async with Hop(address, **rules, upstream_server_name="localhost") as hop:
            assert (await hop.call(GET))[1] == b"safe"
            assert names == ["localhost", "localhost"]


@pytest.mark.parametrize("how", ["unknown authority", "wrong name", "no client certificate"])
@on_both_loops
async def test_an_upstream_that_is_not_trusted(how: str, authority: trustme.CA, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    (trustme.CA() if how == "unknown authority" else authority).cert_pem.write_to_path(str(ca))
    context = server_tls(authority, ask_client=how == "no client certificate")
    if how == "no client certificate":
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # 1.3 tells only after the handshake
    rules: dict[str, Any] = {"upstream_ca_file": str(ca)}
    if how == "wrong name":
        rules["upstream_server_name"] = "other.example"
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen), tls=context) as upstream, Hop(upstream.url, **rules) as hop:
        head, _ = await hop.call(GET)
        assert head[:12] == b"HTTP/1.1 502"
        assert (await hop.recorder.ended()).outcome is Outcome.UNREACHABLE
        assert seen == []


@on_both_loops
async def test_tls_cut_without_a_close_is_a_cut(authority: trustme.CA, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    go = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(b"HTTP/1.1 200 OK\r\n\r\npartial")
        await go.wait()
        conversation.writer.transport.abort()

    async with (
        RawUpstream(script, tls=server_tls(authority)) as upstream,
        Hop(upstream.url, upstream_ca_file=str(ca)) as hop,
    ):
        client = await hop.client()
        await client.send(GET)
        await client.until(b"partial\r\n")
        go.set()
        exchange = await hop.recorder.ended()
        if "uvloop" in type(asyncio.get_running_loop()).__module__:
            assert await client.rest() == b""
            assert exchange.outcome is Outcome.UPSTREAM_BROKE
        else:  # asyncio's own loop tells no difference; the README says so
            assert exchange.outcome in (Outcome.UPSTREAM_BROKE, Outcome.COMPLETE)


@on_both_loops
async def test_a_listener_with_tls_and_a_new_certificate(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, key = pem(authority, tmp_path)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    seen: list[bytes] = []
    async with (
        RawUpstream(answering(reply(b"hello"), seen=seen)) as upstream,
        Hop(upstream.url, tls_cert_file=chain, tls_key_file=key) as hop,
    ):

        async def serial() -> str:
            client = await hop.client(tls=trust)
            certificate = client.writer.get_extra_info("peercert")
            await client.send(GET)
            assert (await client.message())[1] == b"hello"
            await client.close()
            return str(certificate["serialNumber"])

        first = await serial()
        assert b"X-Forwarded-Proto: https\r\n" in seen[0]
        kept = await hop.client(tls=trust)
        pem(authority, tmp_path)
        assert await serial() == first
        hop.proxy.reload_tls()
        second = await serial()
        assert second != first
        Path(chain).write_text("no certificate")
        hop.proxy.reload_tls()
        assert await serial() == second
        pem(authority, tmp_path)

        def read_while_they_change(files: tls.Files) -> ssl.SSLContext:
            found = tls.read(files)
            Path(key).write_text("half a key")
            return found

        monkeypatch.setattr("sidecar.proxy.server.read", read_while_they_change)
        hop.proxy.reload_tls()
        assert await serial() != second
        hop.proxy.reload_tls()
        await serial()
        await kept.send(GET)
        assert (await kept.message())[1] == b"hello"


@on_both_loops
async def test_a_new_certificate_for_the_upstream(
    authority: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    chain, key = pem(authority, tmp_path, "client.example")
    go = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        shown = str(conversation.writer.get_extra_info("peercert")["serialNumber"]).encode()
        while True:
            head = await conversation.head()
            if b"/slow" in head:
                await go.wait()
            await conversation.send(reply(shown))

    rules: dict[str, Any] = {
        "upstream_ca_file": str(ca),
        "upstream_cert_file": chain,
        "upstream_key_file": key,
    }
    context = server_tls(authority, ask_client=True)
    async with RawUpstream(script, tls=context) as upstream, Hop(upstream.url, **rules) as hop:
        first = (await hop.call(GET))[1]
        busy = await hop.client()
        await busy.send(GET.replace(b"/x", b"/slow"))
        await hop.recorder.let_in(2)
        assert (await hop.call(GET))[1] == first
        assert upstream.connections == 2
        pem(authority, tmp_path, "client.example")
        assert (await hop.call(GET))[1] == first
        hop.proxy.reload_tls()
        second = (await hop.call(GET))[1]
        assert second != first
        assert upstream.connections == 3  # the idle one was closed
        go.set()
        assert (await busy.message())[1] == first  # its call goes on
        busy_again = [(await hop.call(GET))[1] for _ in range(3)]
        assert busy_again == [second] * 3  # and its connection serves no other
        assert upstream.connections == 3
        for broken in (b"no certificate", b"", None, Path(key).read_bytes()):
            whole = Path(chain).read_bytes()
            if broken is None:
                Path(chain).unlink()
            else:
                Path(chain).write_bytes(broken)
            caplog.clear()
            hop.proxy.reload_tls()
            Path(chain).write_bytes(whole)
            (line,) = [record for record in caplog.records if record.name.startswith("sidecar")]
            assert line.levelname == "ERROR"
            assert "the certificates for the upstream were not reloaded, the old ones stay: " in line.getMessage()
            assert (await hop.call(GET))[1] == second
        ca.write_text("no authority")
        hop.proxy.reload_tls()
        assert (await hop.call(GET))[1] == second
        assert upstream.connections == 3
        trustme.CA().cert_pem.write_to_path(str(ca))  # whom we trust is read anew as well
        hop.proxy.reload_tls()
        assert (await hop.call(GET))[0].startswith(b"HTTP/1.1 502 ")


@on_both_loops
async def test_a_key_that_wants_a_password_is_not_asked_for_one(
    authority: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    chain, key = pem(authority, tmp_path, "client.example")
    rules: dict[str, Any] = {
        "upstream_ca_file": str(ca),
        "upstream_cert_file": chain,
        "upstream_key_file": key,
    }
    async with RawUpstream(answering(reply()), tls=server_tls(authority, ask_client=True)) as upstream:
        async with Hop(upstream.url, **rules) as hop:
            assert (await hop.call(GET))[1] == b"ok"
            secret = serialization.load_pem_private_key(Path(key).read_bytes(), None)
            Path(key).write_bytes(
                secret.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.BestAvailableEncryption(b"x"),
                )
            )
            hop.proxy.reload_tls()
            assert "the key is encrypted" in caplog.text
            assert (await hop.call(GET))[1] == b"ok"
            assert upstream.connections == 1


@on_both_loops
async def test_unix_sockets_on_both_sides(tmp_path: Path) -> None:
    seen: list[bytes] = []
    inner, outer = str(tmp_path / "inner.sock"), str(tmp_path / "outer.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(outer)
    stale.close()  # the file stays, as after a crash
    async with RawUpstream(answering(reply(b"local"), seen=seen), path=inner) as upstream:
        async with Hop(upstream.url + ":/base") as hop:
            assert await hop.proxy.listen(path=outer) == outer
            client = await hop.client(path=outer)
            for _ in range(2):
                await client.send(GET.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: 10.1.1.1\r\n\r\n"))
                assert (await client.message())[1] == b"local"
            assert upstream.connections == 1
            assert seen[0].startswith(b"GET /base/x HTTP/1.1\r\nHost: localhost\r\n")
            exchange = await hop.recorder.ended(2)
            assert exchange.client_ip == "10.1.1.1"  # whoever may open the socket is believed
            await client.close()
        assert not Path(outer).exists()


@on_both_loops
async def test_a_socket_made_elsewhere() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        async with RawUpstream(answering(reply(b"here"))) as upstream, Hop(upstream.url) as hop:
            bound = await hop.proxy.listen(sock=sock.dup())
            assert bound == sock.getsockname()
            hop.port = int(bound[1])
            assert (await hop.call(GET))[1] == b"here"


# -- limits --------------------------------------------------------------------------------------


@on_both_loops
async def test_too_many_connections() -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url, connections=2) as hop:
        first, second, third = [await hop.client() for _ in range(3)]
        assert (await third.rest()).startswith(b"HTTP/1.1 503 ")
        assert hop.counts.limits == ["connections"]
        for client in (first, second):
            await client.send(GET)
            await client.message()
        await third.close()
        await first.close()
        await until(lambda: hop.counts.connections == 1)
        assert (await hop.call(GET))[1] == b"ok"


@on_both_loops
async def test_too_many_calls() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(STREAM)
        await asyncio.Event().wait()

    async with RawUpstream(script) as upstream, Hop(upstream.url, calls_max=1) as hop:
        client = await hop.client()
        await client.send(GET)
        await client.head()
        head, _ = await hop.call(GET)
        assert head[:12] == b"HTTP/1.1 503"
        assert hop.counts.limits == ["calls"]
        assert len(hop.recorder.admitted) == 1


@pytest.mark.parametrize("slowly", [False, True])
@on_both_loops
async def test_a_head_that_does_not_come_to_an_end(slowly: bool) -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url, head_timeout_s=0.2) as hop:
        client = await hop.client()
        await client.send(b"GET / HTTP/1.1\r\nHost: me\r\n")
        drip = asyncio.ensure_future(_drip(client) if slowly else asyncio.sleep(0))
        assert (await client.rest()).startswith(b"HTTP/1.1 408 ")
        assert hop.counts.limits == ["head_timeout"]
        assert upstream.connections == 0
        drip.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drip


async def _drip(client: Conversation) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            client.writer.write(b"X: 1\r\n")
            await asyncio.sleep(0.01)


@on_both_loops
async def test_an_idle_connection_is_closed() -> None:
    async with (
        RawUpstream(answering(reply())) as upstream,
        Hop(upstream.url, head_timeout_s=0.1, keepalive_timeout_s=0.1) as hop,
    ):
        silent, used = await hop.client(), await hop.client()
        await used.send(GET)
        await used.message()
        assert await used.rest() == b""
        assert await silent.rest() == b""


# -- the graceful stop ---------------------------------------------------------------------------


def _finishes(go: asyncio.Event):  # type: ignore[no-untyped-def]
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(STREAM + b"5\r\nfirst\r\n")
        await go.wait()
        await conversation.send(b"4\r\nlast\r\n0\r\n\r\n")

    return script


@on_both_loops
async def test_a_stop_lets_open_calls_finish_and_takes_no_more() -> None:
    go = asyncio.Event()
    async with RawUpstream(_finishes(go)) as upstream, Hop(upstream.url) as hop:
        idle, busy, waiting = [await hop.client() for _ in range(3)]
        await busy.send(GET + GET)
        await busy.until(b"first\r\n")
        await waiting.send(b"GET / HTTP/1.1\r\n")
        await until(lambda: any(client._head_bytes for client in hop.proxy._clients.open))  # type: ignore[union-attr]
        stop = asyncio.ensure_future(hop.proxy.stop(5))
        assert await idle.rest() == b""
        assert await waiting.rest() == b""
        with pytest.raises(OSError):  # refused
            await hop.client()
        assert not stop.done()
        go.set()
        assert await busy.rest() == b"4\r\nlast\r\n0\r\n\r\n"
        await stop
        assert (await hop.recorder.ended()).outcome is Outcome.COMPLETE
        await hop.proxy.stop(0)


@on_both_loops
async def test_a_stop_takes_up_what_was_sent_before_it() -> None:
    """On connections that nobody has accepted yet, and on those that were kept."""
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:
        kept = await hop.client()
        await kept.send(GET)
        assert (await kept.message())[1] == b"ok"
        fresh = []
        for _ in range(50):  # the loop does not turn meanwhile
            sock = socket.create_connection(("127.0.0.1", hop.port))
            sock.sendall(GET)
            sock.setblocking(False)
            fresh.append(sock)
        kept.writer.write(GET)
        stop = asyncio.ensure_future(hop.proxy.stop(5))
        clients = [kept, *[Conversation(*await asyncio.open_connection(sock=sock)) for sock in fresh]]
        for client in clients:
            head, body = await client.message()
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"\r\nConnection: close\r\n" in head
            assert body == b"ok"
            assert await client.rest() == b""
            client.drop()
        await stop
        assert len(hop.recorder.records) == 52
        with pytest.raises(OSError):  # refused
            await hop.client()


HTTP_10 = b"GET /x HTTP/1.0\r\nHost: me\r\nConnection: keep-alive\r\n\r\n"


@pytest.mark.parametrize(
    "request_", [GET, HTTP_10, GET.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")]
)
@on_both_loops
async def test_before_a_stop_each_response_is_the_last_on_its_connection_and_else_as_it_was(request_: bytes) -> None:
    """On both ways of a call, the short one after two calls of its kind."""
    async with RawUpstream(answering(reply(b"whole"))) as upstream, Hop(upstream.url) as hop:
        kept = await hop.client()
        before = b""
        for _ in range(4):
            await kept.send(request_)
            before, body = await kept.message()
            assert b"Connection: close" not in before
            assert body == b"whole"
        hop.proxy.leave()
        assert repr(hop.proxy).startswith("<Proxy: leaving")
        assert await kept.silent(), "what is idle stays open: a call may be on its way"
        fresh = await hop.client()
        for client in (kept, fresh):
            await client.send(request_)
            head, body = await client.message()
            assert body == b"whole"
            assert head == before.replace(b"Connection: keep-alive\r\n", b"").replace(
                b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"
            )
            assert await client.rest() == b""
        assert len(hop.recorder.records) == 6


@on_both_loops
async def test_a_connection_that_was_just_made_when_the_port_closes_has_its_call() -> None:
    """A client far away has been told that it is connected, and its request is under way."""
    async with RawUpstream(answering(reply(b"whole"))) as upstream, Hop(upstream.url) as hop:
        fresh = await hop.client()
        stop = asyncio.ensure_future(hop.proxy.stop(5))
        await until(lambda: not hop.proxy._listeners)
        await fresh.send(GET)
        assert (await fresh.message())[1] == b"whole"
        assert await fresh.rest() == b""
        await stop


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can keep connections from being made")
@on_both_loops
async def test_who_waits_to_be_accepted_when_the_time_is_over_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have come without end until then, so the queue was never seen empty."""
    monkeypatch.setattr(server, "CAME_S", 0.0)
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:
        fresh = []
        for _ in range(50):  # the loop does not turn meanwhile
            sock = socket.create_connection(("127.0.0.1", hop.port))
            sock.sendall(GET)
            sock.setblocking(False)
            fresh.append(sock)
        stop = asyncio.ensure_future(hop.proxy.stop(5))
        for client in [Conversation(*await asyncio.open_connection(sock=sock)) for sock in fresh]:
            assert (await client.message())[1] == b"ok"
            client.drop()
        await stop
        with pytest.raises(OSError):  # refused
            await hop.client()


@on_both_loops
async def test_a_stop_takes_up_no_more_than_its_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that come without end do not keep it going."""
    monkeypatch.setattr(server, "CAME_S", 0.1)
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:

        async def knock() -> None:
            while True:
                client = await hop.client()
                await client.send(GET)
                client.drop()

        knocking = asyncio.ensure_future(knock())
        await hop.recorder.let_in(1)
        await asyncio.wait_for(hop.proxy.stop(5), 5)
        with pytest.raises(OSError):
            await knocking


@on_both_loops
async def test_a_stop_cuts_what_does_not_finish() -> None:
    async with RawUpstream(_finishes(asyncio.Event())) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(GET)
        await client.until(b"first\r\n")
        await hop.proxy.stop(0.05)
        with pytest.raises(ConnectionResetError):
            await client.rest()
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.status, exchange.response_bytes) == (Outcome.STOPPED, 200, 5)


@on_both_loops
async def test_a_stop_waits_for_records() -> None:
    async with RawUpstream(answering(reply(b"whole"))) as upstream, Hop(upstream.url) as hop:
        hop.recorder.hold = True
        client = await hop.client()
        await client.send(GET)
        await hop.recorder.ended()
        stop = asyncio.ensure_future(hop.proxy.stop(5))
        assert await client.silent()
        hop.recorder.let_go()
        assert (await client.rest()).endswith(b"whole")
        await stop


LEFT = 60_000  # more than small buffers of the system hold, and less than makes either side wait


def _hold_little(sock: Any) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)


@on_both_loops
async def test_a_stop_waits_for_a_slow_reader_of_a_last_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CUT_S", 0.01)
    async with RawUpstream(answering(reply(b"x" * LEFT))) as upstream, Hop(upstream.url) as hop:
        client = await hop.client(receive_buffer=4_096)
        await until(lambda: bool(hop.proxy._clients and hop.proxy._clients.open))
        assert hop.proxy._clients is not None
        (accepted,) = hop.proxy._clients.open
        assert accepted.transport is not None
        _hold_little(accepted.transport.get_extra_info("socket"))
        await client.send(GET)
        await hop.recorder.ended()
        assert accepted.holds_unsent
        stop = asyncio.ensure_future(hop.proxy.stop(5))
        await asyncio.wait({stop}, timeout=0.2)
        assert not stop.done()
        assert (await client.rest()).endswith(b"x" * LEFT)
        await stop


@on_both_loops
async def test_a_stop_waits_for_what_the_client_of_a_tunnel_said_last() -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        async with Hop(f"http://127.0.0.1:{listener.getsockname()[1]}") as hop:
            client = await hop.client()
            await client.send(GET[:-2] + b"Connection: upgrade\r\nUpgrade: x\r\n\r\n")
            upstream, _ = await loop.sock_accept(listener)
            with upstream:
                assert b"Upgrade: x" in await loop.sock_recv(upstream, 4_096)
                assert hop.proxy._hop is not None
                (call,) = hop.proxy._hop.calls
                assert isinstance(call, Call)
                assert call.connection is not None
                assert call.connection.transport is not None
                _hold_little(call.connection.transport.get_extra_info("socket"))
                answer = b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
                await loop.sock_sendall(upstream, answer)
                await client.head()
                await client.send(b"x" * LEFT)
                await client.close()
                await hop.recorder.ended()
                stop = asyncio.ensure_future(hop.proxy.stop(5))
                await asyncio.wait({stop}, timeout=0.2)
                assert not stop.done()
                came = b""
                while piece := await loop.sock_recv(upstream, 65_536):
                    came += piece
                assert came == b"x" * LEFT
                await stop


async def test_a_proxy_that_was_never_started_stops() -> None:
    hop = Hop("http://127.0.0.1:1")
    assert repr(hop.proxy) == "<Proxy: not started>"
    await hop.proxy.stop(1)
    await hop.proxy.aclose()
    with pytest.raises(RuntimeError):
        await hop.proxy.listen(host="127.0.0.1")
