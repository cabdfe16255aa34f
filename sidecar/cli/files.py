"""Looking into a data directory from outside: what the commands say where no instance can be asked.

Everything is opened read-only, so it is safe beside a running instance too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sidecar.cli.shared import CommandError
from sidecar.delivery.database import open_reader, told
from sidecar.delivery.queries import DeliveryQueries, totals_of
from sidecar.delivery.rows import StateError
from sidecar.model.balance import Balance, add_counts
from sidecar.runtime.directory_identity import noticed_in
from sidecar.spool import SpoolError, SpoolReader

DELIVERY: Final = "delivery.db"


@contextmanager
def spool_of(data_dir: Path) -> Iterator[SpoolReader]:
    """The spool of every instance; `CommandError` where there is none or it cannot be read."""
    try:
        with SpoolReader(data_dir) as reader:
            if not reader.instances():
                raise CommandError(f"there are no records in {data_dir}: is SIDECAR_DATA_DIR the right one?")
            yield reader
    except SpoolError as error:
        raise CommandError(str(error)) from None


@contextmanager
def accounts_of(data_dir: Path) -> Iterator[DeliveryQueries | None]:
    """What delivery remembers; None where nothing was ever delivered."""
    path = data_dir / DELIVERY
    if not path.exists():
        yield None
        return
    try:
        accounts = DeliveryQueries(path)
        try:
            yield accounts
        finally:
            accounts.close()
    except StateError as error:
        raise CommandError(str(error)) from None


def balance_of(data_dir: Path) -> Balance:
    """The equation as the files have it. Without a running instance nothing in them moves."""
    with spool_of(data_dir) as reader, accounts_of(data_dir) as accounts:
        instances = reader.instances()
        totals = [reader.totals(instance) for instance in instances]
        upto = {instance: reader.last_seq(instance) for instance in instances}
        sums = {} if accounts is None else accounts.sums(_backends(data_dir), upto)
        return Balance(
            admitted=sum(t.admitted for t in totals),
            recorded=sum(t.recorded for t in totals),
            open=sum(t.open for t in totals),
            lost=add_counts(t.lost for t in totals),
            backends={name: totals_of(one, reader.count) for name, one in sums.items()},
            notes=() if (noticed := noticed_in(data_dir)) is None else (noticed.text,),
        )


def _backends(data_dir: Path) -> list[str]:
    """Those that delivery works for, whatever this command's environment says."""
    path = data_dir / DELIVERY
    connection = open_reader(path)
    try:
        with told(path):
            return [name for (name,) in connection.execute("SELECT name FROM backend WHERE removed = 0 ORDER BY name")]
    finally:
        connection.close()


def ahead_of_spool(data_dir: Path, reader: SpoolReader) -> list[str]:
    """Where delivery has been further than the spool goes: records were lost together with their file."""
    path = data_dir / DELIVERY
    connection = open_reader(path)
    try:
        with told(path):
            cursors = connection.execute("SELECT backend, instance, seq FROM cursor ORDER BY id").fetchall()
    finally:
        connection.close()
    last = {instance: reader.last_seq(instance) for instance in reader.instances()}
    return [
        f"{backend}, instance {instance}: delivered up to record {seq}, but the spool ends at {last.get(instance, 0)}"
        for backend, instance, seq in cursors
        if seq > last.get(instance, 0)
    ]
