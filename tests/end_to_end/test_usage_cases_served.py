"""The same answers through the running sidecar: the client gets every byte, and the record says what was used.

One sidecar for each base path of an upstream; every answer with a length, in chunks and closed by the end of the
connection, each in a coding of its own.
"""

from __future__ import annotations

import asyncio
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.rawhttp import Conversation, RawUpstream, dechunk
from support.usage_samples import CASES, SAMPLES, Sample, coded, differences, load, ways, wrong_in
from support.whole import Whole
from support.wsframes import frame

from sidecar.model.exchange import USAGE_FIELDS

# Batch results are many answers in one, of which none is counted by default: `unit/test_usage_sockets` reads those.
ALL = {
    name: sample for name, sample in (load(SAMPLES) | load(CASES)).items() if sample.records is None or sample.websocket
}
FRAMINGS = {"sized": ("", "whole"), "chunked": ("gzip", "random pieces"), "closed": ("br", "13 bytes")}
PIECES_MAX = 400  # chunks of one answer here; `contract/test_usage_cases` cuts finer
MASK = b"\x01\x02\x03\x04"


def head_of(case: Sample, coding: str, framing: str, size: int) -> bytes:
    fields = [*case.response_headers, *([(b"Content-Encoding", coding.encode())] if coding else [])]
    how = {
        "sized": b"Content-Length: %d\r\n" % size,
        "chunked": b"Transfer-Encoding: chunked\r\n",
        "closed": b"Connection: close\r\n",
    }
    lines = b"".join(b"%b: %b\r\n" % field for field in fields)
    return b"HTTP/1.1 %d OK\r\n%b%b\r\n" % (case.status, lines, how[framing])


def pieces_of(case: Sample, framing: str) -> list[bytes]:
    coding, way = FRAMINGS[framing]
    pieces = ways(case.body)[way]
    if len(pieces) > PIECES_MAX:
        step = -(-len(pieces) // PIECES_MAX)
        pieces = [b"".join(pieces[start : start + step]) for start in range(0, len(pieces), step)]
    return coded(pieces, coding) if coding else pieces


def body_of(case: Sample, framing: str) -> bytes:
    return b"".join(pieces_of(case, framing))


async def serve(conversation: Conversation) -> None:
    """Answer what the request's `X-Case` names, in the framing that `X-Framing` names."""
    while True:
        head, _ = await conversation.message()
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        case, framing = ALL[fields[b"X-Case"].decode()], fields[b"X-Framing"].decode()
        pieces = pieces_of(case, framing)
        await conversation.send(head_of(case, FRAMINGS[framing][0], framing, sum(map(len, pieces))))
        for piece in pieces:
            await conversation.send(b"%x\r\n%b\r\n" % (len(piece), piece) if framing == "chunked" and piece else piece)
        if framing == "chunked":
            await conversation.send(b"0\r\n\r\n")
        elif framing == "closed":
            await conversation.close()
            return


async def tunnel(conversation: Conversation) -> None:
    head = await conversation.head()
    name = head.partition(b"X-Case: ")[2].partition(b"\r\n")[0].decode()
    case = ALL[name]
    await conversation.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
    sent = b"".join(frame(message, mask=MASK) for message in case.client_messages)
    assert await conversation.exactly(len(sent)) == sent
    wire = b"".join(map(frame, case.body.splitlines())) + frame(b"", 8)
    for start in range(0, len(wire), 16_384):
        await conversation.send(wire[start : start + 16_384])
    await conversation.close()


async def either(conversation: Conversation) -> None:
    conversation.seen += await conversation.reader.read(262_144)
    await (tunnel if b"Upgrade: websocket" in conversation.seen else serve)(conversation)


async def call(url: str, case: Sample, framing: str) -> bytes:
    """One call on a connection of its own; the answer's body as it came."""
    client = await connected(url)
    fields = [*case.request_headers, (b"X-Case", case.name.encode()), (b"X-Framing", framing.encode())]
    await client.send(
        b"%b %b HTTP/1.1\r\nHost: me\r\nContent-Length: %d\r\n%b\r\n%b"
        % (
            case.method.encode(),
            case.path.encode(),
            len(case.request_body),
            b"".join(b"%b: %b\r\n" % field for field in fields),
            case.request_body,
        )
    )
    head = await client.head()
    assert b" %d " % case.status in head, head
    if b"transfer-encoding: chunked" in head.lower():
        body = dechunk(await client.chunked())
    elif b"content-length: " in head.lower():
        body = await client.body_of(head)
    else:
        body = await client.rest()
    await client.close()
    return body


async def talk(url: str, case: Sample) -> bytes:
    client = await connected(url)
    await client.send(
        b"GET %b HTTP/1.1\r\nHost: me\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX-Case: %b\r\nX-Framing: socket\r\n\r\n"
        % (case.path.encode(), case.name.encode())
    )
    await client.head()
    await client.send(b"".join(frame(message, mask=MASK) for message in case.client_messages))
    wire = await client.rest()
    await client.close()
    return wire


async def connected(url: str) -> Conversation:
    host, _, port = url.rpartition("/")[2].partition(":")
    return Conversation(*await asyncio.open_connection(host, int(port)))


def as_usage(found: dict[str, Any] | None) -> Any:
    """A record's usage as the object that samples are compared with: what a record leaves out is None."""
    if found is None:
        return None
    plain: dict[str, Any] = dict.fromkeys(USAGE_FIELDS) | {"units": {}, "finish_reasons": []}
    return SimpleNamespace(**plain | found)


def wrong_of(case: Sample, records: list[dict[str, Any]]) -> object:
    """What the records of one case do not say rightly."""
    if case.records is None:
        assert len(records) == 1
        return wrong_in(as_usage(records[0]["usage"]), case)
    children = [record for record in records if record["usage"] is not None]
    if len(children) != len(case.records):
        return f"{len(children)} records"
    pairs = zip(children, case.records, strict=True)
    return [found for record, expected in pairs if (found := differences(as_usage(record["usage"]), expected))]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("base", sorted({case.upstream_base for case in ALL.values()}))
async def test_the_bytes_are_the_same_and_the_record_is_right(tmp_path: Path, base: str) -> None:
    cases = [case for case in ALL.values() if case.upstream_base == base]
    different: list[str] = []
    async with RawUpstream(either) as upstream:
        whole = Whole(
            tmp_path / "data",
            upstream.url + base,
            SIDECAR_DIMENSIONS="case=x-case,framing=x-framing",
            SIDECAR_BACKENDS="ledger",
        )
        async with whole:
            for case in cases:
                if case.websocket:
                    wire = b"".join(map(frame, case.body.splitlines())) + frame(b"", 8)
                    if await talk(whole.proxy_url, case) != wire:
                        different.append(case.name)
                    continue
                for framing in FRAMINGS:
                    if await call(whole.proxy_url, case, framing) != body_of(case, framing):
                        different.append(f"{case.name} {framing}")
            await whole.settled()
            records = await whole.records()
            assert await whole.stop() == 0, whole.log.read_text()

    assert not different
    by_case = sorted(records, key=lambda record: (record["dimensions"]["case"], record["dimensions"]["framing"]))
    found = {key: list(group) for key, group in groupby(by_case, lambda record: tuple(record["dimensions"].values()))}
    assert len(found) == sum(1 if case.websocket else len(FRAMINGS) for case in cases)
    wrong = {key: bad for key, group in found.items() if (bad := wrong_of(ALL[key[0]], group))}
    assert not wrong, "\n".join(f"{key}: {bad}" for key, bad in wrong.items())
