"""What a slot holds when it is opened again: totals, open intents, and files that need care.

Only the newest chunk that was begun is read, because every chunk begins by restating what is open and all
totals; of the others the first hundred bytes. So a million pending records cost no time and no memory here.
A file that is not what was written is replaced by what can be read of it, and the service starts.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.spool import files, last_words, salvage
from sidecar.spool.chunk import FORMAT, PAGE_BYTES, Chunk, check_header, meta, translate
from sidecar.spool.groups import INTENT_COLUMNS, IntentGroup, Opening, lost_json, read_lost
from sidecar.spool.intents import intent_id
from sidecar.spool.plan import Position
from sidecar.spool.words import SpoolDamaged, SpoolError, SpoolFull

log = logging.getLogger("sidecar.spool")

# After a loss of unknown size, numbering goes on beyond anything that may have been given: a chunk of 64 MiB holds
# some 250,000 of the smallest records. A number given twice would be passed over by delivery.
NUMBERS_SKIPPED: Final = 1_000_000
# A file this small, with a log this small, is a chunk whose making was interrupted: nothing was ever in it.
_UNMADE_LOG_BYTES: Final = 64 << 10
_KEYS: Final = (("record_group", "first_seq"), ("intent_group", "commit_number"))


@dataclass(slots=True)
class Recovered:
    """A slot, ready to be continued in a new chunk."""

    position: Position
    to_seal: list[Chunk] = field(default_factory=list)  # left by a crash; put away off the writer thread
    set_aside: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)  # chunks without records: may go once a new one has begun
    noted: bool = False  # the last life left word of what it could not write: to be forgotten once that is committed
    stopped: int = 0  # how many calls that adds to what is lost
    clean: bool = True  # nothing is open and nothing is to be mended: the slot can stay as it is


def recover(root: Path, instance: str, *, remembered_seq: int = 0) -> Recovered:
    """Look at a slot whose lock is held. `remembered_seq`: the greatest number that delivery knows of it."""
    slot = files.slot_dir(root, instance)
    salvage.finish_swaps(root, instance, slot)
    files.remove_strays(slot)
    found = Recovered(Position(instance))
    numbers = files.chunk_numbers(slot)
    found.position.chunk_number = max(numbers, default=0)
    newest: int | None = None
    unsure = False
    for number in reversed(numbers):
        begun, damaged = _care_for(root, instance, slot, number, found)
        unsure = unsure or (damaged and newest is None)
        if begun and newest is None:
            newest = number
    while newest is not None:
        try:
            _read_newest(files.chunk_path(slot, newest), found)
            break
        except SpoolDamaged as error:
            # Its first page is whole and one further in is not: only reading all of it tells.
            log.error("a chunk is damaged: %s", error)
            newest = _salvage_newest(root, instance, slot, newest, found)
            unsure = True
    if unsure:
        # A commit of which only parts could be read had counted its calls as a whole: those that are gone without a
        # trace are in no term, as after any crash.
        at = found.position
        at.admitted = at.recorded + len(at.open_intents or ()) + sum(read_lost(at.lost).values())
    _skip_numbers(found, remembered_seq, unsure)
    note = last_words.read(slot)
    if note is not None:
        at = found.position
        at.admitted, lost = last_words.add(
            note,
            admitted=at.admitted,
            recorded=at.recorded,
            open_calls=len(at.open_intents or ()),
            lost=read_lost(at.lost),
        )
        found.stopped = sum(lost.values()) - sum(read_lost(at.lost).values())
        at.lost = lost_json(lost)
    found.noted = note is not None
    found.clean = not (found.to_seal or found.set_aside or found.position.open_intents or found.noted)
    return found


def _care_for(root: Path, instance: str, slot: Path, number: int, found: Recovered) -> tuple[bool, bool]:
    """Bring one file into order. Answers whether it is a chunk that was begun, and whether it was damaged."""
    path = files.chunk_path(slot, number)
    try:
        return _inspect(path, number, found), False
    except SpoolDamaged as error:
        log.error("a chunk is damaged: %s", error)
    done = salvage.replace_chunk(root, instance, path, number)
    found.set_aside.append(done.set_aside)
    return path.exists() and _begun(path), True


def _salvage_newest(root: Path, instance: str, slot: Path, number: int, found: Recovered) -> int | None:
    """Replace it by what can be read; the newest chunk that was begun, which may be the one before it then."""
    path = files.chunk_path(slot, number)
    for chunk in [chunk for chunk in found.to_seal if chunk.path == path]:
        chunk.close()
        found.to_seal.remove(chunk)
    found.empty = [one for one in found.empty if one != path]
    found.set_aside.append(salvage.replace_chunk(root, instance, path, number).set_aside)
    for older in reversed([one for one in files.chunk_numbers(slot) if one <= number]):
        if _begun(files.chunk_path(slot, older)):
            return older
    return None


def _inspect(path: Path, number: int, found: Recovered) -> bool:
    """Whether the chunk was begun. Raises `SpoolDamaged`."""
    log_bytes = files.size_or_zero(files.wal_path(path))
    if files.size_or_zero(path) <= PAGE_BYTES and log_bytes <= _UNMADE_LOG_BYTES:
        files.remove_chunk(path)
        return False
    # With a log beside it only SQLite opens the file: closing it would let go of every lock this process has on it.
    if log_bytes == 0 and check_header(path) == FORMAT:
        with reading(path) as connection:
            if meta(connection, "sealed") is None:
                raise SpoolDamaged(f"{path} has lost its write-ahead log")
            if meta(connection, "first_seq") is None:
                raise SpoolDamaged(f"{path} is sealed but was never begun")
            if connection.execute("SELECT count(*) FROM (SELECT 1 FROM record_group LIMIT 1)").fetchone()[0] == 0:
                found.empty.append(path)
        return True
    return _reopen(path, number, found)


def _reopen(path: Path, number: int, found: Recovered) -> bool:
    """A chunk that a crash left with its log, or one of an older format."""
    try:
        chunk = Chunk.reopen(path, number)
    except SpoolFull:
        raise
    except SpoolError as error:
        if isinstance(error, SpoolDamaged) or "cannot be written" not in str(error):
            raise SpoolDamaged(str(error)) from error
        raise
    try:
        sealed = meta(chunk.connection, "sealed") is not None
        if not sealed and salvage.log_is_damaged(path, _visible_commits(chunk.connection)):
            raise SpoolDamaged(f"{path} has a write-ahead log that breaks off before its end")
        chunk.migrate()
        if chunk.opening is None:  # made ahead and never used
            chunk.close()
            files.remove_chunk(path)
            return False
    except (SpoolDamaged, sqlite3.Error) as error:
        chunk.close()
        raise SpoolDamaged(str(error)) from error
    found.to_seal.append(chunk)
    return True


def _visible_commits(connection: sqlite3.Connection) -> int:
    """The transactions that SQLite shows; each has a number of its own."""
    numbers: list[int] = []
    for table, key in _KEYS:
        for way in ("ASC", "DESC"):  # both keys grow with the commits
            row = connection.execute(f"SELECT commit_number FROM {table} ORDER BY {key} {way} LIMIT 1").fetchone()
            if row is not None:
                numbers.append(row[0])
    return max(numbers) - min(numbers) + 1 if numbers else 0


def _begun(path: Path) -> bool:
    with reading(path) as connection:
        return meta(connection, "first_seq") is not None


def _read_newest(path: Path, found: Recovered) -> None:
    """Totals and open intents, as the last commit left them."""
    at = found.position
    with reading(path) as connection:
        opening = Opening(int(meta(connection, "first_seq")), int(meta(connection, "base_recorded")))
        at.last_seq = last_seq(connection, opening)
        number, at.admitted, at.recorded, at.lost = last_totals(connection)
        at.commit_number = number
        at.open_intents = open_intents(connection)


def _skip_numbers(found: Recovered, remembered_seq: int, unsure: bool) -> None:
    at = found.position
    if remembered_seq > at.last_seq:
        # Delivered, and no longer here: they were recorded. Readers see the hole as `missing`.
        gone = remembered_seq - at.last_seq
        log.error(
            "the spool lost records that delivery had seen", extra={"facts": {"instance": at.instance, "records": gone}}
        )
        at.last_seq = remembered_seq
        at.admitted += gone
        at.recorded += gone
        unsure = True
    if unsure:
        at.last_seq += NUMBERS_SKIPPED


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection for a moment. `sqlite3` errors leave as the spool's."""
    connection = open_read_only(path)
    try:
        yield connection
    except sqlite3.Error as error:
        raise translate(error, path) from error
    finally:
        connection.close()


def open_read_only(path: Path) -> sqlite3.Connection:
    """Read-only; without a log beside it the file cannot change any more and needs no lock at all."""
    settled = files.size_or_zero(files.wal_path(path)) == 0
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if settled else ''}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA cache_size = -512")  # KiB: readers go through once
        return connection
    except sqlite3.Error as error:
        raise translate(error, path) from error


def last_seq(connection: sqlite3.Connection, opening: Opening) -> int:
    row = connection.execute("SELECT last_seq FROM record_group ORDER BY first_seq DESC LIMIT 1").fetchone()
    return int(row[0]) if row else max(opening.first_seq - 1, 0)


def newest_commit_ns(connection: sqlite3.Connection) -> int:
    """When the last commit of a chunk was, by the wall clock."""
    rows = [
        connection.execute(f"SELECT committed_ns FROM {table} ORDER BY {key} DESC LIMIT 1").fetchone()
        for table, key in _KEYS
    ]
    return max((int(row[0]) for row in rows if row), default=0)


def last_totals(connection: sqlite3.Connection) -> tuple[int, int, int, str]:
    """Commit number, admitted, recorded and lost, of the newest commit."""
    columns = "commit_number, admitted, recorded, lost"
    rows = [
        connection.execute(f"SELECT {columns} FROM record_group ORDER BY first_seq DESC LIMIT 1").fetchone(),
        connection.execute(f"SELECT {columns} FROM intent_group ORDER BY commit_number DESC LIMIT 1").fetchone(),
    ]
    number, admitted, recorded, lost = max((row for row in rows if row), default=(0, 0, 0, "{}"))
    return number, admitted, recorded, lost_json(read_lost(lost))


def open_intents(connection: sqlite3.Connection) -> dict[str, bytes]:
    """Intents without a completion, by id. Bounded by the calls that were open, not by the records pending."""
    found: dict[str, bytes] = {}
    for row in connection.execute(f"SELECT {INTENT_COLUMNS} FROM intent_group ORDER BY commit_number"):
        try:
            lines = IntentGroup.read(row).lines
            found.update((intent_id(line), line) for line in lines)
        except (SpoolDamaged, ValueError) as error:
            log.error("intents are damaged and passed over: %s", error)
    for table in ("record_group", "intent_group"):
        for (closes,) in connection.execute(f"SELECT closes FROM {table} WHERE closes <> ''"):
            for id_ in closes.split("\n"):
                found.pop(id_, None)
    return found
