"""Whether every call is accounted for; exit 1 when one is not.

Asks the running instance, which knows the calls that are open; adds up the files where none is running.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

from sidecar.cli.instance import ask
from sidecar.cli.output import Format, pairs
from sidecar.cli.shared import EXIT_FAILED, EXIT_OK, add_data_dir, add_format, read_settings
from sidecar.settings import Settings
from sidecar.storage.files import StorageError

if TYPE_CHECKING:
    from sidecar.runtime.fleet import Whole


def add(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser)
    add_format(parser, "table", "json")


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    data_dir = settings.data_dir
    found = ask(data_dir, "/balance")
    if found is None:
        from sidecar.cli.files import balance_of

        balance = balance_of(data_dir)
        found = balance.to_dict() | {"problems": balance.problems, "notes": list(balance.notes)}
    problems = found.pop("problems", [])
    notes = found.pop("notes", [])
    found.pop("fleet", None)  # as it was some seconds ago: asked anew
    fleet = _fleet(settings, notes)
    if fleet is not None:
        found["fleet"] = fleet.to_dict()
        problems += fleet.problems
        notes += fleet.notes
    if arguments.format == Format.JSON:
        print(json.dumps(found, indent=2))
    else:
        print(report(found), end="")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for problem in problems:
        print(f"does not hold: {problem}", file=sys.stderr)
    return EXIT_OK if found["holds"] and (fleet is None or fleet.holds) else EXIT_FAILED


def _fleet(settings: Settings, notes: list[str]) -> Whole | None:
    """All that share a ledger, as they told it; None where there is none, or it cannot be asked, which is said."""
    from sidecar.runtime.backend_factory import fleet_reader
    from sidecar.runtime.fleet import whole_of

    reader = fleet_reader(settings)
    if reader is None:
        return None
    with closing(reader):
        try:
            return whole_of(reader.instances())
        except StorageError as error:
            notes.append(f"the fleet cannot be asked: {error}")
            return None


def report(found: dict[str, Any]) -> str:
    """The equation in words, one line for the calls and one for each backend."""
    lines = [("calls", _sum("admitted", found["admitted"], found, ("recorded", "open", "lost")))]
    for name, terms in found["backends"].items():
        parts = ("delivered", "duplicate", "parked", "pending", "skipped")
        lines.append((name, _sum("recorded", found["recorded"], terms, parts)))
    lines.append(("", "the balance holds" if found["holds"] else "THE BALANCE DOES NOT HOLD"))
    fleet = found.get("fleet")
    if fleet is not None:
        lines.append(("", ""))
        for name, one in fleet["instances"].items():
            lines.append((name, _member(one)))
        total = _sum("admitted", fleet["sum"]["admitted"], fleet["sum"], ("recorded", "open", "lost"))
        lines.append(("fleet", f"{total}; in the ledger {fleet['in_ledger']:,}"))
        lines.append(("", "the fleet's balance holds" if fleet["holds"] else "THE FLEET'S BALANCE DOES NOT HOLD"))
    return pairs(lines)


def _member(one: dict[str, Any]) -> str:
    """One sidecar of the fleet, in a line."""
    said = f"in the ledger {one['in_ledger']:,}"
    if "admitted" not in one:
        return f"{said}; it has told nothing yet"
    calls = _sum("admitted", one["admitted"], one, ("recorded", "open", "lost"))
    return f"{calls}; {said}; {one['lag_s']:.0f} s behind; told {one['age_s']:.0f} s ago"


def _sum(whole: str, count: int, terms: dict[str, Any], names: tuple[str, ...]) -> str:
    return f"{whole} {count:,} = " + " + ".join(_term(name, terms[name]) for name in names)


def _term(name: str, value: int | dict[str, int]) -> str:
    """`parked 3 (refused 2, expired 1)`: reasons are named where there are any."""
    if isinstance(value, int):
        return f"{name} {value:,}"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(value.items()) if count)
    return f"{name} {sum(value.values()):,}" + (f" ({reasons})" if reasons else "")
