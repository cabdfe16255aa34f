"""A streaming upstream and a streaming load client, each a process of its own, so that neither is measured.

python streams.py upstream PORT        answers POST with N events of 300 bytes, one every GAP ms
python streams.py load PORT STREAMS    opens so many streams at once, reads them, prints chunks and seconds
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial

import uvloop

EVENTS = 100
GAP_S = 0.002
BODY = json.dumps(
    {"model": "gpt-5-mini", "stream": True, "messages": [{"role": "user", "content": "x" * 150}]}
).encode()


def event(number: int, size: int = 300) -> bytes:
    """One SSE event of `size` bytes, as an OpenAI-shaped chat sends them."""
    head = b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1790000000,"model":"gpt-5-mini",'
    head += b'"choices":[{"index":0,"delta":{"content":"'
    tail = b'"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    return head + str(number).encode().ljust(size - len(head) - len(tail), b"w") + tail


LAST = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1790000000,"model":"gpt-5-mini",'
    b'"choices":[],"usage":{"prompt_tokens":43,"completion_tokens":97,"total_tokens":140}}\n\n'
    b"data: [DONE]\n\n"
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(piece: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(piece), piece)


class Upstream(asyncio.Protocol):
    """Answers each request (told by its blank line and content length) with one stream."""

    def __init__(self, events: int, gap_s: float) -> None:
        self.events, self.gap_s, self.buffer = events, gap_s, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank, rest = self.buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        if len(rest) >= length:
            self.buffer = rest[length:]
            self.transport.write(HEAD)  # type: ignore[attr-defined]
            self.step(0)

    def step(self, number: int) -> None:
        if self.transport.is_closing():
            return
        if number == self.events:
            self.transport.write(chunked(LAST) + b"0\r\n\r\n")  # type: ignore[attr-defined]
            return
        self.transport.write(chunked(event(number)))  # type: ignore[attr-defined]
        asyncio.get_running_loop().call_later(self.gap_s, self.step, number + 1)


class Client(asyncio.Protocol):
    """Sends one request and reads to the terminal chunk, `rounds` times on one connection."""

    def __init__(self, rounds: int, done: asyncio.Future[int]) -> None:
        self.rounds, self.done, self.seen, self.tail = rounds, done, 0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.transport.write(  # type: ignore[attr-defined]
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer sk-bench\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
        )

    def data_received(self, data: bytes) -> None:
        self.seen += data.count(b"data: {")
        self.tail = (self.tail + data)[-5:]
        if self.tail == b"0\r\n\r\n":
            self.tail = b""
            self.rounds -= 1
            if self.rounds:
                self.ask()
            else:
                self.transport.close()
                self.done.set_result(self.seen)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("closed early"))


def _same(client: Client) -> Client:
    return client


async def upstream(port: int, events: int, gap_s: float) -> None:
    server = await asyncio.get_running_loop().create_server(
        lambda: Upstream(events, gap_s), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


async def load(port: int, streams: int, rounds: int) -> None:
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    futures: list[asyncio.Future[int]] = []
    for _ in range(streams):
        future: asyncio.Future[int] = loop.create_future()
        await loop.create_connection(partial(Client, rounds, future), "127.0.0.1", port)
        futures.append(future)
    chunks = sum(await asyncio.gather(*futures))
    print(json.dumps({"chunks": chunks, "seconds": time.perf_counter() - began}))


async def hold(port: int, streams: int) -> None:
    """Open so many streams, say so once each has sent its first event, and hold them until standard input closes."""
    loop = asyncio.get_running_loop()
    clients: list[Client] = []
    for number in range(streams):
        client = Client(1, loop.create_future())
        await loop.create_connection(partial(_same, client), "127.0.0.1", port)
        clients.append(client)
        if number % 200 == 199:
            await asyncio.sleep(0.05)
    while sum(client.seen > 0 for client in clients) < streams:
        await asyncio.sleep(0.1)
    print(json.dumps({"open": len(clients)}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    verb, port, *rest = sys.argv[1:]
    if verb == "upstream":
        events = int(rest[0]) if rest else EVENTS
        uvloop.run(upstream(int(port), events, float(rest[1]) if len(rest) > 1 else GAP_S))
    elif verb == "load":
        uvloop.run(load(int(port), int(rest[0]), int(rest[1])))
    else:
        uvloop.run(hold(int(port), int(rest[0])))


if __name__ == "__main__":
    main()
