"""Several upstreams behind one port: what is said of each, and the secrets that are read from files for them.

An upstream is chosen by the beginning of the path, which is taken off, or by the host that the client calls. A header's
value is a text, or what a file holds (`file:/path`, also behind a scheme: `Bearer file:/path`); either way it is a
`Secret`, which no message and no log shows. Files are read when the settings are, and again by `reread`.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sidecar.model.grammar import HOP_BY_HOP, Unfit, header_name
from sidecar.model.http_url import HOST
from sidecar.settings import types
from sidecar.settings.given_file import read_given
from sidecar.settings.types import Secret

HEADER_FILE_BYTES: Final = 16_384  # a token; more is a wrong path
UPSTREAMS_MAX: Final = 256  # each has a pool of connections; a path is compared with each prefix
NAME_CHARS_MAX: Final = 64  # it is a label of metrics
DEFAULT_NAME: Final = "default"  # the one that SIDECAR_UPSTREAM_URL names, where there are others
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PREFIX: Final = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+;:@-]+)+")
_FROM_FILE: Final = re.compile(r"(?:([A-Za-z][A-Za-z0-9_-]*) +)?file:(.*)", re.DOTALL)
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_KEYS: Final = (
    "name", "prefix", "host", "url", "set_headers", "remove_headers", "timeout_s", "ca_file", "cert_file", "key_file",
    "server_name",
)  # fmt: skip
# What frames a message, or says whose it is, is the hop's own to write.
_OURS: Final = HOP_BY_HOP | {"host", "content-length", "trailer", "expect", "proxy-authenticate"}
_FORWARDED: Final = frozenset({"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded", "via"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SetHeader:
    """A field that an upstream is sent, whatever the client said by that name."""

    name: str  # lower case
    value: Secret  # the whole value
    file: str | None = None  # where it, or what comes behind `scheme`, is read
    scheme: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """One of several upstreams. Either `prefix` or `host` says which calls it gets."""

    name: str
    url: str  # as `UpstreamAddress` writes it
    prefix: str = ""  # of the path, without a slash at its end; taken off
    host: str | None = None  # lower case, without a port
    set_headers: tuple[SetHeader, ...] = ()
    remove_headers: tuple[str, ...] = ()  # lower case
    timeout_s: float | None = None  # to the head of the response; None: as everywhere
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None

    def __str__(self) -> str:
        """For people: no value of a header."""
        names = [f"sets {header.name}" for header in self.set_headers]
        names += [f"removes {name}" for name in self.remove_headers]
        return f"{self.prefix or self.host}={self.url}" + (f" ({', '.join(names)})" if names else "")


def read_header_file(path: str) -> str:
    """What a header's value is read from: one line, of which the line end that editors add is left out. Raises
    `Unfit`, which names the path and never what is in it."""
    shown = repr(path)
    if not path.startswith("/"):
        # What looks like no path is likely to be the secret itself.
        raise Unfit("what stands behind file: (hidden) is no whole path: expected file:/run/secrets/key")
    try:
        content = read_given(Path(path), HEADER_FILE_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise Unfit(f"{shown} holds more than {HEADER_FILE_BYTES} bytes: no key is that long") from None
        raise Unfit(f"{shown} cannot be read: {error.strerror}") from None
    except ValueError:
        raise Unfit(f"{shown} is no path") from None
    content = content.removesuffix(b"\n").removesuffix(b"\r")
    if not content:
        raise Unfit(f"{shown} is empty")
    try:
        return _header_value(content.decode("ascii"))
    except UnicodeDecodeError:
        raise Unfit(f"{shown} is not ASCII text") from None
    except Unfit as error:
        raise Unfit(f"{shown} {error}") from None


def _header_value(text: str) -> str:
    if _CONTROL.search(text):
        raise Unfit("holds a line end or another control character: expected one line of text")
    if not text or text != text.strip():
        raise Unfit("begins or ends with a blank: expected the value alone")
    return text


def reread(upstreams: Sequence[UpstreamSettings]) -> tuple[tuple[UpstreamSettings, ...], list[str]]:
    """The same with the header values that their files hold now, and what could not be read: that header keeps its old
    value."""
    problems: list[str] = []
    found: list[UpstreamSettings] = []
    for upstream in upstreams:
        headers: list[SetHeader] = []
        for header in upstream.set_headers:
            if header.file is not None:
                try:
                    header = replace(header, value=Secret(header.scheme + read_header_file(header.file)))
                except Unfit as error:
                    problems.append(f"upstream {upstream.name}: {header.name}: {error}")
            headers.append(header)
        found.append(replace(upstream, set_headers=tuple(headers)))
    return tuple(found), problems


def from_items(items: Sequence[str]) -> tuple[UpstreamSettings, ...]:
    """`/prefix=url` or `host=url`, each named by its prefix or host. Raises `Unfit` with all that is wrong."""
    found: list[UpstreamSettings] = []
    problems: list[str] = []
    for item in items:
        where, equals, url = item.partition("=")
        if not equals:
            problems.append(f"{where!r}: expected /prefix=url or host=url")
            continue
        key = "prefix" if where.startswith("/") else "host"
        one = _Reading({"name": where.strip("/").replace("/", "-"), key: where, "url": url.strip()}, where)
        found += one.read()
        problems += one.problems
    problems += together(found)
    if problems:
        raise Unfit("; ".join(problems))
    return tuple(found)


def from_tables(tables: Sequence[Mapping[str, Any]]) -> tuple[tuple[UpstreamSettings, ...], list[str]]:
    """`[[upstreams]]`, and all that is wrong with them."""
    found: list[UpstreamSettings] = []
    problems: list[str] = []
    for place, table in enumerate(tables, 1):
        name = table.get("name")
        one = _Reading(dict(table), name if isinstance(name, str) and name else f"number {place}")
        found += one.read()
        problems += one.problems
    return tuple(found), problems + together(found)


def together(upstreams: Sequence[UpstreamSettings]) -> list[str]:
    """What is wrong with them beside each other."""
    problems: list[str] = []
    if len(upstreams) > UPSTREAMS_MAX:
        problems.append(f"there are {len(upstreams)}: expected at most {UPSTREAMS_MAX}")
    for what, said in (
        ("name", [one.name for one in upstreams]),
        ("prefix", [one.prefix for one in upstreams if one.prefix]),
        ("host", [one.host for one in upstreams if one.host]),
    ):
        twice = sorted({value for value in said if said.count(value) > 1})
        problems += [f"two upstreams have the {what} {value}: expected another for each" for value in twice]
    return problems


class _Reading:
    """One table: `read` gives the upstream, or nothing and the `problems`."""

    def __init__(self, table: dict[str, Any], label: str) -> None:
        self._table = table
        self._label = label
        self.problems: list[str] = []

    def _wrong(self, why: str) -> None:
        self.problems.append(f"{self._label}: {why}")

    def read(self) -> list[UpstreamSettings]:
        table = self._table
        for key in sorted(table.keys() - set(_KEYS)):
            self._wrong(f"{key} is not a setting of an upstream (there are {', '.join(_KEYS)})")
        url, name = self._url(), self._name()
        prefix, host = self._place()
        set_headers, removed = self._set_headers(), self._removed()
        for header in set_headers:
            if header.name in removed:
                self._wrong(f"{header.name} is both set and removed: a header that is set replaces the client's anyway")
        values: dict[str, Any] = {}
        for key, kind in (
            ("timeout_s", types.duration(0.001)),
            ("ca_file", types.readable_file),
            ("cert_file", types.readable_file),
            ("key_file", types.readable_file),
            ("server_name", types.text),
        ):
            if key in table:
                values[key] = self._parsed(key, kind)
        if ("cert_file" in table) != ("key_file" in table):
            self._wrong("expected cert_file and key_file together")
        if not url.startswith("https:") and (tls := sorted(table.keys() & {"ca_file", "cert_file", "server_name"})):
            self._wrong(f"{tls[0]} is set, but its url is no https:// one")
        if self.problems:
            return []
        return [
            UpstreamSettings(
                name=name, url=url, prefix=prefix, host=host, set_headers=set_headers, remove_headers=removed, **values
            )
        ]

    def _parsed(self, key: str, kind: types.Kind[Any]) -> Any:
        value = self._table[key]
        try:
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError
            return kind.parse(str(value).strip())
        except ValueError as error:
            self._wrong(f"{key}: {error if isinstance(error, Unfit) else f'expected {kind.expected}'}")
            return None

    def _text(self, key: str) -> str | None:
        value = self._table.get(key)
        if value is None or (isinstance(value, str) and value):
            return value
        self._wrong(f"{key}: expected a text")
        return None

    def _url(self) -> str:
        if "url" not in self._table:
            self._wrong("url is not set: expected the address of the API behind")
            return ""
        return self._parsed("url", types.upstream_url) or ""

    def _name(self) -> str:
        name = self._text("name")
        if "name" not in self._table:
            self._wrong("name is not set: expected a short word, which records and metrics have")
        if name is None:
            return ""
        if not _NAME.fullmatch(name) or len(name) > NAME_CHARS_MAX:
            self._wrong(f"name: expected at most {NAME_CHARS_MAX} letters, digits, '_', '-' and '.'")
        elif name == DEFAULT_NAME:
            self._wrong(f"name: {DEFAULT_NAME} is what the one of SIDECAR_UPSTREAM_URL is called: expected another")
        return name

    def _place(self) -> tuple[str, str | None]:
        prefix, host = self._text("prefix"), self._text("host")
        if ("prefix" in self._table) == ("host" in self._table):
            self._wrong("expected either prefix (such as /openai) or host (such as openai.internal)")
            return "", None
        if prefix is not None:
            prefix = prefix.removesuffix("/") if prefix != "/" else prefix
            dots = any(segment in (".", "..") for segment in prefix.split("/"))
            if not _PREFIX.fullmatch(prefix) or dots:
                self._wrong(
                    f"prefix {prefix[:80]!r}: expected a path such as /openai, in plain characters"
                    + ("; what gets all the rest is SIDECAR_UPSTREAM_URL" if prefix == "/" else "")
                )
        elif host is not None and (not HOST.fullmatch(host) or "%" in host):
            self._wrong(f"host {host[:80]!r}: expected a name such as openai.internal, without a port")
        return prefix or "", None if host is None else host.lower()

    def _set_headers(self) -> tuple[SetHeader, ...]:
        table = self._table.get("set_headers", {})
        if not isinstance(table, dict):
            self._wrong('set_headers: expected a table such as { authorization = "Bearer file:/run/secrets/key" }')
            return ()
        found: dict[str, SetHeader] = {}
        for name, value in table.items():
            low = self._header(name, "set_headers")
            if low is None:
                continue
            if low in found:
                self._wrong(f"set_headers: {low} is named twice")
            elif not isinstance(value, str):
                self._wrong(f"set_headers: {low}: expected a text, or file:/path")
            else:
                try:
                    found[low] = _set_header(low, value)
                except Unfit as error:
                    self._wrong(f"set_headers: {low}: {error}")
        return tuple(found.values())

    def _removed(self) -> tuple[str, ...]:
        names = self._table.get("remove_headers", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._wrong('remove_headers: expected a list of names, such as ["x-tenant"]')
            return ()
        return tuple(dict.fromkeys(low for name in names if (low := self._header(name, "remove_headers")) is not None))

    def _header(self, name: str, key: str) -> str | None:
        try:
            low = header_name(name)
        except Unfit as error:
            self._wrong(f"{key}: {error}")
            return None
        if low in _OURS or (key == "set_headers" and low == "proxy-authorization"):
            self._wrong(f"{key}: {low} belongs to the connection or to the framing, and is the proxy's own to write")
        elif low in _FORWARDED:
            self._wrong(f"{key}: {low} is what SIDECAR_FORWARDED and SIDECAR_VIA decide")
        else:
            return low
        return None


def _set_header(name: str, text: str) -> SetHeader:
    match = _FROM_FILE.fullmatch(text)
    if match is None:
        try:
            if not text.isascii():
                raise Unfit("is not ASCII text")
            return SetHeader(name=name, value=Secret(_header_value(text)))
        except Unfit as error:
            raise Unfit(f"its value (hidden) {error}") from None
    scheme = f"{match[1]} " if match[1] else ""
    return SetHeader(name=name, value=Secret(scheme + read_header_file(match[2])), file=match[2], scheme=scheme)


def called_host(value: str) -> str:
    """The host of a `Host` field or an authority as `UpstreamSettings.host` has it: lower case, without its port."""
    host, colon, port = value.strip().rpartition(":")
    return (host if colon and (port.isdigit() or not port) else value.strip()).lower()
