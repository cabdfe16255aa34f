"""From settings to backends: who makes them, and what keeps them from being made.

Apart from `parts`, so that `check` and the commands that ask a backend need not load the proxy.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Final

from sidecar.backends import BACKENDS, Context
from sidecar.backends.base import Examined, LedgerApply, SharedLedger
from sidecar.backends.http import HttpBackend
from sidecar.delivery.lane_database import lanes_read, make_lanes
from sidecar.delivery.queries import DeliveryQueries
from sidecar.ledger import LedgerReader, LedgerStore, ledger_problem
from sidecar.ledger.identity import Identity
from sidecar.ledger.lanes import LANES
from sidecar.ledger.postgres_queries import PostgresReader
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.ledger.queries import Ledger
from sidecar.meters.buckets import BatchSums
from sidecar.meters.definition import MetersError, read_meters
from sidecar.meters.properties import Vocabulary
from sidecar.model.delivery import Applied, Backend, Blocked, Verdict
from sidecar.settings import Deliver, Settings
from sidecar.storage.postgres import Postgres

log = logging.getLogger(__name__)

LEDGER_NAME: Final = "ledger"
EXAMINE_AFTER_S: Final = 1.0  # the start is busy, and traffic goes first
EXAMINE_LIMIT_S: Final = 30.0  # for all that one backend is asked
LEDGER: Final = "ledger.db"
DELIVERY: Final = "delivery.db"
# Told by each sidecar itself, also where others are told by who is elected: what all share, and a file on its own disk.
ALWAYS_OWN: Final = frozenset({LEDGER_NAME, "file", "nats"})


def backends(
    settings: Settings,
    names: Sequence[str] | None = None,
    not_computed: Callable[[str], None] | None = None,
    *,
    resumed: bool = False,
) -> list[Backend]:
    """The configured backends, or these of them, in the order of the setting. `not_computed`: told the meter of each
    value that the ledger lacks, because an expression cannot be computed; others park such a record. `resumed`: a
    ledger that cannot be opened, for whatever reason, is one that takes nothing (`LedgerStore`)."""
    wanted = settings.backends if names is None else names
    return [backend(settings, name, not_computed=not_computed, resumed=resumed) for name in wanted]


def of_a_lane(settings: Settings, names: Sequence[str]) -> list[Backend]:
    """These backends as one lane of a fleet has them: all lanes together send some twice as much at once as one sidecar
    by itself would, however many sidecars there are."""
    made = backends(settings, names)
    for one in made:
        if isinstance(one, HttpBackend):
            at_once = max(1, one.abilities.concurrency * 2 // LANES)
            one.abilities = replace(one.abilities, concurrency=at_once)
    return made


def backend(
    settings: Settings,
    name: str,
    open_ledger: Callable[[], LedgerApply] | None = None,
    not_computed: Callable[[str], None] | None = None,
    resumed: bool = False,
) -> Backend:
    """One backend. Raises `MetersError`, `ValueError` and `LedgerError`, which say what to do."""
    context = Context(
        data_dir=settings.data_dir,
        subscribers=settings.subscribers,
        meters=settings.meters,
        open_ledger=open_ledger or (lambda: LedgerStore(settings.data_dir / LEDGER, resumed=resumed)),
        open_shared_ledger=_shared(settings) if open_ledger is None else None,
        not_computed=not_computed if name == LEDGER_NAME else None,
    )
    return BACKENDS[name].make(settings.backend(name), context)


def _shared(settings: Settings) -> Callable[[], SharedLedger] | None:
    """What opens the ledger that sidecars share, where one is set. Nothing is asked of it yet."""
    url, names = settings.fleet.ledger_url, elected(settings)
    if url is None:
        return None

    async def lanes(database: Postgres) -> None:
        """A record that is in a lane before the lane has its tables may have been told by whoever wrote it. None of
        ours ever is, also where the database was away when this sidecar started."""
        await make_lanes(database, names)

    def opened() -> SharedLedger:
        identity = Identity(settings.data_dir, settings.fleet.instance)
        return PostgresStore(url.reveal(), identity, lanes if names else None)

    return opened


def own(settings: Settings) -> list[str]:
    """The backends that this sidecar tells of its own records."""
    if settings.fleet.deliver is Deliver.OWN:
        return list(settings.backends)
    return [name for name in settings.backends if name in ALWAYS_OWN]


def elected(settings: Settings) -> list[str]:
    """Those that are told by whoever holds a record's lane."""
    return [name for name in settings.backends if name not in own(settings)]


@contextmanager
def accounts(settings: Settings) -> Iterator[list[DeliveryQueries]]:
    """What delivery remembers, here and, where others are told by who is elected, on all lanes. Raises `StateError`."""
    path, url = settings.data_dir / DELIVERY, settings.fleet.ledger_url
    with ExitStack() as stack:
        found = []
        if path.exists():
            found.append(DeliveryQueries.open(path))
            stack.callback(found[0].close)
        if settings.fleet.deliver is Deliver.ELECTED and url is not None:
            found += map(DeliveryQueries, stack.enter_context(lanes_read(url.reveal())))
        yield found


def open_reader(settings: Settings) -> Ledger:
    """Whoever answers what was used: the ledger that sidecars share, where one is set, else the one in the data
    directory. Asks nothing of it yet."""
    shared = fleet_reader(settings)
    if shared is not None:
        return shared
    return LedgerReader(settings.data_dir / LEDGER, Identity(settings.data_dir, settings.fleet.instance).name)


def fleet_reader(settings: Settings) -> PostgresReader | None:
    """The ledger that sidecars share, where one is set: it has their records as well."""
    url = settings.fleet.ledger_url
    return None if url is None else PostgresReader(url.reveal())


def has_ledger(settings: Settings) -> bool:
    """Whether there is one to be read: a shared one may be asked, an embedded one has to be there."""
    return settings.fleet.ledger_url is not None or (settings.data_dir / LEDGER).exists()


def faults(settings: Settings, *, starting: bool = False) -> list[str]:
    """What keeps the configured meters, backends and ledger from being used, all of it. Opens nothing for good.
    `starting`: only what is a reason not to serve, which a damaged ledger is not: its records wait for it."""
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
    if settings.fleet.deliver is Deliver.ELECTED:
        if settings.fleet.ledger_url is None:
            found.append("SIDECAR_DELIVER=elected needs SIDECAR_LEDGER_URL: who delivers is agreed on there")
        elif LEDGER_NAME not in settings.backends:
            found.append("SIDECAR_DELIVER=elected delivers what is in the ledger: add `ledger` to SIDECAR_BACKENDS")
    if settings.fleet.ledger_url is not None:
        if importlib.util.find_spec("asyncpg") is None:
            found.append("SIDECAR_LEDGER_URL needs a driver: pip install 'metering-sidecar[postgres]'")
    elif "ledger" in settings.backends and (problem := ledger_problem(settings.data_dir / LEDGER)) is not None:
        found += [] if starting and problem.damaged else [str(problem)]
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
