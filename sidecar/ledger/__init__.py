"""The embedded usage store: `ledger.db`, written by one process, read by any."""

from sidecar.ledger.queries import (
    COUNTED,
    DIMENSION,
    GROUPS,
    TIMES,
    LedgerReader,
    MeterRow,
    TooLongError,
    UnpricedModel,
    UsageRow,
)
from sidecar.ledger.schema import LedgerError, ledger_problem
from sidecar.ledger.store import LedgerStore

__all__ = [
    "COUNTED",
    "DIMENSION",
    "GROUPS",
    "TIMES",
    "LedgerError",
    "LedgerReader",
    "LedgerStore",
    "MeterRow",
    "TooLongError",
    "UnpricedModel",
    "UsageRow",
    "ledger_problem",
]
