"""Housekeeping of chunks, on a thread of its own so that no commit waits for it.

Makes the next chunk ahead, puts full ones away (the log into the main file: a second of work that the writer must not
feel), replaces those that failed. A chunk belongs to the writer until it is handed in here, and to this thread from
then on, so its connection is never used by two at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from sidecar.spool import files
from sidecar.spool.chunk import Chunk
from sidecar.spool.salvage import replace_chunk
from sidecar.spool.words import SpoolError, SpoolFull

log = logging.getLogger("sidecar.spool")

_RETRY_S: Final = 0.02  # between tries to put chunks away while closing


class CreateChunk(Protocol):
    def __call__(self, path: Path, number: int, instance: str) -> Chunk: ...


class House:
    """The chunks of one slot that nobody writes."""

    def __init__(self, root: Path, instance: str, create: CreateChunk, disk_is_full: Callable[[], bool]) -> None:
        self._root = root
        self._instance = instance
        self._create = create
        self._disk_is_full = disk_is_full
        self._ahead: Future[Chunk] | None = None
        self._unsealed: list[Chunk] = []  # only the thread touches it
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool-house")

    # For the writer

    @property
    def has_ahead(self) -> bool:
        return self._ahead is not None

    def order(self, number: int) -> None:
        """Have the next chunk made."""
        self._ahead = self._thread.submit(self.make, number)

    def take(self) -> Chunk | None:
        """The chunk that was ordered, if it was and could be made."""
        ahead, self._ahead = self._ahead, None
        try:
            return None if ahead is None else ahead.result()
        except SpoolError as error:
            log.warning("the next chunk could not be made ahead: %s", error)
            return None

    def let_go(self) -> None:
        """Forget the chunk that was ordered: its file is gone, or will be."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._thread.submit(self._discard, ahead)

    def make(self, number: int) -> Chunk:
        """A new chunk, at once. Raises `SpoolError`."""
        return self._create(
            files.chunk_path(files.slot_dir(self._root, self._instance), number), number, self._instance
        )

    def put_away(self, chunk: Chunk) -> None:
        """Nothing more will be written to it: seal it; one that was never begun is removed."""
        if chunk.opening is None:
            self._thread.submit(self._drop, chunk)
        else:
            self._thread.submit(self._seal, chunk)

    def replace(self, chunk: Chunk, upto_seq: int) -> None:
        """It failed: copy out what was confirmed, which is nothing where it failed at its first commit."""
        if chunk.opening is None:
            self._thread.submit(self._drop, chunk)
        else:
            self._thread.submit(self._replace, chunk, upto_seq)

    def retry(self) -> None:
        """There is room again: put away what had to wait."""
        self._thread.submit(self._seal_all)

    def stop(self, deadline_s: float) -> None:
        """Finish what was ordered, as far as the disk lets us until then (monotonic time)."""
        self.let_go()
        self._thread.submit(self._seal_rest, deadline_s)
        self._thread.shutdown(wait=True)

    def leave(self) -> None:
        """Do not wait: a file that is still being written cannot be touched."""
        self._thread.shutdown(wait=False)

    def quiet(self) -> None:
        """Wait until all that was ordered so far is done."""
        self._thread.submit(int).result()

    # On the thread

    def _seal(self, chunk: Chunk) -> None:
        self._unsealed.append(chunk)
        self._seal_all()

    def _seal_all(self) -> None:
        if self._disk_is_full():
            return  # the room that is left is delivery's; a chunk's log holds everything until then
        waiting, self._unsealed = self._unsealed, []
        for chunk in waiting:
            try:
                chunk.seal()
            except SpoolFull:
                self._unsealed.append(chunk)  # tried again with the next one, or when there is room
            except SpoolError as error:
                log.error("a full chunk could not be put away: %s", error)
                self._replace(chunk, None)

    def _seal_rest(self, deadline_s: float) -> None:
        """At the end: what still cannot be put away keeps its log, and the next start deals with it."""
        self._seal_all()
        while self._unsealed and time.monotonic() < deadline_s:
            time.sleep(_RETRY_S)
            self._seal_all()
        for chunk in self._unsealed:
            chunk.close()

    def _replace(self, chunk: Chunk, upto_seq: int | None) -> None:
        try:
            chunk.close()
            replace_chunk(self._root, self._instance, chunk.path, chunk.number, upto_seq=upto_seq)
        except (SpoolError, OSError) as error:
            # Readers go on reading it where it is; the next start tries again.
            log.error("what a failed chunk holds could not be copied out yet: %s", error)

    def _drop(self, chunk: Chunk) -> None:
        try:
            chunk.close()
            files.remove_chunk(chunk.path)
        except OSError as error:
            log.warning("an unused chunk could not be removed: %s", error)

    def _discard(self, ahead: Future[Chunk]) -> None:
        try:
            self._drop(ahead.result())
        except SpoolError:
            return
