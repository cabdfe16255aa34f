"""The words between the receiver's server and its vendors.

A vendor is plain thinking: it is handed one `Call` with the whole body, looks at its own `Memory`, and gives back an
`Answer` that says what to send and what was taken. It never awaits, so one call is one atomic step; sockets, faults
and files belong to `server`, `faults` and `store`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import orjson

JSON = "application/json"


class Verdict(StrEnum):
    """What became of one unit, in the sidecar's own words."""

    DELIVERED = "delivered"
    DUPLICATE = "duplicate"  # answered as a success (or as the vendor says "have it"), not counted again
    REFUSED = "refused"
    BLOCKED = "blocked"  # no credentials, or not these
    RETRY = "retry"  # not now: a call with the same key is under way
    DROPPED = "dropped"  # answered as a success, but the vendor will not bill it and says so only later


@dataclass(frozen=True, slots=True)
class Call:
    """One request, whole."""

    method: str
    path: str  # without the query
    query: Mapping[str, str]
    headers: Mapping[str, str]  # case-insensitive
    body: bytes
    at_s: float  # the receiver's clock, Unix seconds

    def header(self, name: str) -> str:
        """The field's value, or nothing."""
        return self.headers.get(name, "")

    def fingerprint(self) -> str:
        """What "the same request" means where a key is replayed: path, query and body bytes."""
        digest = hashlib.sha256(f"{self.method} {self.path} {sorted(self.query.items())}\n".encode())
        digest.update(self.body)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest thing that the vendor takes or leaves: the request where that carries the key, else an event."""

    key: str | None
    body: Any
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back, and what it means."""

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    units: tuple[Unit, ...] = ()

    @classmethod
    def json(cls, status: int, value: Any, *units: Unit, **headers: str) -> Answer:
        """A JSON answer; header names are written with `_` for `-`."""
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return cls(status, orjson.dumps(value), JSON, named, units)


class Memory(Protocol):
    """A vendor's own memory: survives a restart of the receiver when it keeps a store."""

    def recall(self, key: str, now_s: float, window_s: float | None = None) -> Any:
        """What was kept under `key` within the window, else None."""
        ...

    def keep(self, key: str, value: Any, now_s: float) -> None:
        """Keep a JSON value. Written with the units of the same call, all or nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One documented call.

    `path` may hold `{name}` parts, each one segment; they are added to `Call.query`. `when` tells apart what shares a
    path. `exclusive` names what may not run twice at once, and `busy` is the answer to the second. `failed` sees the
    5xx answers that a fault put in the vendor's mouth, for vendors that replay those too. `lies` answers a question
    of the gate with what cannot be (`faults.GateLie`).
    """

    method: str
    path: str
    handle: Callable[[Call], Answer]
    when: Callable[[Call], bool] | None = None
    exclusive: Callable[[Call], str | None] | None = None
    busy: Callable[[Call], Answer] | None = None
    failed: Callable[[Call, Answer], None] | None = None
    lies: Callable[[Call, str], Answer] | None = None


class Consumed(NamedTuple):
    """What one event says was consumed, and by whom; for whoever adds up what arrived.

    `amounts`: names with `-` or `_`, and whole numbers or texts of them; anything else among them is passed over.
    `is_mapped`: the customer is the vendor's id of it, else the subscriber's own.
    `own_counts`: the tokens are as each model's vendor counts them, and not in the sidecar's common terms.
    """

    customer: object
    amounts: Mapping[str, object]
    is_mapped: bool = True
    own_counts: bool = False


KEY = "key-of-the-demo"  # any key that is not empty is good where none was set
SECRET = "worth-nothing-outside-of-the-demo"


class Vendor(Protocol):
    """One wire contract."""

    def __init__(self, memory: Memory, terms: Terms) -> None: ...

    @staticmethod
    def settings(url: str) -> Mapping[str, str]:
        """The backend's own settings, without their prefix, that point it at a receiver at this address."""
        ...

    @staticmethod
    def consumed(path: str, body: Mapping[str, Any]) -> Consumed | None:
        """What one event of a body that was taken says; None where it has another form than this contract's.

        An event that counts nothing gives no amounts.
        """
        ...

    @property
    def routes(self) -> tuple[Route, ...]: ...

    @property
    def fault_body(self) -> Callable[[int], bytes]:
        """The body that the vendor would send with a 429 or a 5xx."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a receiver was told about one vendor.

    `key`: the only credential that is good; without it any that is not empty is. `secret`: signs webhook bodies.
    """

    key: str | None = None
    secret: str | None = None

    def admits(self, credential: str) -> bool:
        return bool(credential) and (self.key is None or credential == self.key)


def bearer(call: Call) -> str:
    """The token of an `Authorization: Bearer` header, or nothing."""
    scheme, _, token = call.header("Authorization").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
