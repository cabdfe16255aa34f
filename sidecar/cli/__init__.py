"""The commands: each reads its arguments, asks one part of the program, and prints what it was told."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the answer is the exit code."""
    sys.stderr.write("no command is wired up yet\n")
    return 2
