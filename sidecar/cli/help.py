"""Say what a command does, with examples: `help usage`, `help spool redrive`.

Examples and pages of all commands stand here in one table, so that a test can try each of them. They are shown below
the arguments of `--help`, in the man page, and by `help`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn

from sidecar.cli.shared import EXIT_OK, EXIT_USAGE, CommandError, address

NAME: Final = "metering-sidecar"
SHARED_PAGES: Final = Path("share/doc") / NAME  # where an installed package has README.md and docs/
ALIKE: Final = 0.6  # of `difflib`: `serv`, `usge` and `recrods` are near enough, `serve` and `usage` are not


@dataclass(frozen=True, slots=True)
class Shown:
    """What stands below the arguments. `page` may have an anchor."""

    examples: Sequence[str]
    page: str


PAGES: Final[Mapping[str, Shown]] = {
    "": Shown(("demo", "serve https://api.openai.com", "help usage"), "README.md"),
    "serve": Shown(
        (
            "serve https://api.openai.com",
            "serve http://127.0.0.1:3000 --listen 127.0.0.1:8080 --data-dir ./metering",
            "serve",
        ),
        "README.md#running-it",
    ),
    "reload": Shown(("reload", "reload --data-dir ./metering"), "README.md#operating"),
    "demo": Shown(("demo", "demo --backend stripe --keep", "demo --limits"), "docs/backends.md"),
    "check": Shown(("check", "check --all", "check --connect"), "README.md#settings"),
    "usage": Shown(
        (
            "usage",
            "usage --by subscriber,day --since 7d --timezone Europe/Berlin",
            "usage --top 10 --sort cost",
            "usage --where model=gpt-5-mini --format csv",
            "usage --meter api_calls",
        ),
        "README.md#commands",
    ),
    "records": Shown(
        ("records --limit 20", "records --follow", "records --since 1h --format ndjson"), "docs/record.md"
    ),
    "balance": Shown(("balance", "balance --format json"), "docs/guarantees.md"),
    "limits": Shown(("limits", "limits --over 80"), "docs/gate.md"),
    "spool": Shown(("spool status", "spool parked --backend stripe", "spool verify"), "README.md#operating"),
    "spool status": Shown(("spool status", "spool status --format json"), "README.md#operating"),
    "spool verify": Shown(("spool verify",), "docs/spool-format.md"),
    "spool parked": Shown(
        ("spool parked", "spool parked --backend stripe --reason no_customer"), "README.md#operating"
    ),
    "spool redrive": Shown(
        ("spool redrive --backend stripe", "spool redrive --reason no_customer --since 2d"), "README.md#operating"
    ),
    "spool retry": Shown(("spool retry --backend stripe",), "README.md#operating"),
    "spool adopt": Shown(("spool adopt --as original", "spool adopt --as copy"), "README.md#operating"),
    "spool cancel": Shown(("spool cancel 0199e3a2-8f4c-7b10-9e55-3f1c6d2a7b88 --backend stripe",), "docs/backends.md"),
    "spool complain": Shown(("spool complain reports.json",), "docs/backends.md"),
    "spool export": Shown(("spool export --since 7d -o week.ndjson",), "README.md#operating"),
    "meters": Shown(("meters list", "meters properties", "meters test"), "docs/meters.md"),
    "meters list": Shown(("meters list", "meters list --format json"), "docs/meters.md"),
    "meters properties": Shown(("meters properties",), "docs/meters.md"),
    "meters test": Shown(
        ("meters test", "meters test input_tokens --since 1d", "meters test --backend stripe"), "docs/meters.md"
    ),
    "meters provision": Shown(("meters provision --backend stripe",), "docs/backends.md"),
    "prices": Shown(("prices show gpt-5-mini", "prices diff newer.json"), "docs/prices.md"),
    "prices show": Shown(("prices show gpt-5-mini", "prices show gpt-5-mini --at 2026-09-01"), "docs/prices.md"),
    "prices diff": Shown(("prices diff newer.json",), "docs/prices.md"),
    "subscriber": Shown(("subscriber", "subscriber --source header:x-tenant"), "docs/numbers.md"),
    "collect": Shown(
        ("collect", "collect --provision", "collect --aside", "collect --feed records.ndjson"), "docs/backends.md#nats"
    ),
    "receiver": Shown(("receiver", "receiver --listen 127.0.0.1:9701 --store taken.db"), "docs/backends.md"),
    "completion": Shown(
        (
            "completion bash > ~/.local/share/bash-completion/completions/metering-sidecar",
            "completion zsh > ~/.zfunc/_metering-sidecar",
            "completion tcsh > ~/.metering-sidecar.tcsh",
        ),
        "README.md#commands",
    ),
    "help": Shown(("help serve", "help spool redrive"), "README.md#commands"),
}


class Parser(argparse.ArgumentParser):
    """With a guess at what was mistyped, and examples that keep their lines."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **more})

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        asked = self._asked()
        said = guessed(message, list(asked._option_string_actions))
        # What no command takes is said by the parser of all of them, whose usage would be of no help.
        argparse.ArgumentParser.error(asked if message.startswith("unrecognized arguments") else self, said)

    def _asked(self) -> argparse.ArgumentParser:
        """The command that was asked for."""
        parser: argparse.ArgumentParser = self
        for word in self._words:
            parser = subcommands(parser).get(word, parser)
        return parser


class _Formatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Lines that begin with a space stand as they are, others are wrapped as ever."""
        fill = super()._fill_text
        lines = text.split("\n")
        return "\n".join(line if not line or line.startswith(" ") else fill(line, width, indent) for line in lines)


def guessed(message: str, options: Sequence[str] = ()) -> str:
    """A message of argparse about a word that is none of its choices or options, with the one that is near."""
    if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
        # Without the dashes, by which every option would be like every other.
        near = nearest(unknown[1][2:], [option[2:] for option in options if option.startswith("--")])
        return message if near is None else f"{message}; did you mean --{near}?"
    found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message, re.DOTALL)
    if found is None:
        return message
    if message.startswith("argument COMMAND:") and (url := address(found[1])) is not None:
        return f"{found[1]!r} is no command; did you mean `serve {url}`?"
    near = nearest(found[1], [choice.strip(" '") for choice in found[2].split(",")])
    if near is None and f"--{found[1]}" in options:
        near = f"--{found[1]}"
    return message if near is None else message.replace(" (choose from", f"; did you mean {near}? (choose from", 1)


def nearest(word: str, known: Sequence[str]) -> str | None:
    close = get_close_matches(word.lower(), known, n=1, cutoff=ALIKE)
    return close[0] if close else None


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """What may follow at once, by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def walk(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """All commands below, each with its words: `("spool redrive", …)`; the parser itself as `""`."""
    yield path, parser
    for name, below in subcommands(parser).items():
        yield from walk(below, f"{path} {name}".strip())


def describe(top: argparse.ArgumentParser) -> None:
    """Put examples and the page to read below each command's arguments."""
    for path, parser in walk(top):
        shown = PAGES.get(path)
        if shown is None:
            continue
        parts = [parser.epilog] if parser.epilog else []
        parts.append("examples:\n" + "\n".join(f"  {NAME} {example}" for example in shown.examples))
        parts.append(f"read on: {shown.page}, {whereabouts()}" if not path else f"read on: {shown.page}")
        parser.epilog = "\n\n".join(parts)


def whereabouts() -> str:
    """Where the pages are that `read on:` names: beside an installed package, or in the clone."""
    installed = Path(sys.prefix) / SHARED_PAGES
    clone = Path(__file__).parent.parent.parent
    for place in (clone, installed):
        if (place / "README.md").exists() and (place / "docs").is_dir():
            return f"in {place}"
    return "of the source"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="COMMAND", help="of which command; none: all of them")


def run(arguments: argparse.Namespace) -> int:
    found: argparse.ArgumentParser = arguments.all_commands
    for word in arguments.words:
        below = subcommands(found)
        if word not in below:
            near = nearest(word, list(below))
            what = f"{found.prog} has no command {word!r}"
            rest = f"; did you mean {near}?" if near else f"; it has {', '.join(below)}" if below else ""
            raise CommandError(what + rest, EXIT_USAGE)
        found = below[word]
    found.print_help()
    return EXIT_OK
