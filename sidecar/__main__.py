"""`python -m sidecar` and the `metering-sidecar` script are the same program."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one command; the answer is the exit code.

    The commands are imported here, a third of a second on a fast disk, because Ctrl-C comes then too.
    """
    try:
        from sidecar import cli
    except KeyboardInterrupt:
        return 130  # `INTERRUPTED`, in a module that may not be there yet
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
