"""Print a script that completes commands, options and file names in bash, zsh or tcsh.

Written by `shtab` from the parser itself, so that it knows what `--help` knows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from sidecar.cli.help import walk
from sidecar.cli.shared import EXIT_OK

SHELLS: Final = ("bash", "zsh", "tcsh")  # those that shtab writes for
FILES: Final = frozenset({"FILE"})
DIRECTORIES: Final = frozenset({"PATH"})


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="which shell it is for")


def run(arguments: argparse.Namespace) -> int:
    print(script(arguments.all_commands, arguments.shell))
    return EXIT_OK


def script(top: argparse.ArgumentParser, shell: str) -> str:
    """What `shell` is to source, for all commands of `top`."""
    import shtab

    for _, command in walk(top):
        for action in command._actions:
            if action.metavar in FILES or action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks
            elif action.metavar in DIRECTORIES:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return str(shtab.complete(top, shell))
