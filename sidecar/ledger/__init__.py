"""The usage store: `ledger.db`, written by one process, read by any; or in PostgreSQL, shared by many sidecars."""

from sidecar.ledger.queries import LedgerReader, MeterRow, TooLongError, UnpricedModel, UsageRow, row_of
from sidecar.ledger.questions import COUNTED, DIMENSION, GROUPS, TIMES, Group, Sums
from sidecar.ledger.schema import PICO, LedgerError, ledger_problem, read_cost, stored_cost
from sidecar.ledger.store import LedgerStore

__all__ = [
    "COUNTED",
    "DIMENSION",
    "GROUPS",
    "PICO",
    "TIMES",
    "Group",
    "LedgerError",
    "LedgerReader",
    "LedgerStore",
    "MeterRow",
    "Sums",
    "TooLongError",
    "UnpricedModel",
    "UsageRow",
    "ledger_problem",
    "read_cost",
    "row_of",
    "stored_cost",
]
