"""The standard streams as every command meets them: also closed, full, or with a reader that has gone.

What is printed waits in a buffer that holds all that most commands say, so that the exit code is known before a reader
that has gone (`| true`) can be noticed. Of a terminal each line goes at once, as ever.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Final

from sidecar.cli.shared import CommandError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BUFFER_BYTES: Final = 1 << 18  # all settings are a tenth of it; what is longer has no other answer than itself
STDOUT: Final = 1
STDERR: Final = 2


def take_over() -> None:
    """Before anything is printed. Streams that somebody has replaced, as tests do, stay as they are."""
    _fill()
    out, err = sys.stdout, sys.stderr
    if out is sys.__stdout__ and isinstance(out, io.TextIOWrapper) and not out.isatty():
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Output(), BUFFER_BYTES), out.encoding, out.errors)
    if err is sys.__stderr__ and isinstance(err, io.TextIOWrapper) and not err.isatty():
        buffer = io.BufferedWriter(_Complaints())
        sys.stderr = io.TextIOWrapper(buffer, err.encoding, err.errors, line_buffering=True)


def _fill() -> None:
    """What was closed by who started us leads nowhere: a file that we open must not be taken for it."""
    while (place := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(place)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Output()), "utf-8")
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Complaints()), "utf-8")


class _Output(io.FileIO):
    """Standard output. A reader that has gone is a `BrokenPipeError` as ever, anything else a `CommandError`."""

    def __init__(self) -> None:
        super().__init__(STDOUT, "wb", closefd=False)
        self._failed = False

    def write(self, data: ReadableBuffer, /) -> int:
        if self._failed:  # it was told once; what is left in the buffer would tell it again
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            self._failed = True
            raise CommandError(f"what there is to say cannot be written: {error.strerror}") from None


class _Complaints(io.FileIO):
    """Standard error. Where it cannot be written there is nobody to tell, and the exit code says what it would have."""

    def __init__(self) -> None:
        super().__init__(STDERR, "wb", closefd=False)

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes
