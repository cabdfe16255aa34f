"""Who pays, and what else a call is filed under, read from the request's head.

Pure: the request comes in, an answer goes out. The sources are asked in the order in which they were
configured, and the answer always names the one that knew. A credential (`authorization`, `x-api-key`, …) is
never kept as it is: its keyed hash is, so that records, backends and logs hold no secret and the same
key gives the same subscriber across a fleet that shares `SIDECAR_HASH_KEY`.

A `jwt:` claim is read, not verified: put the sidecar behind what verifies the token, or use another source.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import parse_qsl, unquote

import orjson

from sidecar.exchange import Subscriber

RawHeaders = Sequence[tuple[bytes, bytes]]

SUBSCRIBER_CHARS_MAX: Final = 200  # the longest id kept as it is; a longer one is hashed. Vendors cut at 255.
DIMENSION_CHARS_MAX: Final = 200  # a longer value is cut: it goes into every record
CACHED_MAX: Final = 4096  # header values of one source whose answer is remembered; hashing one costs 2 µs
HASH_CHARS: Final = 32  # 128 bits of BLAKE2b: no two keys of a fleet will meet
SECRET_HEADERS: Final = frozenset(
    {"authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "x-amz-security-token"}
)

SCHEMES: Final = (b"bearer", b"token", b"basic")


class Kind(StrEnum):
    HEADER = "header"
    JWT = "jwt"
    QUERY = "query"
    PATH = "path"
    BODY = "body"


@dataclass(frozen=True, slots=True)
class Source:
    """One place to look. `plain`: keep the value as it is although the header usually holds a secret."""

    kind: Kind
    name: str  # header name in lower case, claim, query name, or the path segment's number
    plain: bool = False

    @property
    def label(self) -> str:
        return f"{self.kind}:{self.name}"


def parse_source(text: str) -> Source:
    """Read `header:x-tenant`, `jwt:sub`, `query:key`, `path:2`, `body:user`; `header:x-api-key:plain`.

    Raises `ValueError` with what was expected.
    """
    kind_text, _, rest = text.strip().partition(":")
    name, _, flag = rest.partition(":")
    if kind_text not in set(Kind) or not name or flag not in ("", "plain"):
        raise ValueError(
            "expected header:NAME, jwt:CLAIM, query:NAME, path:NUMBER or body:FIELD, and :plain at most behind it"
        )
    kind = Kind(kind_text)
    if kind is Kind.PATH and not (name.isascii() and name.isdigit() and int(name) >= 1):
        raise ValueError("expected path:NUMBER, the first segment being 1")
    return Source(kind, name.lower() if kind is Kind.HEADER else name, flag == "plain")


_Known = dict[bytes, Subscriber | None]


class Attributor:
    """Answers `(raw headers, target, client ip)` with the subscriber and the dimensions."""

    def __init__(self, *, sources: Sequence[Source], dimensions: Mapping[str, str], hash_key: bytes) -> None:
        """`dimensions`: name of the dimension -> header that holds it. `hash_key`: 16 to 64 bytes."""
        if not 16 <= len(hash_key) <= 64:
            raise ValueError("the hash key must have 16 to 64 bytes")
        self._sources = tuple(sources)
        # For each source the header it reads (None for one that reads none), and what its values said so far.
        self._asked: tuple[tuple[Source, bytes | None, _Known], ...] = tuple(
            (source, _header_of(source), {}) for source in self._sources
        )
        self._hash_key = hash_key
        self._wanted = {header for _, header, _ in self._asked if header is not None}
        self._dimensions = {header.lower().encode("latin-1", "replace"): name for name, header in dimensions.items()}
        self._wanted |= self._dimensions.keys()

    def __call__(
        self, headers: RawHeaders, target: str, client_ip: str | None
    ) -> tuple[Subscriber | None, Mapping[str, str]]:
        """Never raises, whatever the bytes are."""
        wanted = self._wanted
        found: dict[bytes, bytes] = {}
        for raw_name, value in headers:
            name = raw_name.lower()
            if name in wanted and value and name not in found:
                found[name] = value
        dimensions = {}
        if self._dimensions:
            dimensions = {
                label: found[name].decode("utf-8", "replace")[:DIMENSION_CHARS_MAX]
                for name, label in self._dimensions.items()
                if name in found
            }
        for source, header, known in self._asked:
            if header is None:
                subscriber = self._from_target(source, target)
            elif header not in found:
                continue
            elif (value := found[header]) in known:
                subscriber = known[value]
            else:
                subscriber = self._read(source, value)
                if len(known) >= CACHED_MAX:
                    known.clear()
                known[value] = subscriber
            if subscriber is not None:
                return subscriber, dimensions
        return None, dimensions

    def by_body(self, known: Subscriber | None, member: Callable[[str], str | None]) -> Subscriber | None:
        """Who pays, now that the body was seen: `member` looks into it. What an earlier source knew stays."""
        for source in self._sources:
            if known is not None and source.label == known.source:
                return known
            if source.kind is Kind.BODY and (value := member(source.name)):
                return Subscriber(self._shorten(value), source.label)
        return known

    def _from_target(self, source: Source, target: str) -> Subscriber | None:
        if source.kind is Kind.BODY:
            return None  # the body is not here yet: see `by_body`
        text = _from_query(source.name, target) if source.kind is Kind.QUERY else _from_path(source.name, target)
        return Subscriber(self._shorten(text), source.label) if text else None

    def _read(self, source: Source, value: bytes) -> Subscriber | None:
        if source.kind is Kind.JWT:
            claim = _claim(value, source.name)
            return None if claim is None else Subscriber(self._shorten(claim), source.label)
        if source.name in SECRET_HEADERS and not source.plain:
            credential = _credential(value)
            return Subscriber(self._hash(credential), source.label) if credential else None
        text = value.decode("utf-8", "replace").strip()
        return Subscriber(self._shorten(text), source.label) if text else None

    def _shorten(self, text: str) -> str:
        if len(text) <= SUBSCRIBER_CHARS_MAX and text.isprintable():
            return text
        return self._hash(text.encode("utf-8", "replace"))

    def _hash(self, value: bytes) -> str:
        digest = hashlib.blake2b(value, key=self._hash_key, digest_size=HASH_CHARS // 2)
        return f"key_{digest.hexdigest()}"


def _header_of(source: Source) -> bytes | None:
    if source.kind is Kind.JWT:
        return b"authorization"
    return source.name.encode("latin-1", "replace") if source.kind is Kind.HEADER else None


def _credential(value: bytes) -> bytes:
    """The credential without its scheme, so that `Authorization: Bearer k` and `x-api-key: k` agree."""
    scheme, _, rest = value.strip().partition(b" ")
    return rest.strip() if scheme.lower() in SCHEMES else value.strip()


def _claim(authorization: bytes, name: str) -> str | None:
    parts = _credential(authorization).split(b".")
    if len(parts) != 3:
        return None
    try:
        padded = parts[1] + b"=" * (-len(parts[1]) % 4)
        claims = orjson.loads(base64.urlsafe_b64decode(padded))
    except (binascii.Error, ValueError):
        return None
    value = claims.get(name) if isinstance(claims, dict) else None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        return None
    return str(value)


def _from_query(name: str, target: str) -> str | None:
    query = target.partition("?")[2].partition("#")[0]
    if name not in query:
        return None
    return next((value for key, value in parse_qsl(query) if key == name), None)


def _from_path(number: str, target: str) -> str | None:
    segments = target.partition("?")[0].split("/")
    return unquote(segments[int(number)]) if len(segments) > int(number) else None
