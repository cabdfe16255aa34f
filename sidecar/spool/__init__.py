"""The durable log of records. `Spool` writes one slot, `SpoolReader` reads all of them.

`types` has what is passed in and out, `segment` the bytes of one file and the scan that reads them, `slot` a spool as
its owner holds it, `writer` the threads, `recovery` what happens after a crash and after damage, `retention` what goes
and when, `verify` the recount.
"""

from sidecar.spool.files import FileLock, count_set_aside, disk_room, ground_warning, make_room
from sidecar.spool.reader import NO_BOUND, SpoolReader
from sidecar.spool.slot import Spool, adopt_orphans
from sidecar.spool.types import (
    ORIGINS_KEPT,
    SOURCE_BYTES,
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
from sidecar.spool.verify import SlotReport, verify, verify_slot

__all__ = [
    "NO_BOUND",
    "ORIGINS_KEPT",
    "SOURCE_BYTES",
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
    "verify",
    "verify_slot",
]
