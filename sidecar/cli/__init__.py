"""The commands: each reads its arguments, asks one part of the program, and prints what it was told.

`COMMANDS` is the table. A command is a module with `add(parser)` and `run(arguments) -> int`; the number is the exit
code (0: done, 1: the answer is no, 2: wrong arguments or settings, 3: only a part could be told or done). Parts are
imported when a command runs, so that `--help` and `check` stay quick and a broken part takes only its own command with
it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Final

import sidecar
from sidecar.cli import (
    balance,
    check,
    collect,
    completion,
    demo,
    limits,
    meters,
    prices,
    receiver,
    records,
    reload,
    serve,
    spool,
    streams,
    subscriber,
    usage,
)
from sidecar.cli import help as help_command
from sidecar.cli.output import plain_terminals
from sidecar.cli.shared import EXIT_OK, EXIT_USAGE, INTERRUPTED, CommandError
from sidecar.settings import SettingsError

COMMANDS: Final[Mapping[str, ModuleType]] = {
    "serve": serve,
    "reload": reload,
    "demo": demo,
    "check": check,
    "usage": usage,
    "records": records,
    "subscriber": subscriber,
    "balance": balance,
    "limits": limits,
    "spool": spool,
    "meters": meters,
    "prices": prices,
    "collect": collect,
    "receiver": receiver,
    "completion": completion,
    "help": help_command,
}

FILES: Final = frozenset({"data_dir", "feed", "file"})  # arguments that name one, and are texts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the answer is the exit code."""
    streams.take_over()
    plain_terminals()
    code = EXIT_OK  # of a reader that has enough before it can be known
    try:
        code = _run(_with_default(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except (SettingsError, CommandError) as error:
        print(error, file=sys.stderr)
        return error.code if isinstance(error, CommandError) else EXIT_USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _has_enough()
    except BaseExceptionGroup as group:
        # `demo` prints inside of task groups, which hand on in a group what ended them.
        if group.split(BrokenPipeError)[1] is not None:
            raise
        _has_enough()
    return code


def _run(words: Sequence[str]) -> int:
    try:
        arguments = parser().parse_args(words)
    except SystemExit:
        sys.stdout.flush()  # of `--help`: where it cannot be written, that can still be told
        raise
    _check_texts(arguments)
    return int(arguments.run(arguments))


def _check_texts(arguments: argparse.Namespace) -> None:
    """That what was typed is UTF-8, as everything is that it is compared with. Names of files may be anything."""
    for name, value in vars(arguments).items():
        if name in FILES:
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= char <= "\udfff" for char in text):
                raise CommandError(f"{text!r} is no UTF-8: nothing is called so", EXIT_USAGE)


def _has_enough() -> None:
    """The reader (`| head`) has. Whatever is still buffered goes nowhere, without a second complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    top = help_command.Parser(
        prog=help_command.NAME,
        description="Forward every HTTP call untouched, leave one durable record of each, bill each record once.",
        epilog="Settings come from the environment (SIDECAR_…); `check` shows them all. Exit codes: 0, done; 1, the "
        "answer is no; 2, arguments or settings are wrong; 3, a part only could be told or done: a fleet's database is "
        "away, or no sidecar delivers a lane.",
    )
    top.add_argument("--version", action="version", version=f"{help_command.NAME} {sidecar.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        doc = (module.__doc__ or "").strip()
        # The first line is the help text; what follows is for readers of the source.
        first = doc.splitlines()[0].rstrip(".")
        one = commands.add_parser(name, help=first[0].lower() + first[1:], description=first + ".")
        module.add(one)
        # Not a name that an argument of a command has: a default set here would win over the argument's own.
        one.set_defaults(run=module.run, all_commands=top)
    help_command.describe(top)
    return top


def _with_default(argv: Sequence[str]) -> list[str]:
    """No command means `serve`, as a container's bare entry point wants it."""
    return list(argv) if argv else ["serve"]
