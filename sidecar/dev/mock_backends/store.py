"""What the receiver took, and what its vendors remember, in memory and, when asked, in a journal.

The journal has one JSON line per call that changed anything: what it took and what was remembered, so that a killed
receiver never knows one without the other. It is written before the answer leaves, in one `write`; that survives the
death of the process, which is all that a stand-in must. A torn last line is the trace of a call that got no answer
and is cut off at start. What a journal holds is never a credential: `server` scrubs it first.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from sidecar.dev.mock_backends.contract import Unit

TAKEN_BYTES_MAX: Final = 2 * 2**30
"""Of rows held at once, some four million `/meter` payloads. Beyond it the receiver refuses."""


class StoreError(Exception):
    """The journal cannot be read or written; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One row of `/_received`."""

    backend: str
    path: str
    key: str | None
    body: Any
    verdict: str
    at: str


class Store:
    """Rows and memories of all vendors. Single-threaded; every call is one step of the event loop."""

    def __init__(self, path: Path | None = None, *, taken_bytes_max: int = TAKEN_BYTES_MAX) -> None:
        # As lines, not as objects: millions of dicts would keep the garbage collector busier than the calls do.
        self._rows: list[tuple[str, bytes]] = []
        self._size_bytes = 0
        self._taken_bytes_max = taken_bytes_max
        self._kept: dict[str, tuple[Any, float]] = {}
        self._new: dict[str, tuple[Any, float]] = {}
        self._path = path
        self._file: BinaryIO | None = None

    def __repr__(self) -> str:
        return f"<Store: {len(self)} taken, {len(self._kept)} kept, {self._path or 'in memory'}>"

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def is_full(self) -> bool:
        return self._size_bytes >= self._taken_bytes_max

    def lines(self, backend: str | None = None) -> Iterator[bytes]:
        """The rows as JSON, each with its line end, oldest first."""
        return (line for name, line in self._rows if backend in (None, name))

    def taken(self, backend: str | None = None) -> list[Taken]:
        """The rows as objects."""
        return [Taken(**orjson.loads(line)) for line in self.lines(backend)]

    def memory(self, name: str) -> VendorMemory:
        return VendorMemory(name, self._kept, self._new)

    def commit(self, backend: str, path: str, units: Sequence[Unit], at: str) -> None:
        """Make the units, and what the vendor kept during the call, part of the store; all or nothing."""
        rows = [orjson.dumps(Taken(backend, path, unit.key, unit.body, str(unit.verdict), at)) for unit in units]
        if self._file is not None and (rows or self._new):
            step = {"taken": [orjson.Fragment(row) for row in rows], "kept": self._new}
            self._write(self._file, orjson.dumps(step, option=orjson.OPT_APPEND_NEWLINE))
        for row in rows:
            self._enter(backend, row)
        self._kept.update(self._new)
        self._new.clear()

    def discard(self) -> None:
        """Drop what was kept since the last commit: its call came to nothing."""
        self._new.clear()

    def forget(self) -> None:
        """Back to the first day: rows and memories go."""
        if self._file is not None:
            self._file.truncate(0)
        self._clear()

    def open(self) -> None:
        """Open the journal, if there is one, and take in what it has. Raises `StoreError`."""
        if self._path is None:
            return
        try:
            self._file = builtins.open(self._path, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise StoreError(
                f"--store {self._path} cannot be opened ({error.strerror}): name a file that may be written"
            ) from None
        self._clear()
        try:
            self._file.seek(0)
            self._file.truncate(self._read(self._file.read() or b""))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, journal: bytes) -> int:
        """Take the whole lines in; the number of bytes that they are."""
        end = journal.rfind(b"\n") + 1
        for number, line in enumerate(journal[:end].splitlines(), start=1):
            try:
                step = orjson.loads(line)
                rows = [(row["backend"], orjson.dumps(Taken(**row))) for row in step["taken"]]
                kept = {key: (value, at_s) for key, (value, at_s) in step["kept"].items()}
            except (ValueError, TypeError, KeyError, AttributeError):
                raise StoreError(
                    f"--store {self._path} is no receiver's journal (line {number}): name another file, or remove it"
                ) from None
            for backend, row in rows:
                self._enter(backend, row)
            self._kept.update(kept)
        return end

    def _enter(self, backend: str, row: bytes) -> None:
        self._rows.append((backend, row + b"\n"))
        self._size_bytes += len(row) + 1

    def _clear(self) -> None:
        self._rows.clear()
        self._size_bytes = 0
        self._kept.clear()
        self._new.clear()

    def _write(self, file: BinaryIO, line: bytes) -> None:
        try:
            written = os.write(file.fileno(), line)
        except OSError as error:
            self._new.clear()
            raise StoreError(f"--store {self._path} cannot be written: {error.strerror}") from None
        if written != len(line):
            file.truncate(file.seek(0, os.SEEK_END) - written)
            self._new.clear()
            raise StoreError(f"--store {self._path} is full: make room on its disk")


class VendorMemory:
    """One vendor's part of the store. What is kept counts at once and is stored with the call's units."""

    def __init__(self, name: str, kept: dict[str, tuple[Any, float]], new: dict[str, tuple[Any, float]]) -> None:
        self._name = name
        self._kept = kept
        self._new = new

    def recall(self, key: str, now_s: float, window_s: float | None = None) -> Any:
        name = f"{self._name}\0{key}"
        found = self._new.get(name) or self._kept.get(name)
        if found is None or (window_s is not None and now_s - found[1] >= window_s):
            return None
        return found[0]

    def keep(self, key: str, value: Any, now_s: float) -> None:
        self._new[f"{self._name}\0{key}"] = (value, now_s)
