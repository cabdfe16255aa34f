"""Calls as clients and servers of Python send them: a head, and its body in a write of its own. Each end is a process
of its own, so that neither is measured.

python apart.py upstream PORT KIND             answers POST; KIND is `sized`, `chunked` or `gzip` (in chunks)
python apart.py load PORT CONNECTIONS SECONDS  sends calls one behind the other on each connection, prints how many
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import sys
import time

import uvloop

REQUEST = json.dumps({"model": "gpt-5-mini", "messages": [{"role": "user", "content": "x" * 180}]}).encode()
RESPONSE = json.dumps(
    {
        "id": "chatcmpl-bench", "object": "chat.completion", "created": 1790000000, "model": "gpt-5-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "y" * 400}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 43, "completion_tokens": 97, "total_tokens": 140},
    }
).encode()  # fmt: skip
LAST_CHUNK = b"0\r\n\r\n"


def response(kind: str) -> tuple[bytes, bytes]:
    """Head and body, as on the wire."""
    body = gzip.compress(RESPONSE) if kind == "gzip" else RESPONSE
    fields = b"Content-Type: application/json\r\n"
    if kind == "gzip":
        fields += b"Content-Encoding: gzip\r\n"
    if kind == "sized":
        return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n" % (fields, len(body)), body
    head = b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n" % fields
    return head, b"%x\r\n%b\r\n%b" % (len(body), body, LAST_CHUNK)


class Talker(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = self.head = b""
        self.fd = transport.get_extra_info("socket").fileno()

    def say(self, *parts: bytes) -> None:
        """Each at once, in a write of its own: the transport would join them."""
        for part in parts:
            if os.write(self.fd, part) < len(part):
                raise RuntimeError("the socket's buffer is full")

    def message(self, data: bytes) -> bool:
        """Whether one is whole with that."""
        self.buffer += data
        head, blank, body = self.buffer.partition(b"\r\n\r\n")
        if not blank:
            return False
        _, sized, length = head.lower().partition(b"content-length:")
        whole = len(body) >= int(length.partition(b"\r\n")[0]) if sized else body.endswith(LAST_CHUNK)
        if whole:
            self.buffer, self.head = b"", head
        return whole


class Upstream(Talker):
    def __init__(self, kind: str) -> None:
        self.parts = response(kind)

    def data_received(self, data: bytes) -> None:
        if self.message(data):
            self.say(*self.parts)


class Client(Talker):
    def __init__(self, until: float) -> None:
        self.until, self.calls = until, 0
        self.over: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.ask()

    def ask(self) -> None:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        head += b"Authorization: Bearer sk-bench\r\nContent-Length: %d\r\n\r\n" % len(REQUEST)
        self.say(head, REQUEST)

    def data_received(self, data: bytes) -> None:
        if not self.message(data):
            return
        if not self.head.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(repr(self.head))
        self.calls += 1
        if time.monotonic() < self.until:
            self.ask()
        else:
            self.over.set_result(self.calls)
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(error or ConnectionError("closed early"))


async def upstream(port: int, kind: str) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(kind), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


async def load(port: int, connections: int, seconds: float) -> None:
    loop, until = asyncio.get_running_loop(), time.monotonic() + seconds
    clients = [(await loop.create_connection(lambda: Client(until), "127.0.0.1", port))[1] for _ in range(connections)]
    print(json.dumps({"calls": sum(await asyncio.gather(*(client.over for client in clients)))}))


def main() -> None:
    verb, port, *rest = sys.argv[1:]
    if verb == "upstream":
        uvloop.run(upstream(int(port), rest[0]))
    else:
        uvloop.run(load(int(port), int(rest[0]), float(rest[1])))


if __name__ == "__main__":
    main()
