"""What the parts of one call cost, in one process and without sockets: `python tests/bench/inner.py [word …]`.

The real client, call and upstream connection run over transports in memory, on the short way and on the careful one;
then what the metering process makes of a frame. For every part: CPU microseconds of the quickest block of calls (the
least disturbed one), and how many bytecodes and functions it runs, which no busy machine can falsify. The whole call
costs more than the sum of its parts: caches and branch predictors hold one part but not all, so what counts is how much
is run, not which. In a running process, with the kernel between, it is more again. Nothing here is a test: no figure is
asserted.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import peers  # noqa: E402
import streams  # noqa: E402

from sidecar.backends import backend_settings  # noqa: E402
from sidecar.meters.buckets import batch_sums  # noqa: E402
from sidecar.meters.definition import DEFAULT_METERS, Meter, read_meters  # noqa: E402
from sidecar.model.call_group import Gathering, groups_of  # noqa: E402
from sidecar.model.exchange import (  # noqa: E402
    Exchange,
    Outcome,
    PlainExchange,
    RequestShape,
    ResponseShape,
    Usage,
)
from sidecar.model.http_url import UpstreamAddress  # noqa: E402
from sidecar.model.record import encode  # noqa: E402
from sidecar.prices import price_book  # noqa: E402
from sidecar.proxy import plain_call  # noqa: E402
from sidecar.proxy.aiohttp_compat import Server  # noqa: E402
from sidecar.proxy.client_connection import Client, Clients  # noqa: E402
from sidecar.proxy.context import Destination, Hop, Reading  # noqa: E402
from sidecar.proxy.headers import HeaderRules  # noqa: E402
from sidecar.proxy.plain_call import PlainCalls  # noqa: E402
from sidecar.proxy.route import Routes  # noqa: E402
from sidecar.proxy.upstream import Upstream, UpstreamConnection  # noqa: E402
from sidecar.runtime import factory  # noqa: E402
from sidecar.runtime.hop_counts import HopCounts  # noqa: E402
from sidecar.runtime.metrics import Metrics  # noqa: E402
from sidecar.settings import load  # noqa: E402
from sidecar.spool import Health  # noqa: E402
from sidecar.spool.frames import decode_frame, encode_frame  # noqa: E402
from sidecar.spool.recorder import Recorder  # noqa: E402
from sidecar.usage.providers.table import known_routes  # noqa: E402

BLOCKS = 60
CALLS = 100  # in a block
CHUNKS = 2_000  # of a stream

PATH = "/v1/chat/completions"
UPSTREAM = "http://127.0.0.1:9001"
BODY = json.dumps({"model": "gpt-5-mini", "messages": [{"role": "user", "content": "x" * 180}]}).encode()
FIELDS = [
    (b"Host", b"127.0.0.1:9000"),
    (b"Content-Type", b"application/json"),
    (b"Authorization", b"Bearer sk-bench"),
    (b"Content-Length", b"%d" % len(BODY)),
]


def head(first: bytes, fields: list[tuple[bytes, bytes]]) -> bytes:
    return first + b"\r\n" + b"".join(b"%b: %b\r\n" % field for field in fields) + b"\r\n"


REQUEST = head(b"POST /v1/chat/completions HTTP/1.1", FIELDS) + BODY
STREAM_REQUEST = (
    head(b"POST /v1/chat/completions HTTP/1.1", [*FIELDS[:-1], (b"Content-Length", b"%d" % len(streams.BODY))])
    + streams.BODY
)
DOCUMENT = json.dumps(peers.chat_answer()).encode()
ANSWER_FIELDS = [
    (b"Server", b"nginx/1.22.1"),
    (b"Date", b"Tue, 03 Mar 2026 10:00:00 GMT"),
    (b"Content-Type", b"application/json"),
    (b"Content-Length", b"%d" % len(DOCUMENT)),
    (b"Connection", b"keep-alive"),
]
ANSWER = head(b"HTTP/1.1 200 OK", ANSWER_FIELDS) + DOCUMENT


class Transport(asyncio.Transport):
    """Takes what is written and throws it away."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 40000)})
        self.written = 0

    def write(self, data: Any) -> None:
        self.written += len(data)

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return False


class NoLink:
    """Frames go nowhere, and are on disk at once."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None

    def send(self, number: int, data: bytes) -> None:
        assert self.recorder is not None
        self.recorder.acknowledged(number)

    def begin_anew(self) -> None: ...

    def health(self) -> Health:
        return Health()


class Wires:
    """One client and one upstream connection of a real proxy, with nothing at their ends."""

    def __init__(self, *, plain: bool = True) -> None:
        loop = asyncio.get_running_loop()
        settings = load(
            {"SIDECAR_UPSTREAM_URL": UPSTREAM, "SIDECAR_DURABILITY": "buffered"}, backend_settings=backend_settings()
        )
        counts = HopCounts()
        upstream = Upstream(
            loop=loop,
            host="127.0.0.1",
            port=9001,
            socket_path=None,
            tls=None,
            server_name=None,
            connect_timeout_s=1,
            keepalive_s=1e9,
            age_s=1e9,
        )
        link = NoLink()
        self.recorder = link.recorder = Recorder(link, counts, settings.spool)
        self.attribute = factory.attributor(settings, b"k" * 32, lambda kind: None)
        self.route = Routes([], known_routes()).match
        self.taps = factory.usage_taps(settings, counts.usage_anomaly)
        address = UpstreamAddress.parse(UPSTREAM)
        rest = Destination(
            name=None,
            url=UPSTREAM,
            headers=HeaderRules(settings.proxy, address),
            upstream=upstream,
            reading=Reading(taps=self.taps, attribute=self.attribute, plainly=self.attribute),
            timeout_s=600,
        )
        hop = Hop(
            settings=settings.proxy,
            rest=rest,
            recorder=self.recorder,
            route=self.route,
            metrics=counts,
            loop=loop,
            now=loop.time(),
        )
        calls = PlainCalls(hop, address.base) if plain else None
        clients = Clients(9, counts)
        self.client = Client(Server(lambda server: Client(server, hop, clients), loop), hop, clients, calls)
        self.client.connection_made(Transport())
        self.connection = UpstreamConnection(upstream, loop)
        self.connection.connection_made(Transport())
        upstream.keep(self.connection)

    def call(self) -> None:
        self.client.data_received(REQUEST)
        self.connection.data_received(ANSWER)

    def tap(self) -> Usage | None:
        request = self.taps.request("POST", PATH, FIELDS)
        assert request is not None
        request.feed(BODY)
        answer = self.taps.response(request, 200, ANSWER_FIELDS)
        assert answer is not None
        answer.feed(DOCUMENT)
        return answer.finish(True)

    def finished(self) -> Exchange:
        """An exchange as the careful way hands it to the recorder."""
        subscriber, dimensions = self.attribute(FIELDS, PATH, None)
        return Exchange(
            method="POST",
            url=UPSTREAM + PATH,
            route=PATH,
            client_ip="127.0.0.1",
            request_headers=[name.decode() for name, _ in FIELDS],
            subscriber=subscriber,
            dimensions=dimensions,
            id="0190a5e2-0000-7000-8000-0123456789ab",
            started_ns=time.time_ns(),
            first_byte_ms=1.5,
            duration_ms=2.5,
            status=200,
            outcome=Outcome.COMPLETE,
            response_headers=[name.decode() for name, _ in ANSWER_FIELDS],
            request_bytes=len(BODY),
            response_bytes=len(DOCUMENT),
            usage=self.tap(),
        )


WITH_CEL = (
    *DEFAULT_METERS,
    *read_meters(
        [{"name": "m", "aggregation": {
            "type": "SUM", "expression": "double(input_tokens) * 1.25 + double(output_tokens) * 10.0"}}]
    ),
)  # fmt: skip


class Metering:
    """What the metering process does with a frame of calls, up to the disk and behind it."""

    def __init__(self, exchange: Exchange) -> None:
        settings = load({"SIDECAR_UPSTREAM_URL": UPSTREAM}, backend_settings=backend_settings())
        self.metrics = Metrics(backends=["ledger"])
        self.reader = factory.plain_readers(settings, self.metrics, price_book(settings))("a")
        self.shape = RequestShape(
            number=1,
            method="POST",
            target=PATH,
            fields=((b"Content-Type", b"application/json"),),
            read=True,
            url=exchange.url,
            route=PATH,
            request_headers=exchange.request_headers,
            user_agent=None,
            subscriber=exchange.subscriber,
            dimensions={},
        )
        self.response = ResponseShape(number=1, status=200, response_headers=exchange.response_headers)
        head = ANSWER[: ANSWER.index(b"\r\n\r\n")]
        plain = PlainExchange(
            self.shape,
            "127.0.0.1",
            None,
            len(BODY),
            BODY,
            exchange.id,
            exchange.started_ns,
            0,
            1.5,
            1.5,
            self.response,
            len(DOCUMENT),
            head,
            DOCUMENT,
        )
        self.calls = [plain] * CALLS
        self.frame = self.pack()
        self.told = decode_frame(self.frame)

    def pack(self) -> bytes:
        return encode_frame(1, admitted=CALLS, ended=self.calls)

    def lines(self) -> Sequence[Gathering]:
        self.reader.lines(self.told.ended, 0, {1: self.shape}, {1: self.response}, seq=0, lines=[])
        return self.reader.take_gathered()

    def counted(self, gathered: Sequence[Gathering]) -> None:
        for one in gathered:
            self.metrics.calls_ended(one)
        assert self.metrics.days  # now they are


def counted(run: Callable[[], object]) -> str:
    """Bytecodes executed, Python functions and C functions called."""
    bytecodes = python = c = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal bytecodes
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        bytecodes += event == "opcode"
        return trace

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal python, c
        python += event == "call"
        c += event == "c_call"

    sys.settrace(trace)
    sys.setprofile(profile)
    run()
    sys.setprofile(None)
    sys.settrace(None)
    return f"{bytecodes:7} {python - 1:6} {c - 1:6}"


async def part(name: str, run: Callable[[], object], each: int = 1) -> None:
    """`each`: calls that one run is for."""
    if not wanted(name):
        return
    best = float("inf")
    runs = CALLS // each
    for _ in range(BLOCKS):
        before = time.thread_time_ns()
        for _ in range(runs):
            run()
        best = min(best, time.thread_time_ns() - before)
        await asyncio.sleep(0)
    print(f"{name:24}{best / CALLS / 1e3:8.2f} µs   {counted(run) if each == 1 else ''}", flush=True)


async def chunks(name: str, *, cut: bool) -> None:
    """A relayed chunk of a stream. `cut`: its framing does not end where the read does, as on a busy network."""
    if not wanted(name):
        return
    pieces = [streams.chunked(streams.event(number)) for number in range(CHUNKS)]
    if cut:
        whole = b"".join(pieces)
        size = len(pieces[0]) + 1
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    best = float("inf")
    seen = ""
    for _ in range(BLOCKS // 4):
        wires = Wires()
        wires.client.data_received(STREAM_REQUEST)
        data_received = wires.connection.data_received
        data_received(streams.HEAD)
        data_received(pieces[0])
        seen = counted(lambda: data_received(pieces[1]))  # noqa: B023 - called at once
        before = time.thread_time_ns()
        for piece in pieces[2:]:
            data_received(piece)
        best = min(best, time.thread_time_ns() - before)
        data_received(streams.chunked(streams.LAST) + b"0\r\n\r\n")
        await asyncio.sleep(0)
    print(f"{name:24}{best / len(pieces) / 1e3:8.2f} µs   {seen}", flush=True)


async def share_of_an_expression(wires: Wires, metering: Metering) -> None:
    """What one meter in CEL adds to the inside of a call, as a share of it: goal 5 %. Interleaved, least of all rounds,
    so that the machine's mood is in both."""
    if not wanted("share"):
        return
    reader = metering.reader

    def stages(meters: Sequence[Meter]) -> None:
        reader._keep_numbers = meters is WITH_CEL  # as it does where a meter has an expression
        gathered = metering.lines()
        metering.counted(gathered)
        batch_sums([], meters, groups_of(gathered))

    def hop() -> None:
        for _ in range(CALLS):
            wires.call()
        metering.pack()
        decode_frame(metering.frame)

    runs: dict[str, Callable[[], None]] = {
        "rest": hop,
        "without": lambda: stages(DEFAULT_METERS),
        "with": lambda: stages(WITH_CEL),
    }
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(BLOCKS * 4):
        for name, run in runs.items():
            before = time.thread_time_ns()
            run()
            best[name] = min(best[name], (time.thread_time_ns() - before) / CALLS / 1e3)
            await asyncio.sleep(0)
    added, whole = best["with"] - best["without"], best["rest"] + best["without"]
    print(f"one meter in CEL: {added:.2f} µs of {whole:.2f}, a share of {added / whole:.1%}", flush=True)
    print(f"records a second: {1e6 / best['without']:,.0f} without it, {1e6 / best['with']:,.0f} with it", flush=True)


def wanted(name: str) -> bool:
    return len(sys.argv) < 2 or any(word in name for word in sys.argv[1:])


async def main() -> None:
    factory.calm_collector()
    plain_call.SIGHTS = 1
    wires, careful = Wires(), Wires(plain=False)
    exchange = wires.finished()
    metering = Metering(exchange)
    gathered = metering.lines()
    print(f"{'':24}{'CPU a call':>11}   bytecodes, functions: Python, C")
    await part("hop, short way", wires.call)
    await part("hop, careful way", careful.call)
    await part("taps", wires.tap)
    await part("attribution", lambda: wires.attribute(FIELDS, PATH, "127.0.0.1"))
    await part("route", lambda: wires.route("POST", PATH))
    await part("frame written", metering.pack, CALLS)
    await part("frame read", lambda: decode_frame(metering.frame), CALLS)
    await part("lines, short way", metering.lines, CALLS)
    await part("counts, short way", lambda: metering.counted(gathered), CALLS)
    await part("sums, short way", lambda: batch_sums([], DEFAULT_METERS, groups_of(gathered)), CALLS)
    metering.reader._keep_numbers = True  # as it does where a meter has an expression
    await part("lines, short way, numbers kept", metering.lines, CALLS)
    gathered = metering.lines()
    groups = groups_of(gathered)
    await part("sums, short way, and one meter in CEL", lambda: batch_sums([], WITH_CEL, groups), CALLS)
    records = [record for group in groups for record in group.records()]
    await part("sums, careful way", lambda: batch_sums(records, DEFAULT_METERS), CALLS)
    await part("sums, careful way, and one meter in CEL", lambda: batch_sums(records, WITH_CEL), CALLS)
    await part("line, careful way", lambda: encode(exchange, seq=1, instance="a"))
    await part("counts, careful way", lambda: metering.metrics.call_ended(exchange))
    await share_of_an_expression(wires, metering)
    await chunks("chunk", cut=False)
    await chunks("chunk, cut", cut=True)


if __name__ == "__main__":
    uvloop.run(main())
