"""A few short fields of a `multipart/form-data` body, found while the files in it pass by.

At most a delimiter's length and one part's head are kept. A malformed form ends the reading without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection

HEAD_MAX_BYTES = 4_096  # of one part; browsers and clients send about 150
FIELD_MAX_BYTES = 512  # of a kept field: a model's name
PARTS_MAX = 512  # of a form; what comes behind so many is left unread
BOUNDARY_MAX_CHARS = 200  # RFC 2046 allows 70

_BOUNDARY = re.compile(r'boundary\s*=\s*(?:"([^"]+)"|([^;\s]+))', re.IGNORECASE)
_NAME = re.compile(rb'[;\s]name\s*=\s*(?:"([^"]*)"|([^;\s]+))', re.IGNORECASE)
_FILE = re.compile(rb"[;\s]filename\*?\s*=", re.IGNORECASE)


class FormFields:
    """Feed the body; `fields` holds what was found."""

    __slots__ = ("_delimiter", "_left", "_name", "_rest", "_state", "_value", "_wanted", "fields", "too_many")

    def __init__(self, content_type: str, wanted: Collection[str]) -> None:
        self.fields: dict[str, str] = {}
        found = _BOUNDARY.search(content_type)
        boundary = (found[1] or found[2]) if found is not None else ""
        self.too_many = False  # parts: some were left unread
        self._left = PARTS_MAX
        self._wanted = wanted
        self._rest = b"\r\n"  # the first delimiter has no line end before it
        self._delimiter = b"\r\n--" + boundary.encode("utf-8", "replace")
        self._name: str | None = None
        self._value = b""
        self._state = "content" if 0 < len(boundary) <= BOUNDARY_MAX_CHARS else "over"

    def feed(self, piece: bytes) -> None:
        data = self._rest + piece
        while self._state != "over":
            ready = self._content(data) if self._state == "content" else self._head(data)
            if ready is None:
                return
            data = ready
        self._rest = b""

    def _content(self, data: bytes) -> bytes | None:
        at = data.find(self._delimiter)
        keep = len(self._delimiter) - 1
        content = data[: at if at >= 0 else max(0, len(data) - keep)]
        if self._name is not None and len(self._value) <= FIELD_MAX_BYTES:
            self._value += content[: FIELD_MAX_BYTES + 1]
        if at < 0:
            self._rest = data[len(content) :]
            return None
        if self._name is not None and len(self._value) <= FIELD_MAX_BYTES:
            self.fields[self._name] = self._value.removeprefix(b"\r\n").decode("utf-8", "replace")
        self._name, self._value, self._state = None, b"", "head"
        self._left -= 1
        if self._left < 0:
            self.too_many = True
            self._state = "over"
            return b""
        return data[at + len(self._delimiter) :]

    def _head(self, data: bytes) -> bytes | None:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if data[:2] == b"--" or len(data) > HEAD_MAX_BYTES:
                self._state = "over"
            self._rest = data
            return None
        head = data[:end]
        field = _NAME.search(head)
        if field is not None and _FILE.search(head) is None and not head.startswith(b"--"):
            name = (field[1] if field[1] is not None else field[2]).decode("utf-8", "replace")
            self._name = name if name in self._wanted else None
        self._state = "over" if head.startswith(b"--") else "content"
        return data[end + 2 :]  # the line end may be the delimiter's own when the part is empty
