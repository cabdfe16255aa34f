"""Reading usage out of the bytes that go by. The proxy sees only these classes.

A tap is handed a copy of every piece and never gives anything back but facts: no exception leaves
it, whatever the bytes are, and it keeps a bounded amount of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Final, NamedTuple, Protocol

from sidecar.model.exchange import RawHeaders as RawHeaders
from sidecar.model.exchange import Usage, unread_usage

"""Header fields as they stood on the wire: exact bytes, order and case."""


class RequestTap(Protocol):
    """Reads along with one request body."""

    opened_ns: int  # of the monotonic clock: when the call began

    def feed(self, piece: bytes) -> None: ...

    def member(self, name: str) -> str | None:
        """A text (or whole number) at the body's top level, of those that it was told to look for."""
        ...

    def with_usage_asked(self, body: bytes) -> bytes | None:
        """The whole body with usage asked for; None where it is to stay as it is."""
        ...

    @property
    def may_ask(self) -> bool:
        """Whether `with_usage_asked` could be of use: only where that is switched on."""
        ...

    def unanswered(self) -> Usage | None:
        """For a call that got no answer; None where it is no model call."""
        ...


class Skips(NamedTuple):
    """Which pieces need not be fed: those that end with one of `ends`, where a message of the stream does, have at most
    `bytes_max`, and in which there is nothing of interest. Leaving one out changes nothing."""

    ends: tuple[bytes, ...]
    bytes_max: int
    nothing_in: Callable[[bytes], bool]
    searches: bool  # `nothing_in` looks for bytes that must not be there: it may be given a chunk with its framing
    looked_at: frozenset[bytes] | None = None  # names of the members that matter; None: nobody knows them all


class ResponseTap(Protocol):
    """Reads along with one response body."""

    @property
    def waiting(self) -> bool:
        """Whether reading on could still bring the final usage (for SIDECAR_ON_DISCONNECT=drain)."""
        ...

    @property
    def behind(self) -> bool:
        """Whether coded bytes wait to be looked into: `feed(b"")` works off another step, `finish` all of them."""
        ...

    @property
    def skips(self) -> Skips | None:
        """Which of the next pieces may be left out; None: none. To be asked again after each `feed`."""
        ...

    def feed(self, piece: bytes) -> bool:
        """Take a copy of one piece; True when the stream's own end mark ended within this piece."""
        ...

    def finish(self, whole: bool) -> Usage | None:
        """What is known. `whole`: the body ended as its framing (or end mark) says. Safe to call twice."""
        ...


class SocketTap(Protocol):
    """Reads along with both sides of one WebSocket."""

    @property
    def behind(self) -> bool:
        """Whether messages from the server wait: `from_server(b"")` takes another step's worth of them."""
        ...

    def from_client(self, data: bytes) -> None: ...

    def from_server(self, data: bytes) -> Sequence[Usage]:
        """Take a copy of what came; the usage of each message that ended in it and reports some, a step's worth."""
        ...


class ResponseFilter(Protocol):
    """Takes out of an answer what only came because it was asked for on the client's behalf."""

    def feed(self, piece: bytes) -> bytes: ...

    def finish(self) -> bytes:
        """What is still held."""
        ...


class Taps(Protocol):
    """Chooses the readers. One for the whole process; holds no state of a call."""

    def kind(self, method: str, target: str) -> Hashable:
        """How calls to this target are read: two with the same kind are read alike."""
        ...

    def request(self, method: str, target: str, headers: RawHeaders) -> RequestTap | None:
        """None where no answer to this request can be a model call."""
        ...

    def response(self, request: RequestTap, status: int, headers: RawHeaders) -> ResponseTap | None:
        """None where the head already says that there is no usage to read."""
        ...

    def answer_filter(self, status: int, headers: RawHeaders) -> ResponseFilter | None:
        """For the answer to a request in which usage was asked for; None where it is to pass as it is."""
        ...

    def websocket(self, target: str, headers: RawHeaders) -> SocketTap | None:
        """After a 101 with these fields; None where its messages are nobody's."""
        ...


class UnreadRequest:
    """Stands for a `RequestTap` that could not be made, for a fault of ours: the call's usage says so."""

    opened_ns = 0
    may_ask = False

    def feed(self, piece: bytes) -> None: ...

    def member(self, name: str) -> str | None:
        return None

    def with_usage_asked(self, body: bytes) -> bytes | None:
        return None

    def unanswered(self) -> Usage | None:
        return unread_usage()


class UnreadResponse:
    """Likewise for a `ResponseTap`, also for one that failed on the way."""

    waiting = behind = False
    skips: Skips | None = None

    def feed(self, piece: bytes) -> bool:
        return False

    def finish(self, whole: bool) -> Usage | None:
        return unread_usage()


UNREAD_REQUEST: Final = UnreadRequest()
UNREAD_RESPONSE: Final = UnreadResponse()
