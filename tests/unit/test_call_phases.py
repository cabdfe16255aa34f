"""The table of a call's phases and events, as the page that draws it says, and what each end means, row by row."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sidecar.model.exchange import Outcome
from sidecar.proxy import local_responses
from sidecar.proxy.call import TABLE, Event
from sidecar.proxy.ending import ERRORS, LIMITS, Cause, Client, Phase, Upstream, ending, silent

PAGE = Path(__file__).parents[2] / "docs" / "call.md"


def drawn() -> str:
    """The table as the page has it: a row an event, a column a phase."""
    phases = [phase for phase in Phase if phase is not Phase.OVER]
    lines = [
        "| | " + " | ".join(phase.name.lower().replace("_", " ") for phase in phases) + " |",
        "|---" * (len(phases) + 1) + "|",
    ]
    for event in Event:
        cells = []
        for phase in phases:
            handler = TABLE[phase][event]
            cells.append("" if handler is None else handler.__name__.strip("_").replace("_", " "))
        lines.append(f"| **{event.name.lower().replace('_', ' ')}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_page_draws_the_table() -> None:
    assert drawn() in PAGE.read_text(), f"docs/call.md should have:\n{drawn()}"


def test_nothing_happens_to_a_call_that_is_over() -> None:
    assert TABLE[Phase.OVER] == [None] * len(Event)


def test_every_phase_but_the_last_can_be_stopped_and_survives_a_fault() -> None:
    for phase in Phase:
        for event in (Event.STOP, Event.FAULT):
            assert (TABLE[phase][event] is None) == (phase is Phase.OVER)


@pytest.mark.parametrize(
    ("phase", "cause", "client", "framed", "expected"),
    [
        # whole
        ("WAITING", "WHOLE", True, True, ("complete", "REST", "KEEP")),
        ("STREAMING", "WHOLE", True, False, ("complete", "REST", "KEEP")),
        ("CATCHING_UP", "WHOLE", True, True, ("complete", "REST", "KEEP")),
        ("CATCHING_UP", "WHOLE", False, True, ("client_left", "REST", "KEEP")),
        # the client leaves
        ("GATHERING", "CLIENT_CLOSED", False, False, ("client_left", "NOTHING", "DROP")),
        ("CONNECTING", "CLIENT_RESET", False, False, ("client_left", "NOTHING", "DROP")),
        ("SENDING", "CLIENT_CLOSED", False, True, ("client_left", "NOTHING", "DROP")),
        ("WAITING", "CLIENT_CLOSED", False, True, ("client_left", "NOTHING", "DROP")),
        ("STREAMING", "CLIENT_RESET", False, True, ("client_left", "NOTHING", "DROP")),
        ("HELD", "CLIENT_CLOSED", False, True, (None, "NOTHING", "DROP")),
        ("TRAILING", "CLIENT_RESET", False, True, (None, "NOTHING", "DROP")),
        ("TUNNEL", "CLIENT_CLOSED", False, True, ("complete", "NOTHING", "FINISH")),
        ("TUNNEL", "CLIENT_RESET", False, True, ("client_left", "NOTHING", "FINISH")),
        # nothing came, and we answer
        ("CONNECTING", "REFUSED", True, False, ("refused", "OWN", "DROP")),
        ("CONNECTING", "UNREACHABLE", True, False, ("unreachable", "OWN", "DROP")),
        ("ADMISSION", "DENIED", True, False, ("denied", "OWN", "DROP")),
        ("ADMISSION", "UPLOAD_STALLED", True, False, ("refused", "OWN", "DROP")),
        ("ADMISSION", "CLIENT_CLOSED", False, False, ("client_left", "NOTHING", "DROP")),
        ("GATHERING", "UPLOAD_STALLED", True, False, ("refused", "OWN", "DROP")),
        ("SENDING", "UPLOAD_STALLED", True, True, ("refused", "OWN", "DROP")),
        ("SENDING", "UPLOAD_BROKE", True, True, ("refused", "OWN", "DROP")),
        ("WAITING", "NO_RESPONSE", True, True, ("upstream_timeout", "OWN", "DROP")),
        ("SENDING", "NO_RESPONSE", True, True, ("upstream_timeout", "OWN", "DROP")),
        ("WAITING", "BROKE", True, True, ("upstream_broke", "OWN", "DROP")),
        ("WAITING", "FAULT", True, True, ("upstream_broke", "OWN", "DROP")),
        # something came, and it is cut: by its framing where that shows it
        ("STREAMING", "BROKE", True, True, ("upstream_broke", "CLOSE", "DROP")),
        ("STREAMING", "BROKE", True, False, ("upstream_broke", "RESET", "DROP")),
        ("STREAMING", "FAULT", True, True, ("upstream_broke", "CLOSE", "DROP")),
        ("STREAMING", "FAULT", True, False, ("upstream_broke", "RESET", "DROP")),
        ("STREAMING", "SILENT", True, True, ("upstream_timeout", "RESET", "DROP")),
        ("STREAMING", "CLIENT_STALLED", True, True, ("client_left", "RESET", "DROP")),
        ("STREAMING", "UPLOAD_STALLED", True, True, ("refused", "RESET", "DROP")),
        ("STREAMING", "UPLOAD_BROKE", True, True, ("refused", "RESET", "DROP")),
        ("WAITING", "STOPPED", True, True, ("stopped", "RESET", "DROP")),
        ("STREAMING", "STOPPED", True, True, ("stopped", "RESET", "DROP")),
        ("CATCHING_UP", "STOPPED", True, True, ("stopped", "RESET", "DROP")),
        ("CATCHING_UP", "STOPPED", False, True, ("client_left", "NOTHING", "DROP")),
        ("CATCHING_UP", "BROKE", True, True, ("upstream_broke", "RESET", "DROP")),
        # on record
        ("HELD", "NOT_COMMITTED", True, True, (None, "RESET", "DROP")),
        ("HELD", "NOT_COMMITTED", False, True, (None, "NOTHING", "DROP")),
        ("HELD", "BROKE", True, True, (None, "RESET", "DROP")),
        ("HELD", "STOPPED", True, True, (None, "RESET", "DROP")),
        ("TRAILING", "BROKE", True, True, (None, "CLOSE", "DROP")),
        ("TRAILING", "BROKE", True, False, (None, "RESET", "DROP")),
        ("TRAILING", "SILENT", True, True, (None, "RESET", "DROP")),
        ("TRAILING", "STOPPED", True, True, (None, "RESET", "DROP")),
        # read on for its usage
        ("DRAINING", "DRAINED_LONG", False, True, ("client_left", "NOTHING", "DROP")),
        ("DRAINING", "DRAINED_ENOUGH", False, True, ("client_left", "NOTHING", "DROP")),
        ("DRAINING", "BROKE", False, True, ("client_left", "NOTHING", "DROP")),
        ("DRAINING", "STOPPED", False, True, ("client_left", "NOTHING", "DROP")),
        ("DRAINING", "FAULT", False, True, ("upstream_broke", "NOTHING", "DROP")),
        # tunnels
        ("TUNNEL", "TUNNEL_CLOSED", True, True, ("complete", "END", "DROP")),
        ("TUNNEL", "TUNNEL_RESET", True, True, ("upstream_broke", "END", "DROP")),
        ("TUNNEL", "TUNNEL_SILENT", True, True, ("upstream_timeout", "RESET", "DROP")),
        ("TUNNEL", "UNRECORDED", True, True, ("stopped", "RESET", "DROP")),
        ("TUNNEL", "STOPPED", True, True, ("stopped", "RESET", "DROP")),
    ],
)
def test_how_a_call_ends(
    phase: str, cause: str, client: bool, framed: bool, expected: tuple[str | None, str, str]
) -> None:
    outcome, gets, upstream = expected
    end = ending(Phase[phase], Cause[cause], client=client, framed=framed)
    assert end.outcome == (None if outcome is None else Outcome(outcome))
    assert (end.client, end.upstream) == (Client[gets], Upstream[upstream])


def test_what_holds_in_every_row() -> None:
    for phase, cause, client, framed in itertools.product(Phase, Cause, (True, False), (True, False)):
        end = ending(phase, cause, client=client, framed=framed)
        recorded = phase in (Phase.HELD, Phase.TRAILING)
        assert (end.outcome is None) == recorded, "a call is recorded once"
        if end.outcome is Outcome.COMPLETE:
            assert cause in (Cause.WHOLE, Cause.CLIENT_CLOSED, Cause.TUNNEL_CLOSED)
        if end.client is Client.OWN:
            assert phase in (
                Phase.ADMISSION,
                Phase.GATHERING,
                Phase.CONNECTING,
                Phase.SENDING,
                Phase.WAITING,
                Phase.DRAINING,
                Phase.OVER,
            )
            assert cause in local_responses.FOR or cause in (Cause.REFUSED, Cause.DENIED)
        if end.client is Client.CLOSE:
            assert framed, "an end without framing would look whole"
        if not client and phase is not Phase.TUNNEL and cause is not Cause.WHOLE:
            assert end.client is Client.NOTHING


@pytest.mark.parametrize(
    ("phase", "client_full", "upload_waits", "head_came", "expected"),
    [
        ("ADMISSION", False, True, False, "UPLOAD_STALLED"),
        ("GATHERING", False, True, False, "UPLOAD_STALLED"),
        ("SENDING", False, True, False, "UPLOAD_STALLED"),
        ("SENDING", False, False, False, "NO_RESPONSE"),
        ("SENDING", True, True, False, "CLIENT_STALLED"),
        ("WAITING", False, False, False, "NO_RESPONSE"),
        ("STREAMING", False, False, True, "SILENT"),
        ("STREAMING", False, True, True, "UPLOAD_STALLED"),
        ("STREAMING", True, False, True, "CLIENT_STALLED"),
        ("TRAILING", False, False, True, "SILENT"),
        ("DRAINING", False, False, True, "DRAINED_LONG"),
        ("TUNNEL", True, False, True, "TUNNEL_SILENT"),
    ],
)
def test_whose_silence_it_was(
    phase: str, client_full: bool, upload_waits: bool, head_came: bool, expected: str
) -> None:
    cause = silent(Phase[phase], client_full=client_full, upload_waits=upload_waits, head_came=head_came)
    assert cause is Cause[expected]
    assert cause in LIMITS, "what ends a call by its deadline is counted"


def test_what_is_counted_and_said_belongs_to_a_cause_that_can_come() -> None:
    assert set(LIMITS) & set(ERRORS) == {Cause.CLIENT_STALLED, Cause.SILENT, Cause.TUNNEL_SILENT}
    assert not set(ERRORS) & set(local_responses.FOR)
