"""A power cut: what a process did to its files is listed, and a disk is made on which only the synced part is sure.

`power_cut.c` makes the list. `Disk` plays it and keeps, for each file, what a sync has promised and what has only been
written since; names count as promised once their directory was synced. `after_cut` then draws one of the states in
which a disk may wake up: every sector of 512 bytes that was written and not synced is there or not, lengths and names
may be old or new. `keep` 0 is the harshest disk, which forgets everything that it may forget.

A line `a` in the list is an acknowledgement: what was said to a client from there on may be relied on.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

SECTOR_BYTES = 512
SOURCE = Path(__file__).with_name("power_cut.c")
SHARED_MEMORY = "-shm"  # SQLite's index of a log: lives in memory only and is made anew


def build(directory: Path) -> Path | None:
    """The library, or None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = directory / "power_cut.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    return library


def preload(library: Path, root: Path, log: Path) -> dict[str, str]:
    """The environment under which a process is watched."""
    return {"LD_PRELOAD": str(library), "POWER_CUT_ROOT": str(root), "POWER_CUT_LOG": str(log)}


@dataclass(frozen=True, slots=True)
class Step:
    """One happening. `other`: the second path of a rename or link."""

    letter: str
    path: str
    at: int = 0
    data: bytes = b""
    other: str = ""


def acknowledge(log: Path, text: str) -> None:
    """Add to the list that somebody was told so."""
    line = f"a\t{text}\t0\t0\n".encode()
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, line)
    finally:
        os.close(fd)


def read_steps(log: Path) -> list[Step]:
    """The list; a last line that a kill has torn is no happening."""
    return list(_steps(log.read_bytes()))


def _steps(text: bytes) -> Iterator[Step]:
    at, source = 0, ""
    while (end := text.find(b"\n", at)) >= 0:
        letter, path, number, size = text[at:end].decode().split("\t")
        at = end + 1
        if letter == "w":
            data = text[at : at + int(size)]
            at += int(size)
            if len(data) < int(size):
                return
            yield Step(letter, path, int(number), data)
        elif letter == "f":
            source = path
        elif letter in "rl":
            yield Step(letter, source, other=path)
        else:
            yield Step(letter, path, int(number))


@dataclass(slots=True)
class Inode:
    """A file's bytes: promised, and since."""

    sure: bytearray = field(default_factory=bytearray)
    since: list[Step] = field(default_factory=list)

    def sync(self) -> None:
        for step in self.since:
            _apply(self.sure, step)
        self.since.clear()

    def woken(self, chance: random.Random, keep: float) -> bytes:
        data = bytearray(self.sure)
        for step in self.since:
            if step.letter == "t":
                if chance.random() < keep:
                    _apply(data, step)
                continue
            for start, piece in _sectors(step):
                if chance.random() < keep:
                    _apply(data, Step("w", "", start, piece))
        return bytes(data)


def _apply(data: bytearray, step: Step) -> None:
    end = step.at + len(step.data)
    if len(data) < end:
        data.extend(bytes(end - len(data)))
    if step.letter == "t":
        del data[step.at :]
    else:
        data[step.at : end] = step.data


def _sectors(step: Step) -> Iterator[tuple[int, bytes]]:
    start, end = step.at, step.at + len(step.data)
    while start < end:
        stop = min(end, (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
        yield start, step.data[start - step.at : stop - step.at]
        start = stop


DIRECTORY = Inode()  # stands for every directory


@dataclass(slots=True)
class Disk:
    """The directory `root`, as far as anything was promised about it."""

    root: str
    names: dict[str, Inode] = field(default_factory=dict)  # as the process sees them
    sure: dict[str, Inode] = field(default_factory=dict)  # that will be there after a cut
    since: dict[str, list[tuple[str, Inode | None]]] = field(default_factory=dict)  # by directory, in order

    def play(self, step: Step) -> None:
        match step.letter:
            case "c":
                self._name(step.path, Inode())
            case "m":
                self._name(step.path, DIRECTORY)
            case "u":
                self._name(step.path, None)
            case "l":
                self._name(step.other, self.names[step.path])
            case "r":
                inode = self.names[step.path]
                self._name(step.other, inode)
                self._name(step.path, None)
                if inode is DIRECTORY:
                    raise NotImplementedError("a directory was renamed: teach the model")
            case "w" | "t":
                self.names[step.path].since.append(step)
            case "s":
                self._sync(step.path)
            case "a":
                pass
            case _:
                raise ValueError(f"{step.letter!r} is no step")

    def _name(self, path: str, inode: Inode | None) -> None:
        if inode is None:
            self.names.pop(path, None)
        else:
            self.names[path] = inode
        self.since.setdefault(str(PurePosixPath(path).parent), []).append((path, inode))

    def _sync(self, path: str) -> None:
        inode = self.names.get(path)
        if inode is not None and inode is not DIRECTORY:
            inode.sync()
            return
        for name, entry in self.since.pop(path, ()):
            _enter(self.sure, name, entry)

    def after_cut(self, target: Path, chance: random.Random, keep: float) -> None:
        """Write one of the possible states below `target`. `keep`: how much of what was not promised is there."""
        names = dict(self.sure)
        for pending in self.since.values():
            kept = round(chance.random() * len(pending)) if 0 < keep < 1 else round(keep * len(pending))
            for name, inode in pending[:kept]:
                _enter(names, name, inode)
        target.mkdir(parents=True)
        for name in sorted(names):
            path = target / PurePosixPath(name).relative_to(self.root)
            if names[name] is DIRECTORY and path.parent.is_dir():
                path.mkdir()
        for name, inode in names.items():
            path = target / PurePosixPath(name).relative_to(self.root)
            if inode is not DIRECTORY and path.parent.is_dir() and not name.endswith(SHARED_MEMORY):
                path.write_bytes(inode.woken(chance, keep))


def _enter(names: dict[str, Inode], name: str, inode: Inode | None) -> None:
    if inode is None:
        names.pop(name, None)
    else:
        names[name] = inode


def taken_over(disk: Disk, root: Path) -> None:
    """Begin with a directory that is there already and on disk for sure."""
    for path in sorted(root.rglob("*")):
        name = str(path)
        disk.names[name] = disk.sure[name] = DIRECTORY if path.is_dir() else Inode(bytearray(path.read_bytes()))
