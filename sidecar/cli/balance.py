"""Whether every call is accounted for; exit 1 when one is not.

Asks the running instance, which knows the calls that are open; adds up the files where none is running. What sidecars
share is read in their database, whoever runs: what each has told, and of the lanes what has become of each record.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

from sidecar.cli.instance import ask
from sidecar.cli.output import Format, amount, pairs
from sidecar.cli.shared import EXIT_FAILED, EXIT_OK, EXIT_PART, add_data_dir, add_format, read_settings
from sidecar.settings import Settings
from sidecar.storage.files import StorageError

if TYPE_CHECKING:
    from sidecar.runtime.fleet import Whole

PARTS: Final = ("delivered", "duplicate", "parked", "pending", "skipped")


def add(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser)
    add_format(parser, "table", "json")
    parser.epilog = (
        "exit codes: 0, it holds; 1, it does not; 3, it holds as far as it is known: the lanes cannot be asked"
    )


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
    lanes = of_lanes(settings, found.pop("lanes", None))
    if lanes is not None:
        found["lanes"] = lanes
        problems += lanes.get("problems", ())
        notes += remarks_on(lanes)
    if arguments.format == Format.JSON:
        print(json.dumps(found, indent=2))
    else:
        print(report(found), end="")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for problem in problems:
        print(f"does not hold: {problem}", file=sys.stderr)
    holds = found["holds"] and (fleet is None or fleet.holds) and (lanes is None or lanes.get("holds", True))
    return EXIT_FAILED if not holds else EXIT_PART if lanes is not None and lanes["trouble"] else EXIT_OK


def of_lanes(settings: Settings, told: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """How the lanes stand (`Seen.to_dict`); None where each sidecar tells its backends by itself. `told`: what the
    running instance says, which is better than nothing where the database cannot be asked from here."""
    from sidecar.runtime.lanes import look, url_of

    url = url_of(settings)
    if url is None:
        return told
    found = look(url).to_dict()
    if found["trouble"] and told is not None and "lanes" in told:
        return {"age_s": 0.0, **told, "trouble": found["trouble"]}
    return found


def remarks_on(lanes: dict[str, Any]) -> list[str]:
    """What somebody has to know of them, and what is not known."""
    notes: list[str] = list(lanes.get("notes", ()))
    if lanes["trouble"]:
        known = "what became of their records is not known"
        if "age_s" in lanes:
            known = f"this is as of {lanes['age_s']:.0f} s ago"
        notes.append(f"the lanes cannot be asked, {known}: {lanes['trouble']}")
    return notes


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
        lines.append((name, _sum("recorded", found["recorded"], terms, PARTS)))
    lines.append(("", "the balance holds" if found["holds"] else "THE BALANCE DOES NOT HOLD"))
    fleet = found.get("fleet")
    if fleet is not None:
        lines.append(("", ""))
        for name, one in fleet["instances"].items():
            lines.append((name, _member(one)))
        total = _sum("admitted", fleet["sum"]["admitted"], fleet["sum"], ("recorded", "open", "lost"))
        lines.append(("fleet", f"{total}; in the ledger {fleet['in_ledger']:,}"))
        lines.append(("", "the fleet's balance holds" if fleet["holds"] else "THE FLEET'S BALANCE DOES NOT HOLD"))
    if "sum" in found.get("lanes", {}):
        lines += [("", ""), *_lanes(found["lanes"])]
    return pairs(lines)


def _lanes(lanes: dict[str, Any]) -> list[tuple[str, str]]:
    """Those that have records, and the sum of all; one line a backend."""
    lines = []
    for lane in lanes["lanes"]:
        if lane["recorded"]:
            held = f"{lane['holder']} delivers it" if lane["holder"] else "nobody delivers it"
            lines.append((f"lane {lane['lane']}", f"{amount(lane['recorded'], 'record')}, {held}"))
            for name, terms in lane["backends"].items():
                lines.append((f"  {name}", _sum("recorded", lane["recorded"], terms, PARTS)))
    lines.append(("lanes", f"in the ledger {lanes['in_ledger']:,} = in the lanes {lanes['sum']['recorded']:,}"))
    for name, terms in lanes["sum"]["backends"].items():
        lines.append((f"  {name}", _sum("recorded", terms["recorded"], terms, PARTS)))
    lines.append(("", "the lanes' balance holds" if lanes["holds"] else "THE LANES' BALANCE DOES NOT HOLD"))
    return lines


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
