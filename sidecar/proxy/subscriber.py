"""Who pays, and what else a call is filed under, read from the request's head.

Pure: the request comes in, an answer goes out. The sources are asked in the order in which they were
configured, and the answer always names the one that knew. A credential (`authorization`, `x-api-key`, …) is
never kept as it is: its keyed hash is, so that records, backends and logs hold no secret and the same
key gives the same subscriber across a fleet that shares `SIDECAR_HASH_KEY`.

What is read is the message that the upstream gets, as the upstream takes it: the fields that are forwarded (the caller
leaves out what the client's `Connection` takes out), and the target in its normal form. A client may spell a request in
more than one way, or say two things at once; by that it must not choose who pays:

- A header that occurs twice: the *last* field counts, also an empty one. A gateway in front appends the field that it
  vouches for, behind whatever the client made up. A list with commas is one value. Of a credential's header the *first*
  field that holds a key counts: no gateway adds a second one, and servers authenticate by the first (Go's `Header.Get`,
  Node, which drops the others). An empty field, or a scheme without a key, opened no door.
- A query name that occurs twice with different values names nobody: upstreams take the first, the last or all of them.
- Several credentials at once: `credential` asks first for the one that the upstream's API authenticates by.

The second and third, and the first where the fields differ, are counted as anomalies.

A `jwt:` claim is read, not verified: put the sidecar behind what verifies the token, or use another source.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar
from urllib.parse import parse_qsl, unquote

import orjson

from sidecar.model.exchange import RawHeaders, Subscriber, cut
from sidecar.model.grammar import Source, SourceKind
from sidecar.model.target import client_path, query_of

SUBSCRIBER_CHARS_MAX: Final = 200  # the longest id kept as it is; a longer one is hashed. Vendors cut at 255.
DIMENSION_CHARS_MAX: Final = 200  # a longer value is cut: it goes into every record
CACHED_MAX: Final = 4096  # header values of one source whose answer is remembered; hashing one costs 2 µs
HASH_CHARS: Final = 32  # 128 bits of BLAKE2b: no two keys of a fleet will meet
SECRET_HEADERS: Final = frozenset(
    {"authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "x-amz-security-token"}
)
# What `credential` asks for, the most standard first; and what comes before all others at a provider that
# authenticates by a header of its own (OpenTelemetry's names). A made-up credential beside it then changes nothing.
CREDENTIALS: Final = ("authorization", "x-api-key", "api-key", "x-goog-api-key")
ASKED_FIRST: Final = {
    "anthropic": "x-api-key",
    "azure.ai.openai": "api-key",
    "azure.ai.inference": "api-key",
    "gcp.gemini": "x-goog-api-key",
}

SCHEMES: Final = (b"bearer", b"token", b"basic")
_BLANKS: Final = b" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0"  # what upstreams of some language take for a blank
_SCHEMED: Final = re.compile(rb"([A-Za-z][A-Za-z0-9_-]*)[%b]+([^%b].*)" % (_BLANKS, _BLANKS), re.DOTALL)
_SIGNED: Final = re.compile(rb"\bCredential=([^/,\s]+)")  # AWS: the rest is a signature, another one for each call
_SCHEMED_HEADERS: Final = frozenset({"authorization", "proxy-authorization"})


def credential_sources(provider: str | None) -> tuple[Source, ...]:
    """The headers that `credential` stands for, in order: at this provider's own host, or at an unknown one."""
    first = ASKED_FIRST.get(provider or "", CREDENTIALS[0])
    return tuple(Source(SourceKind.HEADER, name) for name in sorted(CREDENTIALS, key=lambda name: name != first))


_Known = dict[bytes, Subscriber | None]
_Said = TypeVar("_Said")


def _ignore(kind: str) -> None:
    """An anomaly that nobody counts."""


class Attributor:
    """Answers `(raw headers, target, client ip)` with the subscriber and the dimensions."""

    def __init__(
        self,
        *,
        sources: Sequence[Source],
        dimensions: Mapping[str, str],
        hash_key: bytes,
        provider: str | None = None,
        base: str = "",
        anomaly: Callable[[str], None] = _ignore,
    ) -> None:
        """`dimensions`: name of the dimension -> header that holds it. `hash_key`: 16 to 64 bytes. `provider`: whose
        host the upstream is, for `credential`. `base`: the path of the upstream's URL."""
        if not 16 <= len(hash_key) <= 64:
            raise ValueError("the hash key must have 16 to 64 bytes")
        self._sources = tuple(
            meant
            for source in sources
            for meant in (credential_sources(provider) if source.kind is SourceKind.CREDENTIAL else (source,))
        )
        # For each source the header it reads (None for one that reads none), and what its values said so far.
        self._asked: tuple[tuple[Source, bytes | None, _Known], ...] = tuple(
            (source, _header_of(source), {}) for source in self._sources
        )
        self._of_target = tuple(
            source for source, header, _ in self._asked if header is None and source.kind is not SourceKind.BODY
        )
        self._hash_key = hash_key
        self._base = base
        self._anomaly = anomaly
        self._wanted = {header for _, header, _ in self._asked if header is not None}
        self._dimensions = {name: header.lower().encode("latin-1", "replace") for name, header in dimensions.items()}
        self._wanted |= set(self._dimensions.values())
        self._credentials = {
            header: source for source, header, _ in self._asked if header is not None and _is_secret(source)
        }

    @property
    def reads(self) -> frozenset[bytes]:
        """Names of the header fields (lower case) by whose values it answers; beside them only by the target."""
        return frozenset(self._wanted)

    def __call__(
        self, headers: RawHeaders, target: str, client_ip: str | None
    ) -> tuple[Subscriber | None, Mapping[str, str]]:
        """Never raises, whatever the bytes are. `headers` are those that go upstream."""
        wanted = self._wanted
        found: dict[bytes, bytes] = {}
        for raw_name, value in headers:
            name = raw_name.lower()
            if name in wanted and (before := found.setdefault(name, value)) != value:
                self._anomaly("credentials_conflict" if name in self._credentials else "header_repeated")
                found[name] = _counting(name, before, value)
        dimensions = {}
        if self._dimensions:
            dimensions = {
                label: self._cut(_text(found[name])) for label, name in self._dimensions.items() if found.get(name)
            }
        for source, header, known in self._asked:
            if header is None:
                subscriber = self._from_target(source, target)
            elif not (value := found.get(header, b"")):
                continue
            elif value in known:
                subscriber = known[value]
            else:
                subscriber = self._read(source, value)
                if len(known) >= CACHED_MAX:
                    known.clear()
                known[value] = subscriber
            if subscriber is not None:
                if header in self._credentials and len(found) > 1:
                    self._compare(found)
                return subscriber, dimensions
        return None, dimensions

    def plainly(
        self, headers: RawHeaders, target: str, client_ip: str | None
    ) -> tuple[Subscriber | None, Mapping[str, str]] | None:
        """The same answer, and nothing is counted; None where there is something to be counted each time."""
        return self._quietly(lambda: self(headers, target, client_ip))

    def by_target(self, target: str) -> Sequence[Subscriber | None] | None:
        """All that it reads of a target: of two with the same it says the same. None where there is something to be
        counted."""
        if not self._of_target:
            return ()
        return self._quietly(lambda: tuple(self._from_target(source, target) for source in self._of_target))

    def _quietly(self, ask: Callable[[], _Said]) -> _Said | None:
        """What it says; None where there is something to be counted, and nothing is."""
        odd: list[str] = []
        self._anomaly, count = odd.append, self._anomaly
        try:
            found = ask()
        finally:
            self._anomaly = count
        return None if odd else found

    def by_body(self, known: Subscriber | None, member: Callable[[str], str | None]) -> Subscriber | None:
        """Who pays, now that the body was seen: `member` looks into it. What an earlier source knew stays."""
        for source in self._sources:
            if known is not None and source.label == known.source:
                return known
            if source.kind is SourceKind.BODY and (value := member(source.name)):
                return Subscriber(self._shorten(value), source.label)
        return known

    def _from_target(self, source: Source, target: str) -> Subscriber | None:
        if source.kind is SourceKind.BODY:
            return None  # the body is not here yet: see `by_body`
        if source.kind is SourceKind.QUERY:
            text = self._from_query(source.name, query_of(target))
        else:
            text = _from_path(source.name, client_path(target, self._base))
        return Subscriber(self._shorten(text), source.label) if text else None

    def _from_query(self, name: str, query: str) -> str | None:
        if name not in query and "%" not in query and "+" not in query:
            return None
        fields = parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
        values = {_unescaped(value) for key, value in fields if key == name}
        if len(values) > 1:
            self._anomaly("query_repeated")
            return None
        return values.pop() if values else None

    def _compare(self, found: Mapping[bytes, bytes]) -> None:
        """Whether there is another credential beside the one that was believed."""
        said = {
            _credential(source.name, found[header]) for header, source in self._credentials.items() if header in found
        }
        if len(said - {b""}) > 1:
            self._anomaly("credentials_conflict")

    def _cut(self, value: str) -> str:
        if len(value) > DIMENSION_CHARS_MAX:
            self._anomaly("dimension_cut")
        return cut(value, DIMENSION_CHARS_MAX)

    def _read(self, source: Source, value: bytes) -> Subscriber | None:
        if source.kind is SourceKind.JWT:
            claim = _claim(value, source.name)
            return None if claim is None else Subscriber(self._shorten(claim), source.label)
        if _is_secret(source):
            credential = _credential(source.name, value)
            return Subscriber(self._hash(credential), source.label) if credential else None
        text = _text(value).strip()
        return Subscriber(self._shorten(text), source.label) if text else None

    def _shorten(self, text: str) -> str:
        if len(text) <= SUBSCRIBER_CHARS_MAX and text.isprintable():
            return text
        return self._hash(text.encode("utf-8", "replace"))

    def _hash(self, value: bytes) -> str:
        digest = hashlib.blake2b(value, key=self._hash_key, digest_size=HASH_CHARS // 2)
        return f"key_{digest.hexdigest()}"


def _text(value: bytes) -> str:
    """A header's value: UTF-8, or else what HTTP meant before it, ISO 8859-1 (RFC 9110, 5.5), which `http.client` and
    `requests` of Python send. A replacement character would make one subscriber of all that differ in such letters."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _unescaped(text: str) -> str:
    """What a target says, whose bytes that are no UTF-8 are in it as surrogates."""
    try:
        return text if text.isascii() else _text(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return text


def _header_of(source: Source) -> bytes | None:
    if source.kind is SourceKind.JWT:
        return b"authorization"
    return source.name.encode("latin-1", "replace") if source.kind is SourceKind.HEADER else None


def is_hashed(source: Source) -> bool:
    """Whether all ids that it gives are hashes."""
    return source.kind is SourceKind.CREDENTIAL or _is_secret(source)


def _is_secret(source: Source) -> bool:
    return source.kind is SourceKind.HEADER and source.name in SECRET_HEADERS and not source.plain


def _counting(header: bytes, before: bytes, value: bytes) -> bytes:
    """Which of two fields of one header counts."""
    name = header.decode("latin-1")
    return before if name in SECRET_HEADERS and _credential(name, before) else value


def _credential(header: str, value: bytes) -> bytes:
    """The credential without its scheme, so that `Authorization: Bearer k` and `x-api-key: k` agree; in one spelling,
    whatever blanks stand around it, so that one key is one customer."""
    value = value.strip(_BLANKS)
    match = _SCHEMED.fullmatch(value)
    if match is None:
        return b"" if value.lower() in SCHEMES else value
    scheme, rest = match[1].lower(), match[2]
    if scheme == b"basic":
        return _one_base64(rest)
    if scheme in SCHEMES:
        return rest
    if header not in _SCHEMED_HEADERS:
        return value
    if scheme.startswith(b"aws4-") and (key := _SIGNED.search(rest)) is not None:
        return key[1]
    return scheme.capitalize() + b" " + rest


def _one_base64(text: bytes) -> bytes:
    """The same user and password in the one spelling that an encoder gives."""
    try:
        return base64.b64encode(base64.b64decode(text + b"=" * (-len(text) % 4)))
    except binascii.Error:
        return text


def _claim(authorization: bytes, name: str) -> str | None:
    parts = _credential("authorization", authorization).split(b".")
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


def _from_path(number: str, path: str) -> str | None:
    segments = path.split("/")
    if len(segments) <= int(number):
        return None
    return _unescaped(unquote(segments[int(number)], errors="surrogateescape"))
