"""What the receiver took, and what its vendors remember, in memory and, when asked, in a journal.

The journal has one JSON line per call that changed anything: what it took and what was remembered, so that a killed
receiver never knows one without the other. It is written before the answer leaves, in one `write`; that survives the
death of the process, which is all that a stand-in must. A torn last line is the trace of a call that got no answer
and is cut off at start. What a journal holds is never a credential: `server` scrubs it first.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from sidecar.receiver.contract import Unit

TAKEN_MAX: Final = 5_000_000
"""Rows held at once: ten minutes at the 8,000 requests/s that one core manages. Beyond it the receiver refuses."""


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

    def __init__(self, path: Path | None = None) -> None:
        self.taken: list[Taken] = []
        self._kept: dict[str, tuple[Any, float]] = {}
        self._new: dict[str, tuple[Any, float]] = {}
        self._path = path
        self._file: BinaryIO | None = None

    def __repr__(self) -> str:
        return f"<Store: {len(self.taken)} taken, {len(self._kept)} kept, {self._path or 'in memory'}>"

    @property
    def is_full(self) -> bool:
        return len(self.taken) >= TAKEN_MAX

    def memory(self, name: str) -> VendorMemory:
        return VendorMemory(name, self._kept, self._new)

    def commit(self, backend: str, path: str, units: Sequence[Unit], at: str) -> None:
        """Make the units, and what the vendor kept during the call, part of the store; all or nothing."""
        rows = [Taken(backend, path, unit.key, unit.body, str(unit.verdict), at) for unit in units]
        if self._file is not None and (rows or self._new):
            self._write(self._file, orjson.dumps({"taken": rows, "kept": self._new}, option=orjson.OPT_APPEND_NEWLINE))
        self.taken.extend(rows)
        self._kept.update(self._new)
        self._new.clear()

    def discard(self) -> None:
        """Drop what was kept since the last commit: its call came to nothing."""
        self._new.clear()

    def forget(self) -> None:
        """Back to the first day: rows and memories go."""
        if self._file is not None:
            self._file.truncate(0)
        self.taken.clear()
        self._kept.clear()
        self._new.clear()

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
        self.taken.clear()
        self._kept.clear()
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
                rows = [Taken(**row) for row in step["taken"]]
                kept = {key: (value, at_s) for key, (value, at_s) in step["kept"].items()}
            except (ValueError, TypeError, KeyError, AttributeError):
                raise StoreError(
                    f"--store {self._path} is no receiver's journal (line {number}): name another file, or remove it"
                ) from None
            self.taken.extend(rows)
            self._kept.update(kept)
        return end

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
