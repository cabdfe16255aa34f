"""What the end of a call means: for its record, for the client, and for the upstream's connection.

Pure: where the call stands and why it ends go in, an `Ending` comes out, and `call` carries it out. Two rules stand
behind all rows. What is not whole never looks whole: a response of which the client has had a part is cut off by what
its framing shows, or by a reset where the framing cannot show it. And what is on record is not recorded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from sidecar.model.exchange import Outcome


class Phase(IntEnum):
    """Where a call stands. It goes from top to bottom, and may leave some out."""

    ADMISSION = 0  # whether it may be made is being found out; nothing of it has gone upstream
    GATHERING = 1  # the request's body is kept back until it is whole: asking for usage changes its length
    CONNECTING = 2  # a connection to the upstream is being made, for the first time or once more
    SENDING = 3  # the request is on its way, and there is more of it to come
    WAITING = 4  # the request is whole; the client has not had the head of a response
    STREAMING = 5  # the client has the head; the body passes (and so may what is left of the upload)
    DRAINING = 6  # the client is gone; the response is read on for the usage in it
    TUNNEL = 7  # after a 101: bytes go both ways
    CATCHING_UP = 8  # the response ended, and the usage reader still works off what it holds
    HELD = 9  # on record; the end of the response waits for the disk
    TRAILING = 10  # on record and on disk; what stands behind the stream's end mark passes
    OVER = 11


class Cause(IntEnum):
    """Why a call ends."""

    WHOLE = 0  # the response is whole, or its own end mark was seen
    CLIENT_CLOSED = 1
    CLIENT_RESET = 2
    CLIENT_STALLED = 3  # it does not read
    UPLOAD_STALLED = 4
    UPLOAD_BROKE = 5  # its framing is malformed
    REFUSED = 6  # by us: the parser lets it through and we do not
    UNREACHABLE = 7
    NO_RESPONSE = 8  # no head in time
    SILENT = 9  # the upstream, in a body
    BROKE = 10  # the response is no HTTP, or was cut off
    TUNNEL_CLOSED = 11  # by the upstream
    TUNNEL_RESET = 12
    TUNNEL_SILENT = 13
    DRAINED_LONG = 14
    DRAINED_ENOUGH = 15  # what is still to come says nothing of usage
    NOT_COMMITTED = 16  # what is held may not leave
    UNRECORDED = 17  # a message in a tunnel could not be recorded
    STOPPED = 18
    FAULT = 19  # ours
    DENIED = 20  # by the gate


class Client(Enum):
    """What the client gets."""

    NOTHING = "nothing"  # it is gone
    REST = "the rest"  # what is held leaves when the record is on disk
    OWN = "a response of ours"  # when that is on disk
    END = "an end"  # of the tunnel, when that is on disk
    CLOSE = "a close"  # the framing shows that the response is not whole
    RESET = "a reset"


class Upstream(Enum):
    """What becomes of the upstream's connection."""

    KEEP = "given back"  # or closed, where its response says so
    DROP = "dropped"
    FINISH = "closed after what was written has left"


@dataclass(frozen=True, slots=True)
class Ending:
    """`outcome` is the record's; None where the call is on record already. `whole`: so the usage reader is told."""

    outcome: Outcome | None
    client: Client
    upstream: Upstream
    whole: bool = False


_OUTCOMES: Final = {
    Cause.WHOLE: Outcome.COMPLETE,
    Cause.CLIENT_CLOSED: Outcome.CLIENT_LEFT,
    Cause.CLIENT_RESET: Outcome.CLIENT_LEFT,
    Cause.CLIENT_STALLED: Outcome.CLIENT_LEFT,
    Cause.UPLOAD_STALLED: Outcome.REFUSED,
    Cause.UPLOAD_BROKE: Outcome.REFUSED,
    Cause.REFUSED: Outcome.REFUSED,
    Cause.UNREACHABLE: Outcome.UNREACHABLE,
    Cause.NO_RESPONSE: Outcome.UPSTREAM_TIMEOUT,
    Cause.SILENT: Outcome.UPSTREAM_TIMEOUT,
    Cause.BROKE: Outcome.UPSTREAM_BROKE,
    Cause.TUNNEL_CLOSED: Outcome.COMPLETE,
    Cause.TUNNEL_RESET: Outcome.UPSTREAM_BROKE,
    Cause.TUNNEL_SILENT: Outcome.UPSTREAM_TIMEOUT,
    Cause.DRAINED_LONG: Outcome.CLIENT_LEFT,
    Cause.DRAINED_ENOUGH: Outcome.CLIENT_LEFT,
    Cause.NOT_COMMITTED: Outcome.STOPPED,
    Cause.UNRECORDED: Outcome.STOPPED,
    Cause.STOPPED: Outcome.STOPPED,
    Cause.FAULT: Outcome.UPSTREAM_BROKE,
    Cause.DENIED: Outcome.DENIED,
}

# What may still be answered by us where the client has had nothing of a response.
_ANSWERED: Final = frozenset(
    {
        Cause.UPLOAD_STALLED, Cause.UPLOAD_BROKE, Cause.REFUSED, Cause.UNREACHABLE, Cause.NO_RESPONSE, Cause.BROKE,
        Cause.FAULT, Cause.DENIED,
    }
)  # fmt: skip
_LEFT: Final = frozenset({Cause.CLIENT_CLOSED, Cause.CLIENT_RESET})
_RECORDED: Final = frozenset({Phase.HELD, Phase.TRAILING})
_HEAD_SENT: Final = frozenset({Phase.STREAMING, Phase.TUNNEL, Phase.HELD, Phase.TRAILING, Phase.CATCHING_UP})
_WAITS: Final = frozenset({Phase.HELD, Phase.CATCHING_UP})  # nothing leaves for the client

LIMITS: Final = {
    Cause.CLIENT_STALLED: "idle_timeout",
    Cause.UPLOAD_STALLED: "idle_timeout",
    Cause.SILENT: "idle_timeout",
    Cause.TUNNEL_SILENT: "idle_timeout",
    Cause.NO_RESPONSE: "response_timeout",
    Cause.DRAINED_LONG: "disconnect_drain",
}
"""The limit that is counted when a call ends for this cause."""

ERRORS: Final = {
    Cause.CLIENT_STALLED: "the client stopped reading",
    Cause.SILENT: "the upstream fell silent",
    Cause.TUNNEL_SILENT: "the tunnel was silent for too long",
    Cause.UNRECORDED: "a message could not be recorded",
    Cause.STOPPED: "cut at the end of the graceful stop",
}
"""What the record says, where neither a response of ours nor the upstream has words for it."""


def ending(phase: Phase, cause: Cause, *, client: bool, framed: bool, end_mark: bool = False) -> Ending:
    """How a call ends that stands in `phase`.

    `client`: it is still there. `framed`: the framing of what it has had shows that more should come (a length, or
    chunks); a response that ends by closing shows nothing. `end_mark`: the stream's own was seen.
    """
    if phase is Phase.TUNNEL:
        return _of_a_tunnel(cause)
    outcome = None if phase in _RECORDED else _OUTCOMES[cause]
    if cause is Cause.WHOLE:
        if outcome is not None and not client:
            outcome = Outcome.CLIENT_LEFT
        return Ending(outcome, Client.REST, Upstream.KEEP, whole=True)
    if cause in _LEFT or not client:
        if outcome is not None and cause is not Cause.FAULT:
            outcome = Outcome.CLIENT_LEFT
        return Ending(outcome, Client.NOTHING, Upstream.DROP, whole=end_mark)
    if cause in _ANSWERED and phase not in _HEAD_SENT:
        return Ending(outcome, Client.OWN, Upstream.DROP)
    shown = framed and phase not in _WAITS and cause in (Cause.BROKE, Cause.FAULT)
    return Ending(outcome, Client.CLOSE if shown else Client.RESET, Upstream.DROP)


def silent(phase: Phase, *, client_full: bool, upload_waits: bool, head_came: bool) -> Cause:
    """Whose silence it was, where the deadline of a call passed that stands in `phase`.

    `client_full`: the client does not read as fast as we write. `upload_waits`: for more of the request's body, which
    the upstream would take. `head_came`: that of the response.
    """
    if phase is Phase.DRAINING:
        return Cause.DRAINED_LONG
    if phase is Phase.TUNNEL:
        return Cause.TUNNEL_SILENT
    if client_full:
        return Cause.CLIENT_STALLED
    if upload_waits:
        return Cause.UPLOAD_STALLED
    return Cause.SILENT if head_came else Cause.NO_RESPONSE


def _of_a_tunnel(cause: Cause) -> Ending:
    if cause is Cause.CLIENT_CLOSED:
        return Ending(Outcome.COMPLETE, Client.NOTHING, Upstream.FINISH, whole=True)
    if cause is Cause.CLIENT_RESET:
        return Ending(Outcome.CLIENT_LEFT, Client.NOTHING, Upstream.FINISH)
    outcome = _OUTCOMES[cause]
    if cause in (Cause.TUNNEL_CLOSED, Cause.TUNNEL_RESET):
        return Ending(outcome, Client.END, Upstream.DROP, whole=outcome is Outcome.COMPLETE)
    return Ending(outcome, Client.RESET, Upstream.DROP)
