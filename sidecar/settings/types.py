"""The kinds of value that a setting can have: how its text is read, and what to say when it cannot be.

A kind is pure: text in, value out, `ValueError` otherwise. `expected` finishes the sentence "expected …" in the
report of problems. A reader may raise `Unfit` where it can say better than `expected` what is wrong; the message
of any other error is not shown, because it may quote a secret.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, Final, Generic, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from sidecar.model.grammar import HOP_BY_HOP, Element, Source, Unfit, UnfitSecret, header_name, plain_name
from sidecar.model.http_url import EXPECTED, HOST, UpstreamAddress, can_be_looked_up
from sidecar.model.http_url import http_url as parse_url
from sidecar.model.path_pattern import check_pattern

T = TypeVar("T")
V = TypeVar("V")
E = TypeVar("E", bound=StrEnum)
Network = IPv4Network | IPv6Network

DURATION_MOST_S: Final = 3650 * 86_400.0  # ten years: beyond that it is a slip of the unit
SIZE_MOST_BYTES: Final = 1 << 50  # 1 PiB, for the same reason
_DURATION_UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_SIZE_UNITS: Final = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_QUANTITY: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)


@dataclass(frozen=True)
class Kind(Generic[T]):
    """One kind of value: `parse` reads its text."""

    expected: str
    parse: Callable[[str], T]


@dataclass(frozen=True)
class Many(Kind[T]):
    """Several values: separated by commas in the environment, a list or a table in TOML."""

    parse_items: Callable[[Sequence[str]], T]


class Secret:
    """A text that shows itself only to who asks by name, and compares in constant time."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a secret is not written down")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a host and a port (0: any free one), or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str | None = None

    @property
    def private(self) -> bool:
        """Whether nobody on another machine can reach it: loopback, or a Unix socket."""
        if self.path is not None or self.host.lower() == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    def overlaps(self, other: Address) -> bool:
        """Whether not both can be listened on, as far as that follows from what they say."""
        if self.path is not None or other.path is not None:
            return self.path == other.path
        return self.port == other.port != 0 and (self._covers(other) or other._covers(self))

    def _covers(self, other: Address) -> bool:
        is_six = ":" in other.host
        return self.host in (other.host, "::" if is_six else "0.0.0.0")

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _text(value: str) -> str:
    if not value.isprintable():
        raise Unfit("expected one line of printable text")
    return value


text: Final = Kind("a text", _text)


def _flag(value: str) -> bool:
    if value.lower() in ("true", "on", "yes", "1"):
        return True
    if value.lower() in ("false", "off", "no", "0"):
        return False
    raise ValueError


flag: Final = Kind("true or false (also on/off, yes/no, 1/0)", _flag)


def count(least: int = 1, most: int = 2**31 - 1) -> Kind[int]:
    """A whole number within bounds."""

    def parse(value: str) -> int:
        if not re.fullmatch(r"\d{1,12}", value, re.ASCII) or not least <= int(value) <= most:
            raise ValueError
        return int(value)

    return Kind(f"a whole number, {least} to {most}", parse)


def duration(least: float = 0.0, most: float = DURATION_MOST_S) -> Kind[float]:
    """Seconds, or a number with one of the units ms, s, m, h, d."""

    def parse(value: str) -> float:
        found = _QUANTITY.fullmatch(value)
        if found is None or found[2].lower() not in _DURATION_UNITS:
            raise ValueError
        seconds = float(found[1]) * _DURATION_UNITS[found[2].lower()]
        if not least <= seconds <= most:
            longest = f"{most / 86_400:g}d" if most >= 86_400 else f"{most:g} s"
            raise Unfit(f"expected a time from {least:g} s to {longest}")
        return seconds

    return Kind("seconds, or a time such as 500ms, 30s, 5m, 12h, 7d", parse)


def size(least: int = 0, most: int = SIZE_MOST_BYTES) -> Kind[int]:
    """Bytes, or a number with a unit: KiB, MiB, GiB (K, M, G mean these), kB, MB, GB."""

    def parse(value: str) -> int:
        found = _QUANTITY.fullmatch(value)
        if found is None or found[2].lower() not in _SIZE_UNITS:
            raise ValueError
        size_bytes = float(found[1]) * _SIZE_UNITS[found[2].lower()]
        if not least <= size_bytes <= most:
            raise Unfit(f"expected a size from {least} to {most} bytes")
        return int(size_bytes)

    return Kind("bytes, or a size such as 64KiB, 64MiB, 10GiB", parse)


def one_of(choices: type[E]) -> Kind[E]:
    """One word of a `StrEnum`."""
    words = {str(choice).lower(): choice for choice in choices}

    def parse(value: str) -> E:
        if value.lower() not in words:
            raise ValueError
        return words[value.lower()]

    return Kind(f"one of {', '.join(words)}", parse)


def word_of(*words: str) -> Kind[str]:
    """One word of a few, in any case; for backends, whose modes are their own business."""
    spelled = {word.lower(): word for word in words}

    def parse(value: str) -> str:
        if value.lower() not in spelled:
            raise ValueError
        return spelled[value.lower()]

    return Kind(f"one of {', '.join(words)}", parse)


http_url: Final = Kind(EXPECTED, parse_url)
"""Without a query and without a slash at the end, so that a path can be put behind it."""

http_url_query: Final = Kind(EXPECTED, lambda value: parse_url(value, query=True))

upstream_url: Final = Kind(EXPECTED, lambda value: str(UpstreamAddress.parse(value)))


def _port(value: str) -> int:
    if not re.fullmatch(r"\d{1,5}", value, re.ASCII) or int(value) > 65_535:
        raise Unfit("expected a TCP port, 1 to 65535 (0: any free one)")
    return int(value)


# https://www.postgresql.org/docs/current/libpq-ssl.html
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def _postgres_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError
    # The end of such a password would be taken for the database, and be shown.
    if "@" in parts.path or "/" in parts.path.strip("/") or parts.fragment:
        raise UnfitSecret("expected @ : / ? # in a password as %40 %3A %2F %3F %23")
    try:
        names = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        raise UnfitSecret("expected name=value pairs behind the ?, with & between them") from None
    if names.get("sslmode", _SSL_MODES[0]) not in _SSL_MODES:
        raise UnfitSecret(f"expected an sslmode of {', '.join(_SSL_MODES)}")
    if not parts.hostname and "host" not in names:
        raise UnfitSecret("expected a host in postgresql://user:password@host:5432/database")
    hosts = [unquote(parts.hostname or ""), *names.get("host", "").split(",")]
    if not all(host.startswith(("/", "@")) or can_be_looked_up(host) for host in hosts):  # those are of a socket
        raise UnfitSecret("expected a host whose labels have 1 to 63 characters")
    if not parts.path.strip("/") and not names.keys() & {"dbname", "database"}:
        raise UnfitSecret("expected a database behind the host: postgresql://user:password@host:5432/database")
    _ = parts.port  # raises what it is called with
    return value


def _instance_name(value: str) -> str:
    if len(value) > 64:
        raise Unfit("expected at most 64 characters")
    return plain_name(value)


instance_name: Final = Kind("a name of letters, digits, '_', '-', '.'", _instance_name)

postgres_url: Final = Kind("postgresql://user:password@host:5432/database", _postgres_url)


def _address(value: str) -> Address:
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        # The kernel's limit: sun_path has 108 bytes on Linux, 104 on macOS, the last one zero.
        if not path or len(path.encode()) > 103:
            raise Unfit("expected unix: and a path of at most 103 bytes")
        return Address(path=path)
    host, colon, port = value.rpartition(":")
    if not colon:
        raise ValueError
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            if ip_address(host).version != 6:
                raise ValueError
        except ValueError:
            raise Unfit("expected an IPv6 address between the brackets") from None
    elif not host:
        raise Unfit("expected a host before the colon: 0.0.0.0 for every interface, 127.0.0.1 for this machine only")
    elif ":" in host:
        raise Unfit("expected an IPv6 address in brackets: [::1]:8080")
    elif not HOST.fullmatch(host):
        raise ValueError
    return Address(host, _port(port))


address: Final = Kind("host:port or unix:/path", _address)


_PATH_BYTES: Final = 4_095  # the kernel's limits (PATH_MAX with its zero, NAME_MAX): Linux' include/uapi/linux/limits.h
_NAME_BYTES: Final = 255


def _path(value: str) -> Path:
    if re.search(r"[\x00-\x1f\x7f]", value):  # likely a certificate or key, pasted in place of its file's name
        raise UnfitSecret("expected a path in one line, not what is in the file")
    if "://" in value:  # with a password in it, perhaps; as a path it would be made a directory
        raise UnfitSecret("expected a path, not an address")
    if len(os.fsencode(value)) > _PATH_BYTES or any(len(os.fsencode(n)) > _NAME_BYTES for n in value.split("/")):
        raise UnfitSecret("expected a shorter path")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise Unfit("expected a path: there is no user whose home directory it begins with") from None


path: Final = Kind("a path", _path)


def _path_or_word(value: str) -> str:
    _path(value)
    return _text(value)


path_or_word: Final = Kind("a path, or a word", _path_or_word)


def _readable(value: str) -> Path:
    found = _path(value)
    if found.is_dir():
        raise Unfit("this is a directory: expected a file")
    if not found.is_file():
        raise Unfit("there is no such file")
    return found


readable_file: Final = Kind("a file that is there", _readable)


def _split(value: str) -> list[str]:
    items = [item.strip() for item in value.split(",")]
    return [] if items == ["none"] else [item for item in items if item]


def many(expected: str, parse_items: Callable[[Sequence[str]], T]) -> Many[T]:
    """A kind of several values; the single word `none` means the empty list."""
    return Many(expected, lambda value: parse_items(_split(value)), parse_items)


def every(items: Iterable[V], parse_item: Callable[[V], T]) -> list[T]:
    """What each is read as; `Unfit` with all that is wrong with any of them."""
    found: list[T] = []
    problems: list[str] = []
    for item in items:
        try:
            found.append(parse_item(item))
        except Unfit as error:
            problems.append(str(error))
    if problems:
        raise Unfit("; ".join(dict.fromkeys(problems)))
    return found


def each(expected: str, parse_item: Callable[[str], T]) -> Many[tuple[T, ...]]:
    """Several values of one kind, in order and without repeats."""
    return many(expected, lambda items: tuple(dict.fromkeys(every(items, parse_item))))


def _consumer(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value, re.ASCII):
        raise ValueError
    return value


consumer: Final = Kind("1 to 64 letters, digits, _ and -", _consumer)
names: Final = each("names, separated by commas", plain_name)
texts: Final = each("texts, separated by commas", _text)


def _network(value: str) -> Network:
    try:
        return ip_network(value)
    except ValueError as error:
        raise Unfit(f"{error}; expected networks such as 10.0.0.0/8, 192.168.1.7, fd00::/8") from None


networks: Final = each("networks such as 10.0.0.0/8, separated by commas", _network)


def _pair(item: str, *, last: bool = False) -> tuple[str, str]:
    left, equals, right = item.rpartition("=") if last else item.partition("=")
    if not equals or not left.strip() or not right.strip():
        raise Unfit(f"{item!r} has no name=value")
    return left.strip(), right.strip()


def _dimensions(items: Sequence[str]) -> Mapping[str, str]:
    found: dict[str, str] = {}

    def read(item: str) -> None:
        name, header = _pair(item) if "=" in item else (item, item)
        if plain_name(name) in found:
            raise Unfit(f"the dimension {name!r} is named twice")
        if header_name(header) in HOP_BY_HOP:
            raise Unfit(f"{item!r}: the upstream never gets this field: expected another")
        found[name] = header_name(header)

    every(items, read)
    return found


dimensions: Final = many("dimension=header pairs, separated by commas", _dimensions)


sources: Final = each("sources such as header:x-tenant, separated by commas", lambda item: str(Source.parse(item)))


def _elements(items: Sequence[str]) -> tuple[Element, ...]:
    found: dict[str, Element] = {}

    def read(item: str) -> None:
        element = Element.parse(item)
        if element.name in found:
            raise Unfit(f"the element {element.name!r} is named twice")
        found[element.name] = element

    every(items, read)
    return tuple(found.values())


elements: Final = many("name=header:NAME or name=json:PATH, separated by commas", _elements)

patterns: Final = each("path patterns, separated by commas", check_pattern)


def _pins(items: Sequence[str]) -> Mapping[str, str]:
    found: dict[str, str] = {}

    def read(item: str) -> None:
        pattern, provider = _pair(item, last=True)
        if check_pattern(pattern) in found:
            raise Unfit(f"the pattern {pattern!r} is named twice")
        found[pattern] = plain_name(provider)

    every(items, read)
    return found


pins: Final = many("pattern=provider pairs, separated by commas", _pins)


def _key_text(value: str) -> str:
    if not 16 <= len(value.encode()) <= 64:
        raise ValueError
    return value


key_text: Final = Kind("a text of 16 to 64 bytes, such as the output of: openssl rand -hex 24", _key_text)


def _bearer(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]{16,256}", value, re.ASCII):
        raise ValueError
    return value


bearer: Final = Kind("16 to 256 letters, digits and ._~+/=-, such as the output of: openssl rand -hex 24", _bearer)


def _host_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,252}", value, re.ASCII):
        raise Unfit(f"{value!r} is no host name (without a port, and without a scheme)")
    return value.lower()


hosts: Final = each("host names, separated by commas", _host_name)


def _limits(items: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


limits: Final = many("unit=amount/window, separated by commas, such as calls=600/minute", _limits)
"""What each says is judged by the gate, together with `[[limits]]`."""


def _statuses(items: Sequence[str]) -> Mapping[str, int]:
    found: dict[str, int] = {}

    def read(item: str) -> None:
        name, value = _pair(item)
        if name not in ("quota", "rate") or not re.fullmatch(r"4\d\d", value, re.ASCII):
            raise Unfit(f"{name}={value}: expected quota=STATUS or rate=STATUS, 400 to 499")
        if name in found:
            raise Unfit(f"{name} is named twice")
        found[name] = int(value)

    every(items, read)
    return found


statuses: Final = many("quota=STATUS, rate=STATUS", _statuses)

header_token: Final = Kind("one word without spaces", header_name)


_HEADER_VALUE: Final = re.compile(r"[!-~]([ -~]*[!-~])?")


def _header_text(value: str) -> str:
    if not _HEADER_VALUE.fullmatch(value):
        raise UnfitSecret("expected one line of printable ASCII, without spaces around it")
    return value


header_text: Final = Kind("a text that a header can carry", _header_text)


_UNITS: Final = ("calls", "input_tokens", "output_tokens", "total_tokens", "cost_usd")


def _unit(value: str) -> str | None:
    if value == "none":
        return None
    if value not in _UNITS and not (value.startswith("meter:") and plain_name(value.removeprefix("meter:"))):
        raise ValueError
    return value


unit: Final = Kind(f"one of {', '.join(_UNITS)}, meter:NAME, or none", _unit)
