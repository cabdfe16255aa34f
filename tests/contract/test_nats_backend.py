"""The backend `nats` and a real server: what each of its answers means for a record, and which streams are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import trustme
from support.backend_fixtures import record, record_id
from support.backend_trials import values_of
from support.nats_server import GOOD_STREAM, NatsServer, client, make_stream, nats_cluster, nats_server

from sidecar.backends import Context
from sidecar.backends.nats import NatsBackend, NatsSettings
from sidecar.model.delivery import Blocked, Delivered, Duplicate, Refused, Retry, Sealed, Unknown, Verdict
from sidecar.model.record import Record
from sidecar.settings import Unfit
from sidecar.settings.schema import settings_of
from sidecar.storage.nats import Wanted, api_fault, config_of, read_servers, weaknesses

pytestmark = [pytest.mark.timeout(120), pytest.mark.server]
PASSWORD = "hunter2-hunter2"


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as one:
        yield one


class Backends:
    """Backends that a test makes, closed at its end."""

    def __init__(self, tmp_path: Path) -> None:
        self._tmp_path = tmp_path
        self._made: list[NatsBackend] = []

    def __call__(self, url: str, stream: str = "S", **texts: str) -> NatsBackend:
        given = {
            "url": url,
            "stream": stream,
            "subject": f"{stream}.records",
            "replicas": "1",
            "timeout": "5s",
            **texts,
        }
        settings = NatsSettings(**values_of(settings_of(NatsSettings), given))
        self._made.append(NatsBackend(settings, Context(data_dir=self._tmp_path)))
        return self._made[-1]

    async def aclose(self) -> None:
        for one in self._made:
            await one.aclose()


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Backends]:
    backends = Backends(tmp_path)
    try:
        yield backends
    finally:
        await backends.aclose()


def sealed(backend: NatsBackend, *records: Record) -> Sealed:
    (one,) = backend.encode(records or [record(n) for n in range(1, 4)]).sealed
    return one


async def stored(url: str, stream: str) -> dict[str, bytes]:
    """What the stream has: id -> body."""
    connection = await client(url)
    try:
        context = connection.jetstream()
        state = (await context.stream_info(stream)).state
        found = {}
        for seq in range(state.first_seq, state.last_seq + 1):
            message = await context.get_msg(stream, seq)
            assert message.headers is not None
            found[message.headers["Nats-Msg-Id"]] = message.data or b""
        assert len(found) == state.messages, "an id stands twice"
        return found
    finally:
        await connection.close()


async def edit(server: NatsServer, stream: str, **changes: Any) -> None:
    connection = await client(server.url)
    try:
        context = connection.jetstream()
        await context.update_stream((await context.stream_info(stream)).config, **changes)
    finally:
        await connection.close()


def word(verdict: Verdict) -> str:
    """Its kind, and the first word of its reason."""
    reason = getattr(verdict, "reason", "")
    return f"{type(verdict).__name__} {reason.partition(':')[0]}".strip()


async def test_each_record_is_a_message_with_its_id_and_a_repeat_is_a_duplicate(
    server: NatsServer, made: Backends
) -> None:
    await make_stream(server.url, "ONE", "ONE.records")
    backend = made(server.url, "ONE")
    request = sealed(backend)
    assert await backend.send(request) == [Delivered()] * 3
    assert await backend.send(request) == [Duplicate()] * 3
    more = sealed(backend, record(3), record(4))
    assert await backend.send(more) == [Duplicate(), Delivered()], "each is told apart"
    assert await stored(server.url, "ONE") == {record_id(n): record(n).json for n in range(1, 5)}
    assert await backend.examine() == []
    ok, where = await backend.reach()
    assert ok
    assert where.startswith(f"127.0.0.1:{server.port}, NATS 2.")


async def test_a_server_that_is_away_and_comes_back(made: Backends) -> None:
    with nats_server() as server:
        await make_stream(server.url, "S", "S.records")
        backend = made(server.url)
        assert await backend.send(sealed(backend)) == [Delivered()] * 3
        server.kill()
        again = sealed(backend, record(3), record(4))
        assert {word(v) for v in await backend.send(again)} <= {
            "Retry refused",
            "Retry connection_lost",
            "Unknown connection_lost",
        }
        assert [word(v) for v in await backend.send(again)] == ["Retry refused"] * 2
        assert (await backend.reach()) == (False, f"no connection to nats://127.0.0.1:{server.port}: refused")
        server.start()
        assert await backend.send(again) == [Duplicate(), Delivered()], "an id is known over a kill"
        assert len(await stored(server.url, "S")) == 4


async def test_no_answer_is_unknown_and_is_recognised_when_it_is_sent_again(made: Backends) -> None:
    with nats_server() as server:
        await make_stream(server.url, "S", "S.records")
        backend = made(server.url, timeout="0.5s")
        assert await backend.send(sealed(backend)) == [Delivered()] * 3
        server.freeze()
        request = sealed(backend, *[record(n) for n in range(4, 9)])
        assert await backend.send(request) == [Unknown("timeout")] * 5
        server.thaw()
        async with asyncio.timeout(20):
            while set(verdicts := await backend.send(request)) - {Delivered(), Duplicate()}:
                await asyncio.sleep(0.1)
        assert set(verdicts) == {Duplicate()}, "it had them all, and only its answers were late"
        assert len(await stored(server.url, "S")) == 8


async def test_who_waits_for_an_answer_hears_of_the_end_at_once(made: Backends) -> None:
    with nats_server() as server:
        await make_stream(server.url, "S", "S.records")
        backend = made(server.url, timeout="60s")
        assert await backend.send(sealed(backend)) == [Delivered()] * 3
        server.freeze()
        sending = asyncio.ensure_future(backend.send(sealed(backend, record(9))))
        await asyncio.sleep(0.1)
        server.kill()
        assert await asyncio.wait_for(sending, 20) == [Unknown("connection_lost")]


@asynccontextmanager
async def answering(ack: bytes) -> AsyncIterator[str]:
    """A server that has a good stream `S`, and says this of every message that is sent into it."""
    settings = config_of(Wanted(stream="S", subject="S.records", replicas=1, window_s=3600.0))
    times = {name: int(settings[name] * 1e9) for name in ("max_age", "duplicate_window")}
    state = dict.fromkeys(("messages", "bytes", "first_seq", "last_seq", "consumer_count"), 0)
    stream = orjson.dumps({"config": settings | times, "created": "2026-01-01T00:00:00Z", "state": state})
    hello = orjson.dumps({"server_id": "s", "version": "2.11.0", "headers": True, "max_payload": 1 << 20})

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO %s\r\n" % hello)
        inbox = b""
        while words := (await reader.readline()).split():
            if words[0] == b"PING":
                writer.write(b"PONG\r\n")
            elif words[0] == b"SUB":
                inbox = words[-1]
            elif words[0] in (b"PUB", b"HPUB"):
                await reader.readexactly(int(words[-1]) + 2)
                said = ack if words[1] == b"S.records" else stream
                writer.write(b"MSG %s %s %d\r\n%s\r\n" % (words[2], inbox, len(said), said))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield f"nats://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("ack", "verdict"),
    [
        (b'{"stream":"S","seq":1}', Delivered()),
        (b'{"stream":"S","seq":1,"duplicate":true}', Duplicate()),
        (b'{"stream":"S","seq":1,"duplicate":"false"}', Delivered()),
        (b'{"stream":"OTHER","seq":1}', Unknown("no_ack")),
        (b'{"stream":"S","seq":0}', Unknown("no_ack")),
        (b'{"stream":"S","seq":"1"}', Unknown("no_ack")),
        (b'{"stream":"S"}', Unknown("no_ack")),
        (b"{}", Unknown("no_ack")),
        (b"[]", Unknown("no_ack")),
        (b"null", Unknown("no_ack")),
        (b"5", Unknown("no_ack")),
        (b"+OK", Unknown("no_ack")),
        (b"", Unknown("no_ack")),
        (b"\xff\xfe", Unknown("no_ack")),
        (b"[" * 100_000, Unknown("no_ack")),
        (b'{"error":null}', Unknown("no_ack")),
        (b'{"error":"no"}', Unknown("no_ack")),
        (b'{"error":{"code":"x","err_code":[]}}', Unknown("no_ack")),
        (b'{"error":{"code":400,"err_code":10077}}', Retry("stream_full")),
    ],
)
async def test_whoever_else_answers_says_nothing_about_the_stream(made: Backends, ack: bytes, verdict: Verdict) -> None:
    """Anybody may listen to the subject, and answer before the stream does."""
    async with answering(ack) as url:
        backend = made(url)
        assert await backend.send(sealed(backend)) == [verdict] * 3
        await backend.aclose()


async def test_a_full_stream_refuses_and_takes_again_when_there_is_room(server: NatsServer, made: Backends) -> None:
    await make_stream(server.url, "FULL", "FULL.records", max_msgs=3)
    backend = made(server.url, "FULL")
    assert await backend.send(sealed(backend)) == [Delivered()] * 3
    assert await backend.send(sealed(backend, record(3), record(4))) == [Duplicate(), Retry("stream_full")]
    await edit(server, "FULL", max_msgs=10)
    assert await backend.send(sealed(backend, record(4))) == [Delivered()]


async def test_no_stream_says_how_to_make_one(server: NatsServer, made: Backends) -> None:
    backend = made(server.url, "NONE")
    (verdict,) = set(await backend.send(sealed(backend)))
    assert isinstance(verdict, Blocked)
    assert verdict.reason == ("no_stream: there is no stream NONE: `metering-sidecar collect --provision` makes it")
    assert (await backend.examine())[0].startswith("there is no stream NONE")


async def test_a_stream_that_is_removed_under_way(server: NatsServer, made: Backends) -> None:
    await make_stream(server.url, "GONE", "GONE.records")
    backend = made(server.url, "GONE")
    assert await backend.send(sealed(backend)) == [Delivered()] * 3
    connection = await client(server.url)
    await connection.jetstream().delete_stream("GONE")
    assert {word(v) for v in await backend.send(sealed(backend, record(4)))} == {"Blocked no_stream"}
    await make_stream(server.url, "GONE", "GONE.records")
    assert await backend.send(sealed(backend, record(4))) == [Delivered()]
    await connection.close()


async def test_a_stream_that_is_edited_under_way_is_refused_soon(
    server: NatsServer, made: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_stream(server.url, "EDIT", "EDIT.records")
    backend = made(server.url, "EDIT")
    assert await backend.send(sealed(backend)) == [Delivered()] * 3
    await edit(server, "EDIT", discard="old")
    monkeypatch.setattr("sidecar.storage.nats.LOOK_AGAIN_S", 0.0)
    (verdict,) = await backend.send(sealed(backend, record(4)))
    assert isinstance(verdict, Blocked)
    assert verdict.reason == (
        "weak_stream: stream EDIT: it drops the oldest when it is full: nats stream edit EDIT --discard new"
    )
    await edit(server, "EDIT", discard="new")
    assert await backend.send(sealed(backend, record(4))) == [Delivered()]


async def test_a_stream_that_is_sealed_under_way_says_so_itself(server: NatsServer, made: Backends) -> None:
    await make_stream(server.url, "SEALED", "SEALED.records")
    backend = made(server.url, "SEALED")
    assert await backend.send(sealed(backend)) == [Delivered()] * 3
    await edit(server, "SEALED", sealed=True)
    assert {word(v) for v in await backend.send(sealed(backend, record(4)))} == {"Blocked sealed"}


async def test_the_subject_of_another_stream_blocks(server: NatsServer, made: Backends) -> None:
    await make_stream(server.url, "MINE", "MINE.records")
    await make_stream(server.url, "THEIRS", "THEIRS.records")
    backend = made(server.url, "MINE", subject="THEIRS.records")
    assert {word(v) for v in await backend.send(sealed(backend))} == {"Blocked weak_stream"}
    assert "does not take THEIRS.records" in (await backend.examine())[0]


async def test_a_record_that_is_too_large_is_refused_alone(made: Backends) -> None:
    with nats_server(max_payload=40_000) as server:
        await make_stream(server.url, "S", "S.records")
        backend = made(server.url)
        large = record(2, dimensions={"d": "x" * 50_000})
        edge = record(4, dimensions={"d": "x" * (39_900 - len(record(4).json))})
        verdicts = await backend.send(sealed(backend, record(1), large, record(3), edge))
        assert verdicts == [Delivered(), Refused("too_large"), Delivered(), Refused("too_large")]
    with nats_server(max_payload=10_000) as server:
        await make_stream(server.url, "S", "S.records")
        backend = made(server.url)
        assert {word(v) for v in await backend.send(sealed(backend))} == {"Blocked weak_stream"}
        assert "raise its max_payload" in (await backend.examine())[0]


AUTH = (
    f'authorization {{ users: [ {{ user: "meter", password: "{PASSWORD}" }}, {{ user: "guest", password: "{PASSWORD}", \
permissions: {{ publish: {{ deny: "S.records" }} }} }} ] }}'
)


async def test_who_we_are(made: Backends, caplog: pytest.LogCaptureFixture) -> None:
    with nats_server(options=AUTH) as server:
        known = made(server.url, user="meter", password=PASSWORD)
        connection = await client(server.url, user="meter", password=PASSWORD)
        await connection.jetstream().add_stream(name="S", subjects=["S.records"], **GOOD_STREAM)
        await connection.close()
        assert await known.send(sealed(known)) == [Delivered()] * 3
        for options in ({}, {"user": "meter", "password": "wrong-wrong"}, {"token": "wrong-wrong"}):
            stranger = made(server.url, **options)
            (verdict,) = set(await stranger.send(sealed(stranger)))
            assert word(verdict) == "Blocked unauthorized"
        guest = made(server.url, user="guest", password=PASSWORD, timeout="20s")
        (verdict,) = set(await guest.send(sealed(guest)))
        assert isinstance(verdict, Blocked)
        assert verdict.reason.startswith("forbidden: ")
        assert 'no permission for publish to "s.records"' in verdict.reason
    assert PASSWORD not in caplog.text
    assert "wrong-wrong" not in caplog.text


async def test_nothing_is_said_before_tls(made: Backends, tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    ours = ca.issue_cert("127.0.0.1")
    ours.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    ours.private_key_pem.write_to_path(tmp_path / "key.pem")
    tls = f'tls {{ cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem" }}'
    with nats_server(options=f"{tls}\n{AUTH}") as server:
        url = f"tls://127.0.0.1:{server.port}"
        stranger = made(url, user="meter", password=PASSWORD)
        assert {word(v) for v in await stranger.send(sealed(stranger))} == {"Blocked tls"}
        assert "SIDECAR_NATS_CA_FILE" in (await stranger.examine())[0]
        ours_too = made(url, user="meter", password=PASSWORD, ca_file=str(tmp_path / "ca.pem"))
        assert {word(v) for v in await ours_too.send(sealed(ours_too))} == {"Blocked no_stream"}
    asked: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b'INFO {"server_id":"x","version":"2.14.0","max_payload":1048576,"headers":true,"auth_required":true}\r\n'
        )
        asked.append(await reader.read(10_000))
        writer.close()

    listener = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    for options in ({"user": "meter", "password": PASSWORD}, {"token": PASSWORD}):
        refused = made(f"tls://127.0.0.1:{port}", **options)
        assert {word(v) for v in await refused.send(sealed(refused))} == {"Blocked tls"}
    listener.close()
    assert not b"".join(asked), "a server that offers no TLS is told nothing"


async def test_the_leader_is_killed_under_load(made: Backends) -> None:
    with nats_cluster() as cluster:
        await make_stream(cluster.url, "S", "S.records", num_replicas=3)
        backend = made(cluster.url, replicas="3", timeout="3s", batch="50")
        requests = list(backend.encode([record(n) for n in range(2000)]).sealed)
        took = {"Delivered": 0, "Duplicate": 0}

        async def deliver(request: Sealed) -> None:
            while True:
                verdicts = await backend.send(request)
                if not {type(v) for v in verdicts} - {Delivered, Duplicate}:
                    for verdict in verdicts:
                        took[word(verdict)] += 1
                    return
                assert not any(isinstance(v, Refused) for v in verdicts), verdicts
                await asyncio.sleep(0.05)

        async def work(mine: list[Sealed]) -> None:
            for request in mine:
                await deliver(request)

        working = [asyncio.ensure_future(work(requests[n::4])) for n in range(4)]
        async with asyncio.timeout(30):
            while took["Delivered"] < 300:
                await asyncio.sleep(0.001)
        cluster.kill_leader("S")
        await asyncio.wait_for(asyncio.gather(*working), 60)
        assert sum(took.values()) == 2000
        alive = next(server for server in cluster.servers.values() if server.process is not None)
        assert await stored(alive.url, "S") == {record_id(n): record(n).json for n in range(2000)}


# The stream: pure

WANTED = Wanted(stream="S", subject="a.b", replicas=3, window_s=3600)
WEAK: dict[str, tuple[dict[str, Any], str]] = {
    "work queue": ({"retention": "workqueue"}, "taken twice"),
    "interest": ({"retention": "interest"}, "taken twice"),
    "discard old": ({"discard": "old"}, "--discard new"),
    "memory": ({"storage": "memory"}, "storage file"),
    "two replicas": ({"num_replicas": 2}, "2 of the 3 replicas"),
    "short window": ({"duplicate_window": 120.0}, "--dupe-window 1h"),
    "short age": ({"max_age": 1800.0}, "--max-age 7d"),
    "age below a longer window": ({"max_age": 7200.0, "duplicate_window": 10_800.0}, "--max-age 7d"),
    "no ack": ({"no_ack": True}, "--ack"),
    "one of a subject": ({"max_msgs_per_subject": 1}, "--max-msgs-per-subject"),
    "small messages": ({"max_msg_size": 1000}, "--max-msg-size"),
    "another subject": ({"subjects": ["a.c", "a.b.c"]}, "does not take a.b"),
    "sealed": ({"sealed": True}, "SIDECAR_NATS_STREAM"),
    "writes later": ({"persist_mode": "async"}, "persist mode"),
}


@pytest.mark.parametrize("name", list(WEAK))
def test_a_weak_stream_is_refused_by_name_with_what_to_do(name: str) -> None:
    from nats.js.api import StreamConfig

    good: dict[str, Any] = {"name": "S", "subjects": ["a.*"], **GOOD_STREAM, "num_replicas": 3}
    assert weaknesses(StreamConfig(**good), WANTED) == []
    changes, says = WEAK[name]
    (text,) = weaknesses(StreamConfig(**good | changes), WANTED)
    assert text.startswith("stream S: ")
    assert says in text


@pytest.mark.parametrize("name", ["ConnectionClosedError", "ConnectionReconnectingError", "StaleConnectionError"])
def test_a_lost_connection_is_said_in_one_way_whoever_notices_it(name: str) -> None:
    import nats.errors

    fault = api_fault(getattr(nats.errors, name)(), WANTED)
    assert (fault.reason, str(fault)) == ("connection_lost", "the connection to NATS ended")


def test_addresses_are_read_and_a_password_in_one_is_refused_without_being_said() -> None:
    assert read_servers("nats://a, nats://b:4333,nats://a:4222") == ("nats://a:4222", "nats://b:4333")
    assert read_servers("tls://[::1]:5") == ("tls://[::1]:5",)
    for wrong in ("", "a:4222", "http://a", "nats://a,tls://b", "nats://me:hunter2@a", "nats://a/path", "nats://a:b",
        "nats://a..b", f"nats://{'a' * 64}"):  # fmt: skip
        with pytest.raises(Unfit) as caught:
            read_servers(wrong)
        assert "hunter2" not in str(caught.value)


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    for given, says in (
        ({"user": "me"}, "belong together"),
        ({"user": "me", "password": "x", "token": "y"}, "set one of"),
    ):
        settings = NatsSettings(**values_of(settings_of(NatsSettings), {"url": "nats://a", **given}))
        with pytest.raises(ValueError, match=says):
            NatsBackend(settings, Context(data_dir=tmp_path))
