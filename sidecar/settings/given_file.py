"""How a file that an operator named is read: whole, up to a limit, and not waited for without end.

It may be anything: a pipe that nobody writes into, a terminal, `/dev/zero`. What comes out of a shell's `<(command)` is
taken as well.
"""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path
from typing import Final

PATIENCE_S: Final = 5.0  # between two pieces: a command that fetches a key takes a second or two
PIECE_BYTES: Final = 1 << 20


def read_given(path: Path, most_bytes: int) -> bytes:
    """The content of a file, without its home directory's `~` being looked up.

    Raises `OSError`, whose `strerror` is said to people: also where it is longer than `most_bytes` (`EFBIG`) or nothing
    comes for `PATIENCE_S` (`ETIMEDOUT`). Raises `ValueError` where no system takes such a path.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        content = bytearray()
        waiting = select.poll()
        waiting.register(fd, select.POLLIN)
        while len(content) <= most_bytes:
            if not waiting.poll(PATIENCE_S * 1000):
                raise TimeoutError(errno.ETIMEDOUT, f"nothing was written into it for {PATIENCE_S:g} s")
            try:
                piece = os.read(fd, min(PIECE_BYTES, most_bytes + 1 - len(content)))
            except BlockingIOError:  # somebody else reads it too
                continue
            if not piece:
                return bytes(content)
            content += piece
    finally:
        os.close(fd)
    raise OSError(errno.EFBIG, f"it holds more than {most_bytes} bytes")
