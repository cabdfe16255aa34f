"""The durable log of records. `Spool` writes one slot, `SpoolReader` reads all of them.

`words` has what is passed in and out, `chunk` one file, `writer` the thread, `recovery` and `salvage` what happens
after a crash and after damage, `retention` what goes and when, `verify` the recount.
"""

from sidecar.spool.files import FileLock, count_set_aside, disk_room, ground_warning, make_room
from sidecar.spool.owner import Spool, adopt_orphans, sqlite_version
from sidecar.spool.reader import SpoolReader
from sidecar.spool.verify import SlotReport, verify, verify_slot
from sidecar.spool.words import (
    Batch,
    Health,
    Limits,
    Snapshot,
    SpoolDamaged,
    SpoolError,
    SpoolFailed,
    SpoolFull,
    SpoolLocked,
    SpoolTotals,
    State,
    StoredGroup,
    Tally,
)

__all__ = [
    "Batch",
    "FileLock",
    "Health",
    "Limits",
    "SlotReport",
    "Snapshot",
    "Spool",
    "SpoolDamaged",
    "SpoolError",
    "SpoolFailed",
    "SpoolFull",
    "SpoolLocked",
    "SpoolReader",
    "SpoolTotals",
    "State",
    "StoredGroup",
    "Tally",
    "adopt_orphans",
    "count_set_aside",
    "disk_room",
    "ground_warning",
    "make_room",
    "sqlite_version",
    "verify",
    "verify_slot",
]
