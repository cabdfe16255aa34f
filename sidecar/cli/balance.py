"""Whether every call is accounted for; exit 1 when one is not.

Asks the running instance, which knows the calls that are open; adds up the files where none is running.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sidecar.cli.instance import ask
from sidecar.cli.output import Format, pairs
from sidecar.cli.shared import EXIT_FAILED, EXIT_OK, add_data_dir, add_format, read_settings


def add(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser)
    add_format(parser, "table", "json")


def run(arguments: argparse.Namespace) -> int:
    data_dir = read_settings(arguments).data_dir
    found = ask(data_dir, "/balance")
    if found is None:
        from sidecar.cli.files import balance_of

        balance = balance_of(data_dir)
        found = balance.to_dict() | {"problems": balance.problems, "notes": list(balance.notes)}
    problems = found.pop("problems", [])
    notes = found.pop("notes", [])
    if arguments.format == Format.JSON:
        print(json.dumps(found, indent=2))
    else:
        print(report(found), end="")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for problem in problems:
        print(f"does not hold: {problem}", file=sys.stderr)
    return EXIT_OK if found["holds"] else EXIT_FAILED


def report(found: dict[str, Any]) -> str:
    """The equation in words, one line for the calls and one for each backend."""
    lines = [("calls", _sum("admitted", found["admitted"], found, ("recorded", "open", "lost")))]
    for name, terms in found["backends"].items():
        parts = ("delivered", "duplicate", "parked", "pending", "skipped")
        lines.append((name, _sum("recorded", found["recorded"], terms, parts)))
    lines.append(("", "the balance holds" if found["holds"] else "THE BALANCE DOES NOT HOLD"))
    return pairs(lines)


def _sum(whole: str, count: int, terms: dict[str, Any], names: tuple[str, ...]) -> str:
    return f"{whole} {count:,} = " + " + ".join(_term(name, terms[name]) for name in names)


def _term(name: str, value: int | dict[str, int]) -> str:
    """`parked 3 (refused 2, expired 1)`: reasons are named where there are any."""
    if isinstance(value, int):
        return f"{name} {value:,}"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(value.items()) if count)
    return f"{name} {sum(value.values()):,}" + (f" ({reasons})" if reasons else "")
