"""What users write into settings and more than one part reads: each form is read here, and refused in one sentence.

    header:x-tenant   jwt:sub   query:key   path:2   body:user   credential     where it stands who pays (`Source`)
    rows=json:meta.rows   credits=header:x-credits-used                        a number of the user's own (`Element`)

Path patterns are in `path_pattern`, addresses in `http_url`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

ELEMENT_DEPTH_MAX: Final = 8  # members of a JSON path; deeper ones are not stated numbers but data
# Fields between a client and us (RFC 9110, 7.6.1): what they say is not what the upstream gets.
HOP_BY_HOP: Final = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade", "http2-settings"}
)
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,62}")
_SEGMENT: Final = re.compile(r"[1-9]\d?", re.ASCII)


class Unfit(ValueError):
    """What is wrong with a value, in words that may be shown (no part of the value unless it is no secret)."""


class UnfitSecret(Unfit):
    """What is wrong with a secret, in words that have nothing of it."""


def header_name(text: str) -> str:
    """A header's name in lower case. Raises `Unfit`."""
    if not _TOKEN.fullmatch(text):
        raise Unfit(f"{text!r} is no header name")
    return text.lower()


def plain_name(text: str) -> str:
    """A name that users give to something of theirs. Raises `Unfit`."""
    if not _NAME.fullmatch(text):
        raise Unfit(f"{text!r} is no name (letters, digits, '_', '-', '.')")
    return text


class SourceKind(StrEnum):
    HEADER = "header"
    JWT = "jwt"
    QUERY = "query"
    PATH = "path"
    BODY = "body"
    CREDENTIAL = "credential"


_NAMED: Final = frozenset(SourceKind) - {SourceKind.CREDENTIAL}


@dataclass(frozen=True, slots=True)
class Source:
    """One place to look for who pays.

    `name`: the header in lower case, the claim, the query's or body's member, or the path segment's number.
    `plain`: keep the value as it is although the header usually holds a secret.
    """

    kind: SourceKind
    name: str
    plain: bool = False

    @classmethod
    def parse(cls, text: str) -> Source:
        """Raises `Unfit` with what was expected."""
        text = text.strip()
        if text == SourceKind.CREDENTIAL:
            return cls(SourceKind.CREDENTIAL, "")
        kind, _, rest = text.partition(":")
        name, _, plain = rest.partition(":")
        if kind not in _NAMED or not name or plain not in ("", "plain"):
            raise Unfit(
                f"{text!r} is no source: expected header:NAME, jwt:CLAIM, query:NAME, path:NUMBER or body:FIELD, "
                "and :plain at most behind it; or credential"
            )
        if kind == SourceKind.PATH and not _SEGMENT.fullmatch(name):
            raise Unfit(f"{text!r}: expected path:NUMBER, the first segment being 1")
        if kind == SourceKind.HEADER:
            name = header_name(name)
            if name in HOP_BY_HOP:
                raise Unfit(f"{text!r}: the upstream never gets this field, so it names nobody: expected another")
        return cls(SourceKind(kind), name, plain == "plain")

    @property
    def label(self) -> str:
        """As a record names it."""
        return f"{self.kind}:{self.name}"

    def __str__(self) -> str:
        """As it is written."""
        return str(self.kind) if self.kind is SourceKind.CREDENTIAL else self.label + (":plain" if self.plain else "")


@dataclass(frozen=True, slots=True)
class Element:
    """A number that an API states in a header or a JSON member, under a name of the user's.

    Either `header` (in lower case) or `json` (the members from the outside in) is set. `pattern`: of the paths whose
    responses have it; None for all.
    """

    name: str
    header: str | None = None
    json: tuple[str, ...] = ()
    pattern: str | None = None

    @classmethod
    def parse(cls, text: str, pattern: str | None = None) -> Element:
        """`name=header:x-rows` or `name=json:meta.rows`. Raises `Unfit` that says what was expected."""
        name, equals, rest = (part.strip() for part in text.partition("="))
        if not equals or not name or not rest:
            raise Unfit(f"{text!r} has no name=value: expected name=header:NAME or name=json:PATH")
        kind, _, where = rest.partition(":")
        if kind not in ("header", "json") or not where:
            raise Unfit(f"{name}={rest!r}: expected header:NAME or json:PATH behind the name")
        if kind == "header":
            return cls(plain_name(name), header=header_name(where), pattern=pattern)
        path = tuple(where.split("."))
        if not all(path) or len(path) > ELEMENT_DEPTH_MAX:
            raise Unfit(f"{name}={rest!r}: expected one to {ELEMENT_DEPTH_MAX} member names with dots between them")
        return cls(plain_name(name), json=path, pattern=pattern)
