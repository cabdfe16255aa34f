"""Faults on order: slow, refusing, lying, gone before or after accepting; for a share of the calls, by seed.

`POST /_faults` takes one rule or a list of them and puts them in the place of the old ones. The rules are asked in
order; each delay counts, the first other hit decides. Whether the n-th call that a rule sees is hit depends on the
seed, the rule's place and n alone, so the same traffic meets the same faults.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

RULES_MAX: Final = 100
DELAY_S_MAX: Final = 3600.0  # an hour stands for "never" in every client that we know


class Do(StrEnum):
    """What happens to a call that is hit."""

    DELAY = "delay"  # wait `delay_s`, then go on
    STATUS = "status"  # answer `status`; nothing is taken
    STATUS_AFTER = "status_after"  # take it, and answer `status` nevertheless
    CUT_BEFORE = "cut_before"  # close the connection; nothing is taken
    CUT_AFTER = "cut_after"  # take it, and close the connection without a word
    LIE = "lie"  # answer with a 2xx that is no yes, or an untrue one (`lie` says which); nothing is taken


class Lie(StrEnum):
    """What stands in a 2xx of somebody who took nothing."""

    HTML = "html"  # a page that says so
    LOGIN = "login"  # a page that is not called one
    PROXY = "proxy"  # 203: what a proxy made of it
    ERROR_UNDER_200 = "error_under_200"  # the vendor's own error
    FEWER = "fewer"  # none of what was sent, by count
    WRONG_SHAPE = "wrong_shape"  # JSON of another form; a yes where no body is promised
    PACKED = "packed"  # compressed, and not said so
    CUT = "cut"  # the beginning of an object


class GateLie(StrEnum):
    """What an answer to a question of the gate says that cannot be. What is no such question is answered as ever."""

    CLAIM_EXPIRED = "claim_expired"  # one that was true yesterday
    CLAIM_UNSIGNED = "claim_unsigned"  # `alg: none`
    CLAIM_SHARED_KEY = "claim_shared_key"  # `alg: HS256`, as if the public key were a secret
    CLAIM_FORGED = "claim_forged"  # one bit of the signature is another
    NEGATIVE = "negative"  # less than nothing is left, where the contract knows no such thing


class FaultError(ValueError):
    """The order cannot be read; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One rule. `backend` and `path` (its beginning) narrow it down; `times` ends it after so many hits."""

    do: Do
    share: float = 1.0
    seed: int = 0
    times: int | None = None
    backend: str | None = None
    path: str | None = None
    status: int = 503
    retry_after_s: int | None = None
    delay_s: float = 0.0
    lie: str = Lie.HTML

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise FaultError(f"share={self.share}: expected a number from 0 to 1")
        if not 400 <= self.status <= 599:
            raise FaultError(f"status={self.status}: expected an error status, 400 to 599")
        if not 0.0 <= self.delay_s <= DELAY_S_MAX:
            raise FaultError(f"delay_s={self.delay_s}: expected seconds, 0 to {DELAY_S_MAX:.0f}")
        if self.lie not in (*Lie, *GateLie):
            raise FaultError(f"lie={self.lie!r}: expected one of {', '.join((*Lie, *GateLie))}")
        if self.times is not None and self.times < 1:
            raise FaultError(f"times={self.times}: expected a whole number from 1, or null for no end")

    def fits(self, backend: str, path: str) -> bool:
        return self.backend in (None, backend) and path.startswith(self.path or "")


@dataclass(frozen=True, slots=True)
class Fate:
    """What the rules say about one call: wait so long, then this (or nothing out of the ordinary)."""

    delay_s: float = 0.0
    fault: Fault | None = None


class Faults:
    """The rules in force, and how often each was asked and hit."""

    def __init__(self) -> None:
        self._rules: list[Fault] = []
        self._asked: list[int] = []
        self._hits: list[int] = []

    def set(self, *rules: Fault) -> None:
        """Put these in the place of the old ones; none ends all faults."""
        self._rules, self._asked, self._hits = list(rules), [0] * len(rules), [0] * len(rules)

    def decide(self, backend: str, path: str) -> Fate:
        """Draw for one call."""
        delay_s = 0.0
        for place, rule in enumerate(self._rules):
            if not rule.fits(backend, path) or not self._draw(place, rule):
                continue
            if rule.do is not Do.DELAY:
                return Fate(delay_s, rule)
            delay_s += rule.delay_s
        return Fate(delay_s)

    def status(self) -> list[dict[str, Any]]:
        """The rules with their counts, for `GET /_faults`."""
        return [
            {**asdict(rule), "asked": asked, "hits": hits}
            for rule, asked, hits in zip(self._rules, self._asked, self._hits, strict=True)
        ]

    def _draw(self, place: int, rule: Fault) -> bool:
        if rule.times is not None and self._hits[place] >= rule.times:
            return False
        number, self._asked[place] = self._asked[place], self._asked[place] + 1
        digest = hashlib.blake2b(f"{rule.seed}:{place}:{number}".encode(), digest_size=8).digest()
        hit = int.from_bytes(digest) / 2**64 < rule.share
        self._hits[place] += hit
        return hit


_PAGE: Final = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Sign in to go on.</body></html>"


def lie_of(lie: str, error: bytes) -> tuple[int, bytes, str]:
    """Status, body and content type (none: as the server sees fit) of a lie. `error`: how the vendor words one."""
    match lie:
        case Lie.HTML:
            return 200, _PAGE, "text/html; charset=utf-8"
        case Lie.LOGIN:
            return 200, _PAGE, ""
        case Lie.PROXY:
            return 203, _PAGE, "TEXT/HTML"
        case Lie.ERROR_UNDER_200:
            return 200, error, "application/json"
        case Lie.FEWER:
            return 202, b'{"success": 0, "failed": 1, "accepted": 0}', "application/json"
        case Lie.WRONG_SHAPE:
            return 200, b'["thank you"]', "application/json"
        case Lie.PACKED:
            return 200, gzip.compress(b"{}", mtime=0), "application/json"
    return 200, b'{"status": "queu', "application/json"


_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "do": (str,), "share": (int, float), "seed": (int,), "times": (int,), "backend": (str,), "path": (str,),
    "status": (int,), "retry_after_s": (int,), "delay_s": (int, float), "lie": (str,),
}  # fmt: skip
_NULLABLE: Final = frozenset({"times", "backend", "path", "retry_after_s"})


def parse(order: Any) -> list[Fault]:
    """Rules from JSON. Raises `FaultError` with the reason."""
    rows: Sequence[Any] = order if isinstance(order, list) else [order]
    if len(rows) > RULES_MAX:
        raise FaultError(f"{len(rows)} rules: at most {RULES_MAX} are kept")
    return [_rule(row) for row in rows]


def _rule(row: Any) -> Fault:
    if not isinstance(row, dict):
        raise FaultError("expected a rule (an object) or a list of rules")
    for name, value in row.items():
        kinds = _TYPES.get(name)
        if kinds is None:
            raise FaultError(f"{name!r} is no part of a rule; known are {', '.join(_TYPES)}")
        if not (value is None and name in _NULLABLE) and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise FaultError(f"{name}={value!r}: expected {kinds[-1].__name__}")
    if row.get("do") not in list(Do):
        raise FaultError(f"do={row.get('do')!r}: expected one of {', '.join(Do)}")
    return Fault(**{**row, "do": Do(row["do"])})
