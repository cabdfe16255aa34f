"""`delivery.db` as `storage.sqlite` opens it: its tables are in `schema.sql`, its words and errors are here.

One connection writes; all others are read-only. Every step is one transaction.
"""

from __future__ import annotations

import sqlite3
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from sidecar.delivery.rows import StateBusy, StateError, StateFull
from sidecar.storage.files import Trouble
from sidecar.storage.sqlite import Schema, errors_told, open_db, transaction

__all__ = ["SCHEMA", "open_reader", "open_writer", "told", "transaction"]


def _error(text: str, found: Trouble | None) -> StateError:
    kind = {Trouble.FULL: StateFull, Trouble.BUSY: StateBusy}.get(found, StateError) if found else StateError
    return kind(text, found)


SCHEMA: Final = Schema(
    name="delivery",
    version=2,
    tables=Path(__file__).with_name("schema.sql").read_text(),
    when_damaged="move it aside and start again; what may have been delivered before is then parked unless the backend "
    "recognises repeats",
    when_full="make some, delivery goes on by itself",
    error=_error,
)


def open_writer(path: Path) -> tuple[sqlite3.Connection, bool]:
    """The one writing connection, and whether the file was made by this call."""
    created = not path.exists() or path.stat().st_size == 0
    try:
        return open_db(path, schema=SCHEMA), created
    except StateFull as error:
        if created:  # nothing runs yet that could go on by itself
            raise StateFull(
                f"{path} cannot be made: no room on its disk; free some, or set SIDECAR_DATA_DIR to another disk"
            ) from error
        raise


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, for counting and listing."""
    return open_db(path, schema=SCHEMA, read_only=True, lasting=True)


def told(path: Path) -> AbstractContextManager[None]:
    """SQLite's errors in our words; nobody else names them."""
    return errors_told(path, SCHEMA)
