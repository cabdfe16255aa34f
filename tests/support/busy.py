"""Bodies made to be dear to read, and plain text to compare them with."""

from __future__ import annotations

SIZE = 3_000_000
USAGE = b'"usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}'


def filled(unit: bytes, size: int = SIZE) -> bytes:
    return unit * (size // len(unit))


def members_of(unit: bytes) -> bytes:
    return b'{"model":"m","object":"chat.completion","choices":[],' + filled(unit) + USAGE + b"}"


def unwanted(unit: bytes) -> bytes:
    return b'{"model":"m","choices":[],"x":[' + filled(unit) + b"0]," + USAGE + b"}"


DOCUMENTS: dict[str, bytes] = {
    "small objects": members_of(b'"x":{"a":1},'),
    "empty objects": members_of(b'"x":{},'),
    "empty arrays": members_of(b'"x":[],'),
    "scalars": members_of(b'"x":1,'),
    "strings": members_of(b'"x":"s",'),
    "blanks between": members_of(b'"x" : 1 ,\n'),
    "usage again and again": members_of(b'"usage":{"prompt_tokens":1},'),
    "usage as a number": members_of(b'"usage":1,'),
    "usage below": members_of(b'"x":{"usage":1},'),
    "escaped names": members_of(b'"\\u0075sage":{"a":1},'),
    "a name of escapes": members_of(b'"\\"\\\\":1,'),
    "choices again and again": members_of(b'"choices":[{"index":1}],'),
    "choices": b'{"model":"m","choices":[' + filled(b'{"index":0},') + b"{}]," + USAGE + b"}",
    "empty choices": b'{"model":"m","choices":[' + filled(b"{},") + b"{}]," + USAGE + b"}",
    "choices that are none": b'{"model":"m","choices":[' + filled(b"1,") + b"{}]," + USAGE + b"}",
    "deep choices": b'{"model":"m","choices":[' + filled(b'{"usage":{"a":[{}]}},') + b"{}]," + USAGE + b"}",
    "objects in what is skipped": unwanted(b'{"a":1},'),
    "empty objects in what is skipped": unwanted(b"{},"),
    "strings in what is skipped": unwanted(b'"a",'),
    "brackets in strings": unwanted(b'"[",'),
    "floats": unwanted(b"0.0123456789,"),
    "nested and back": unwanted(b"[" * 9 + b"]" * 9 + b","),
    "nested far and back": unwanted(b"[" * 1500 + b"]" * 1500 + b","),
    "deep": b'{"model":"m","x":' + b"[" * (SIZE // 2) + b"]" * (SIZE // 2) + b"," + USAGE + b"}",
    "blanks": b'{"model":"m"' + b" " * SIZE + b"," + USAGE + b"}",
    "quotes": b'{"model":"m","x":"' + filled(b'\\"') + b'",' + USAGE + b"}",
    "backslashes": b'{"model":"m","x":"' + filled(b"\\\\") + b'",' + USAGE + b"}",
}
STREAMS: dict[str, bytes] = {
    "usage": filled(b'data: {"usage":{"a":1}}\n\n'),
    "no shape": filled(b'data: {"a":1}\n\n'),
    "empty": filled(b"data:\n\n"),
    "unreadable": filled(b'data: {"usage":\n\n'),
    "not a number": filled(b'data: {"usage":{"a":NaN}}\n\n'),
    "one event of lines": filled(b"data: 1\n"),
    "errors": filled(b'data: {"error":1}\n\n'),
}
TEXT = b'{"model":"m","choices":[{"message":{"content":"' + filled(b"The quick brown fox. ") + b'"}}],' + USAGE + b"}"
