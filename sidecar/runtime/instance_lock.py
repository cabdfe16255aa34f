"""The data directory belongs to one running instance: its lock, and the note inside that says who has it.

The kernel holds the lock, so a crash lets go of it at once and no stale file keeps anyone out. `lock` itself is never
removed: two processes could otherwise lock two files of one name. Inside is a line of JSON,
`{"pid", "admin", "proxy", "layout"}`: who is running, where it listens, and what layout the directory has.

An instance takes the lock alone; with several workers it then shares it (`share`), and each worker joins. So a new
instance waits until the last worker of an old one is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from sidecar.storage.files import PRIVATE, explain, make_directory, narrow, try_lock

LAYOUT: Final = 1  # of the data directory; raised when an older program could no longer read it
NAME: Final = "lock"
# A command that looks whether an instance is running holds the lock for microseconds; a start must not fail on that.
GRACE_S: Final = 0.5
POLL_S: Final = 0.02
NOTE_BYTES: Final = 16_384
PROBLEMS_MAX: Final = 10  # of a reload, in the note; the log has them all
PROBLEM_CHARS_MAX: Final = 300


class LockError(Exception):
    """The data directory cannot be used. The text says what to do about it."""


class InUseError(LockError):
    """Another instance is running on it."""

    def __init__(self, text: str, pid: int | None) -> None:
        super().__init__(text)
        self.pid = pid


class NotWritableError(LockError):
    """It cannot be made or written."""


class NewerError(LockError):
    """A newer program has made it into something that this one does not know."""


@dataclass(frozen=True, slots=True)
class Reload:
    """What became of the last time that settings were read anew. `number`: of those since the start. `waiting`: names
    of settings that need a restart."""

    number: int
    problems: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """What the holder wrote into the lock. The addresses are None until the ports are open."""

    pid: int | None = None
    admin: str | None = None  # http://host:port, or unix:/path
    proxy: str | None = None
    layout: int = LAYOUT
    reload: Reload | None = None  # None: there was none since the start


class DataLock:
    """The lock of one data directory, held until `release` or the end of the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def take(cls, data_dir: Path, *, wait_s: float = 0.0) -> DataLock:
        """Become its one instance, making the directory if need be.

        `wait_s` is for the workers of an old instance that is gone itself: they finish their calls. An instance that
        lives is not waited for.
        """
        lock = cls._open(data_dir)
        try:
            lock._lock(GRACE_S, orphans_s=wait_s)
            lock._check_layout()
            lock.announce()
        except BaseException:
            lock.release()
            raise
        return lock

    @classmethod
    def join(cls, data_dir: Path) -> DataLock:
        """Hold it together with the instance that called us into being (a worker does)."""
        lock = cls._open(data_dir)
        try:
            lock._lock(GRACE_S, shared=True)
        except BaseException:
            lock.release()
            raise
        return lock

    def share(self) -> None:
        """Let workers join from now on. Nobody can take it alone until the last of all has gone."""
        self._lock(GRACE_S, shared=True)

    def announce(self, *, admin: str | None = None, proxy: str | None = None, reload: Reload | None = None) -> None:
        """Say where we listen. A full disk must not keep the service from starting: then nothing is said."""
        note: dict[str, Any] = {"pid": os.getpid(), "admin": admin, "proxy": proxy, "layout": LAYOUT}
        if reload is not None:
            note["reload"] = _fitting(reload)
        line = json.dumps(note).encode() + b"\n"
        with contextlib.suppress(OSError):
            # Overwritten before it is cut: a reader sees the old note or the new one with a rest behind, never none.
            os.pwrite(self._fd, line, 0)
            os.ftruncate(self._fd, len(line))

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> DataLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<DataLock {self.path}: {'held' if self._fd >= 0 else 'released'}>"

    @classmethod
    def _open(cls, data_dir: Path) -> DataLock:
        path = data_dir / NAME
        try:
            make_directory(data_dir)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
            narrow(path)
            return cls(path, fd)
        except OSError as error:
            raise NotWritableError(explain(error, f"the data directory {data_dir} cannot be used", path)) from None

    def _lock(self, wait_s: float, *, shared: bool = False, orphans_s: float = 0.0) -> None:
        began = time.monotonic()
        while True:
            try:
                if try_lock(self._fd, shared=shared):
                    return
            except OSError as error:
                raise NotWritableError(
                    f"{self.path} cannot be locked: {error.strerror}; set SIDECAR_DATA_DIR to a local disk"
                ) from None
            waited_s = time.monotonic() - began
            if waited_s >= wait_s and (waited_s >= orphans_s or _lives(_read_note(self.path).pid)):
                raise _in_use(self.path.parent)
            time.sleep(POLL_S)

    def _check_layout(self) -> None:
        layout = _read_note(self.path).layout
        if layout > LAYOUT:
            raise NewerError(
                f"the data directory {self.path.parent} was made by a newer version (layout {layout}, "
                f"this one knows {LAYOUT}): start that version again, or set SIDECAR_DATA_DIR to another directory"
            )


def _fitting(reload: Reload) -> dict[str, Any]:
    """What there is room for in the note: the first problems, cut."""
    return {
        "number": reload.number,
        "problems": [text[:PROBLEM_CHARS_MAX] for text in reload.problems[:PROBLEMS_MAX]],
        "waiting": list(reload.waiting[:PROBLEMS_MAX]),
    }


def running(data_dir: Path) -> Note | None:
    """Who is running on it now; None where nobody is (or nothing is there). Changes nothing."""
    path = data_dir / NAME
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if try_lock(fd) else _read_note(path)
    except OSError:
        return _read_note(path)
    finally:
        os.close(fd)


def _lives(pid: int | None) -> bool:
    """Whether this process is there. In another container it cannot be seen, and counts as gone."""
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _in_use(data_dir: Path) -> InUseError:
    pid = _read_note(data_dir / NAME).pid
    who = "another instance" if pid is None else f"another instance (process {pid})"
    return InUseError(
        f"the data directory {data_dir} is in use by {who}: stop it, or set SIDECAR_DATA_DIR to another directory", pid
    )


def _read_note(path: Path) -> Note:
    """What stands in the lock, as far as it can be read; a torn or empty note says nothing."""
    try:
        row = json.loads(path.read_bytes()[:NOTE_BYTES].split(b"\n", 1)[0])
        pid, layout = row.get("pid"), row.get("layout")
        admin, proxy = (row.get(name) for name in ("admin", "proxy"))
        told = row.get("reload")
        reload = None
        if isinstance(told, dict):
            reload = Reload(int(told["number"]), tuple(map(str, told["problems"])), tuple(map(str, told["waiting"])))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return Note()
    return Note(
        pid if isinstance(pid, int) else None,
        admin if isinstance(admin, str) else None,
        proxy if isinstance(proxy, str) else None,
        layout if isinstance(layout, int) else LAYOUT,
        reload,
    )
