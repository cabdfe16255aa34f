"""Where the requests in what a client sent begin and end, as far as it can be seen without parsing them.

aiohttp's parser loses what stands behind a request that offers another protocol, gives nothing of what it was given
together with something malformed, and does not say what it holds of a next request. So the connection gives it what
could be such a thing in pieces that end where a request may. That is only looked for: odd spellings may be missed, and
a mark may stand in a body. What is then served less well is a connection, which ends; no bytes are taken for another
thing than the parser takes them for.
"""

from __future__ import annotations

from typing import Final

from sidecar.proxy.aiohttp_compat import EMPTY_PAYLOAD, PIPELINE_MAX, Messages, RawRequestMessage, StreamReader

HEAD_END: Final = b"\r\n\r\n"
LAST_CHUNK: Final = b"\r\n0\r\n\r\n"
BORDER_BYTES: Final = len(LAST_CHUNK) - 3  # of `0 CR LF CR LF` all but one
PIECE_BYTES: Final = 16_384  # given to the parser at once: it copies what it does not parse, so it is given little


def border(before: bytes, data: bytes) -> bytes:
    """What is to be kept of all that was parsed: its last bytes, in which a mark may begin. `before`: the same, before
    `data` was."""
    return (before + data)[-BORDER_BYTES:] if len(data) < BORDER_BYTES else data[-BORDER_BYTES:]


def may_be_more(data: bytes, at: int, queued: int) -> bool:
    """Whether, in the next piece, a request may offer another protocol, or there may be more requests than the parser
    takes at once, behind so many that wait."""
    end = at + PIECE_BYTES
    if data.find(b"pgrade", at, end) >= 0 or data.find(b"PGRADE", at, end) >= 0:
        return True
    return data.count(HEAD_END, at, end) + queued >= PIPELINE_MAX


def end_across(mark: bytes, before: bytes, data: bytes, at: int) -> int:
    """Where in `data` a mark ends that begins in what was parsed before (the `border`); -1: none does."""
    found = (before + data[at : at + len(mark) - 1]).find(mark)
    end = found + len(mark) - len(before)
    return at + end if found >= 0 and end > 0 else -1


def is_all(messages: Messages, before: bytes, data: bytes) -> bool:
    """Whether the last of these requests is sure to end where `data` does: the parser then holds nothing of the next
    one. `before`: the border before `data`."""
    message, payload = messages[-1]
    if payload is EMPTY_PAYLOAD:
        return (before + data).endswith(HEAD_END)
    length = message.headers.get("Content-Length", "")
    end = data.find(HEAD_END)
    return len(messages) == 1 and end >= 0 and length.isdecimal() and end + len(HEAD_END) + int(length) == len(data)


def body_left(messages: Messages, data: bytes, *, alone: bool) -> tuple[StreamReader, int] | None:
    """Of the last of these requests the sized body that is still to come, and how many bytes; None: it has none.
    `alone`: `data` has what came from the first byte of the first one on."""
    message, payload = messages[-1]
    if message.chunked or message.upgrade or payload.is_eof():
        return None
    end = data.find(HEAD_END) if alone and len(messages) == 1 else -1
    came = payload.total_bytes if end < 0 else len(data) - end - len(HEAD_END)
    return payload, length_of(message) - came


def length_of(message: RawRequestMessage) -> int:
    """Of a sized body, in bytes. The parser has seen to it that it is one number."""
    return int(message.headers.get("Content-Length", "0"))


def head_bytes(message: RawRequestMessage) -> int:
    """What a head weighs beside its method and version."""
    return sum(len(name) + len(value) + 4 for name, value in message.raw_headers) + len(message.path)


def may_pass_on(message: RawRequestMessage) -> bool:
    """Whether the protocol switch that a request offers is passed on, if the connection allows it. HTTP/2 is not, since
    it would hide its calls from the record."""
    if message.version.minor == 0 or message.should_close or message.method == "CONNECT":
        return False
    return b"h2c" not in message.headers.get("Upgrade", "").lower().encode("utf-8", "replace")
