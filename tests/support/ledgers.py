"""Both ledgers behind one face, so that one suite says what either has to do: put records in, take them back, ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.backend_trials import made

from sidecar.backends.ledger import LedgerBackend, SharedLedgerBackend
from sidecar.ledger import LedgerReader, LedgerStore
from sidecar.ledger.identity import Identity
from sidecar.ledger.postgres_queries import PostgresReader
from sidecar.ledger.postgres_schema import line_of
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.ledger.queries import Ledger
from sidecar.meters.buckets import BatchSums, batch_sums
from sidecar.meters.definition import Meter
from sidecar.meters.hourly import body_of, deltas, grouped
from sidecar.model.delivery import Verdict
from sidecar.model.record import Record


def again(lines: Sequence[bytes]) -> BatchSums:
    return batch_sums([Record.from_json(line) for line in lines], ())


class LedgerUnderTest:
    """One ledger, written by one and read by another connection."""

    def __init__(self, directory: Path, url: str | None) -> None:
        """`url`: of the shared one; None: the embedded one."""
        self.directory, self.url = directory, url
        self._store: LedgerStore | PostgresStore | None = None
        self._readers: list[Ledger] = []

    @property
    def shared(self) -> bool:
        return self.url is not None

    @property
    def path(self) -> Path:
        return self.directory / "ledger.db"

    @property
    def store(self) -> LedgerStore | PostgresStore:
        if self._store is None:
            if self.url is None:
                self._store = LedgerStore(self.path)
            else:
                self._store = PostgresStore(self.url, Identity(self.directory, "one"))
        return self._store

    def reader(self) -> Ledger:
        found: Ledger = LedgerReader(self.path, "one") if self.url is None else PostgresReader(self.url)
        self._readers.append(found)
        return found

    def put(self, batch: Sequence[Record], key: str = "k") -> Verdict:
        if isinstance(self.store, LedgerStore):
            return self.store.apply(key, body_of(deltas(grouped(batch))))
        lines = [line for line in map(line_of, (record.json for record in batch)) if line is not None]
        assert len(lines) == len(batch)
        return self.store.write(lines, None, again)

    def backend(self, meters: tuple[Meter, ...]) -> Any:
        """As delivery has it; closing it closes the store."""
        if self.url is None:
            return made(LedgerBackend, open_ledger=lambda: self.store, definitions=meters)
        return made(SharedLedgerBackend, open_shared_ledger=lambda: self.store, definitions=meters)

    def reopen(self) -> None:
        """As after a restart: nothing is known but what is in it."""
        if self._store is not None:
            self._store.close()
        self._store = None

    def close(self) -> None:
        self.reopen()
        for reader in self._readers:
            reader.close()


@pytest.fixture(params=["sqlite", "postgres"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LedgerUnderTest]:
    url = request.getfixturevalue("postgres_database") if request.param == "postgres" else None
    found = LedgerUnderTest(tmp_path, url)
    yield found
    found.close()
