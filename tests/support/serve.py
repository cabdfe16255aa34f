"""The program as its user runs it, but for some things that only tests want.

Every plain call takes the short way, also the first of its kind: tests that tell calls apart by a header would never
take it otherwise. And where `DIES_AT` names a step (`before Intake.store 3`: the third time, before it is done), the
process that comes to it first dies there by SIGKILL, once in the life of the file `DIES_MARK`. Where `DIES_OF` is set,
the metering process dies of each call with that in its target. Where `FAILS_AT` names a function
(`sidecar.spool.intake:Intake.store 3`: the third time), that raises there, once in the life of the file `FAILS_MARK`,
as a mistake of ours would.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidecar.cli import main
from sidecar.delivery import DeliveryStore
from sidecar.gate.admission import Admission
from sidecar.gate.owner import Owner
from sidecar.ledger import LedgerStore
from sidecar.proxy import plain_call, plain_head
from sidecar.runtime.billing import Billing
from sidecar.runtime.collector import StreamReader
from sidecar.runtime.seam import Seam
from sidecar.runtime.seam_link import Link
from sidecar.spool import Spool
from sidecar.spool.intake import Intake, Source
from sidecar.spool.known_ids import KnownIds
from sidecar.spool.recorder import Recorder
from sidecar.spool.segment import CommitMark, Segment

SERVING: dict[str, tuple[type[Any], str]] = {
    "Recorder.send": (Recorder, "_send"),
    "Link.send": (Link, "send"),
    "Recorder.acknowledged": (Recorder, "acknowledged"),
}
ADMITTING: dict[str, tuple[type[Any], str]] = {  # in a process that serves, where limits are set
    "Admission.ask": (Admission, "ask"),
    "Admission.answered": (Admission, "answered"),
    "Admission.ended": (Admission, "ended"),
}
COUNTING: dict[str, tuple[type[Any], str]] = {  # in the metering process
    "Owner.ask": (Owner, "ask"),
    "Owner.told": (Owner, "told"),
    "Owner.settle": (Owner, "settle"),
}
METERING: dict[str, tuple[type[Any], str]] = {
    "Intake.take": (Intake, "take"),
    "Intake.store": (Intake, "store"),
    "Spool.submit": (Spool, "submit"),
    "Segment.append": (Segment, "append"),
    "CommitMark.write": (CommitMark, "write"),
    "Spool.told": (Spool, "_told"),
    "Seam.acknowledge": (Seam, "_acknowledge"),
    "Billing.hand_on": (Billing, "hand_on"),
    "LedgerStore.apply_sums": (LedgerStore, "apply_sums"),
    "DeliveryStore.commit": (DeliveryStore, "commit"),
}
COLLECTING: dict[str, tuple[type[Any], str]] = {
    "KnownIds.known": (KnownIds, "known"),
    "KnownIds.remember": (KnownIds, "remember"),
    "StreamReader.acknowledged": (StreamReader, "acknowledged"),
}


def dies(step: str, when: str, count: int, mark: Path) -> None:
    owner, name = (SERVING | METERING | ADMITTING | COUNTING | COLLECTING)[step]
    real: Callable[..., Any] = getattr(owner, name)
    passed = 0

    def die() -> None:
        nonlocal passed
        passed += 1
        if passed == count and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def instead(*args: Any, **more: Any) -> Any:
        if when == "before":
            die()
        found = real(*args, **more)
        if when == "after":
            die()
        return found

    setattr(owner, name, instead)


def dies_of(text: str) -> None:
    real = Intake._add_ended

    def instead(self: Intake, batch: Any, ended: Any, source: Source, entries: Any) -> None:
        if text in repr([(entry, source.requests.get(entry[1])) for entry in entries]):
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, batch, ended, source, entries)

    Intake._add_ended = instead  # type: ignore[method-assign]


TOLD = "-".join(("sk", "secret"))  # and not as it stands in a traceback's line of this file


def fails(where: str, count: int, mark: Path) -> None:
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real: Callable[..., Any] = getattr(owner, name)
    passed = 0

    def fail() -> None:
        nonlocal passed
        passed += 1
        if passed >= count and not mark.exists():
            mark.touch()
            raise ValueError(TOLD)

    def instead(*args: Any, **more: Any) -> Any:
        fail()
        return real(*args, **more)

    async def later(*args: Any, **more: Any) -> Any:
        fail()
        return await real(*args, **more)

    setattr(owner, name, later if inspect.iscoroutinefunction(real) else instead)


if __name__ == "__main__":
    plain_call.SIGHTS = 1
    plain_head.FORM_AFTER = 2
    if "DIES_AT" in os.environ:
        when, step, count = os.environ["DIES_AT"].split()
        dies(step, when, int(count), Path(os.environ["DIES_MARK"]))
    if "DIES_OF" in os.environ:
        dies_of(os.environ["DIES_OF"])
    if "FAILS_AT" in os.environ:
        where, count = os.environ["FAILS_AT"].split()
        fails(where, int(count), Path(os.environ["FAILS_MARK"]))
    sys.exit(main())
