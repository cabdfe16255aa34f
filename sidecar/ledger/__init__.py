"""The embedded usage store: `ledger.db`, written by one process, read by any."""

from sidecar.ledger.queries import LedgerReader, MeterRow, UsageRow
from sidecar.ledger.schema import LedgerError, ledger_problem
from sidecar.ledger.store import LedgerStore

__all__ = ["LedgerError", "LedgerReader", "LedgerStore", "MeterRow", "UsageRow", "ledger_problem"]
