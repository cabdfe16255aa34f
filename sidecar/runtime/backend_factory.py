"""From settings to backends: who makes them, and what keeps them from being made.

Apart from `parts`, so that `check` and the commands that ask a backend need not load the proxy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from sidecar.backends import BACKENDS, Context
from sidecar.backends.base import Examined, LedgerApply
from sidecar.ledger import LedgerStore, ledger_problem
from sidecar.meters.buckets import BatchSums
from sidecar.meters.definition import MetersError, read_meters
from sidecar.meters.properties import Vocabulary
from sidecar.model.delivery import Applied, Backend, Blocked, Verdict
from sidecar.settings import Settings

log = logging.getLogger(__name__)

LEDGER_NAME: Final = "ledger"
EXAMINE_AFTER_S: Final = 1.0  # the start is busy, and traffic goes first
EXAMINE_LIMIT_S: Final = 30.0  # for all that one backend is asked
LEDGER: Final = "ledger.db"


def backends(settings: Settings, not_computed: Callable[[str], None] | None = None) -> list[Backend]:
    """The configured backends, in the order of the setting. `not_computed`: told the meter of each value that the
    ledger lacks, because an expression cannot be computed; others park such a record."""
    return [backend(settings, name, not_computed=not_computed) for name in settings.backends]


def backend(
    settings: Settings,
    name: str,
    open_ledger: Callable[[], LedgerApply] | None = None,
    not_computed: Callable[[str], None] | None = None,
) -> Backend:
    """One backend. Raises `MetersError`, `ValueError` and `LedgerError`, which say what to do."""
    context = Context(
        data_dir=settings.data_dir,
        subscribers=settings.subscribers,
        meters=settings.meters,
        open_ledger=open_ledger or (lambda: LedgerStore(settings.data_dir / LEDGER)),
        not_computed=not_computed if name == LEDGER_NAME else None,
    )
    return BACKENDS[name].make(settings.backend(name), context)


def faults(settings: Settings) -> list[str]:
    """What keeps the configured meters, backends and ledger from being used, all of it. Opens nothing for good."""
    found: list[str] = []
    try:
        read_meters(settings.meters, vocabulary(settings))
    except MetersError as error:
        found += error.problems
    for name in settings.backends:
        row = BACKENDS.get(name)
        # What is missing or unknown has been said by `load`.
        if row is None or missing(settings, name):
            continue
        try:
            backend(settings, name, open_ledger=NoLedger)
        except MetersError:
            continue  # said above
        except ValueError as error:
            text = str(error)
            found.append(text if text.startswith((name, "SIDECAR_")) else f"{name}: {text}")
    if "ledger" in settings.backends and (problem := ledger_problem(settings.data_dir / LEDGER)) is not None:
        found.append(problem)
    return found


def vocabulary(settings: Settings) -> Vocabulary:
    """The properties that meters may name with these settings."""
    return Vocabulary.of(settings.attribution.dimensions, (element.name for element in settings.usage.elements))


def missing(settings: Settings, name: str) -> list[str]:
    """Settings that a backend needs and that are not set, by the name of their variable."""
    values = settings.backend(name)
    return [s.variable(name) for s in BACKENDS[name].settings if s.required and values[s.name] is None]


async def examine(backends: Iterable[Backend], *, after_s: float = EXAMINE_AFTER_S) -> None:
    """Ask each backend that can tell whether it is set up as we are, once, and log what is wrong: a vendor may say yes
    to an event of a meter that it lacks, and drop it. Look-ups that bill nothing, beside all else; never raises."""
    await asyncio.sleep(after_s)
    for backend in backends:
        if not isinstance(backend, Examined):
            continue
        try:
            async with asyncio.timeout(EXAMINE_LIMIT_S):
                problems = await backend.examine()
        except Exception as error:  # noqa: BLE001 - whether it can be reached is delivery's to say
            facts = {"backend": backend.name, "error": type(error).__name__}
            log.info("a backend could not be asked whether it is set up as we are", extra={"facts": facts})
            continue
        for problem in problems:
            facts = {"backend": backend.name, "problem": problem}
            log.warning("a backend is not set up as the meters want it", extra={"facts": facts})


class NoLedger:
    """In the ledger's place where nothing is delivered: the file may be in use."""

    def apply(self, key: str, body: bytes) -> Verdict:
        return Blocked("not_open")

    def undo(self, key: str, body: bytes) -> tuple[Verdict, tuple[str, ...]]:
        return Blocked("not_open"), ()

    def applied(self, instance: str) -> Applied | None:
        return None

    def apply_sums(self, instance: str, batch: Applied, sums: Sequence[BatchSums]) -> Verdict:
        return Blocked("not_open")

    def close(self) -> None:
        """Nothing was opened."""
