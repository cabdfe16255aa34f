"""An answer's head, rewritten for the client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.proxy.headers.kinds import (
    CONNECTION,
    CONTENT_LENGTH,
    PLAIN,
    QUIET_TOKENS,
    TRANSFER_ENCODING,
    UPGRADE,
    named,
)
from sidecar.usage import RawHeaders

if TYPE_CHECKING:
    from sidecar.proxy.headers.rewriting import HeaderRules


class ResponseHead:
    """What an answer's head says, and the lines that the client is sent. Raises `ValueError` for
    framing that cannot be read.

    `http10`: the client knows no chunks. Only a 101 keeps its `Upgrade`.
    """

    __slots__ = ("chunked", "close", "length", "names", "parts")

    def __init__(self, rules: HeaderRules, fields: RawHeaders, *, status: int, http10: bool = False) -> None:
        self.length: int | None = None
        self.chunked = False
        self.close = False
        self.names: list[str] = []
        self.parts: list[bytes] = []
        connection = self._build(rules, fields, status, http10, frozenset())
        if connection is not None:
            self.close = b"close" in connection
            if connection not in QUIET_TOKENS:
                drop = named(connection)
                if drop:
                    self.names, self.parts = [], []
                    self._build(rules, fields, status, http10, drop)
        if rules.via is not None:
            self.parts += (b"Via: 1.1 ", rules.via, b"\r\n")

    def _build(
        self, rules: HeaderRules, fields: RawHeaders, status: int, http10: bool, drop: frozenset[bytes]
    ) -> bytes | None:
        kinds, names, parts = rules.response_kinds, self.names, self.parts
        coding = connection = None
        for name, value in fields:
            kind, text = kinds[name]
            names.append(text)
            if kind == PLAIN:
                if not drop or name.lower() not in drop:
                    parts += (name, b": ", value, b"\r\n")
            elif kind == CONTENT_LENGTH:
                self.length = int(value)
                parts += (name, b": ", value, b"\r\n")
            elif kind == CONNECTION:
                connection = value.lower() if connection is None else connection + b"," + value.lower()
            elif kind == TRANSFER_ENCODING:
                coding = value if coding is None else coding + b"," + value
                if not http10 and status != 204:
                    parts += (name, b": ", value, b"\r\n")
            elif kind == UPGRADE and status == 101:
                parts += (name, b": ", value, b"\r\nConnection: Upgrade\r\n")
        if coding is not None:
            inner, _, last = coding.rpartition(b",")
            if last.strip().lower() != b"chunked":
                raise ValueError("the last transfer coding is not chunked")
            if inner and http10:
                raise ValueError("this client cannot read the transfer coding")
            self.chunked = True
        return connection
