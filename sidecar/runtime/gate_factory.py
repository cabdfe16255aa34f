"""From settings to limits, to who is asked about them, and to what keeps them from being used."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from difflib import get_close_matches
from functools import partial
from typing import Any, Final

from sidecar.gate.admission import Admission, ByUpstream, Meant, Models, Outside, Policy
from sidecar.gate.allowance import measure_of
from sidecar.gate.asking import Asking, SourceStatus
from sidecar.gate.claim import Claim
from sidecar.gate.counters import Counters, Row
from sidecar.gate.denials import Denials
from sidecar.gate.estimate import Outputs
from sidecar.gate.fleet import PART, STEPS, Past, SharedCounters, fleet_rows
from sidecar.gate.limits import (
    METER,
    Charging,
    Facts,
    Limit,
    LimitsError,
    Price,
    oldest_start_ns,
    read_limits,
    remarks,
)
from sidecar.gate.owner import Hour, Owner, count_hours, count_records
from sidecar.gate.protocol import LIMITS
from sidecar.gate.sources import SOURCES, problems, sources
from sidecar.gate.windows import SECOND_NS, moment
from sidecar.ledger import UsageRow
from sidecar.ledger.identity import Identity
from sidecar.meters.definition import Meter, MetersError, read_meters
from sidecar.model.exchange import Exchange, RawHeaders, Recorder, Release, Usage, UsageState
from sidecar.model.exchange import PlainExchange as Plain
from sidecar.model.grammar import Source, SourceKind
from sidecar.model.record import Record
from sidecar.prices import PICO, USD, PriceBook, Side, price_book
from sidecar.proxy.subscriber import CREDENTIALS, Attributor, is_hashed
from sidecar.runtime.backend_factory import LEDGER_NAME, fleet_reader, has_ledger, open_reader
from sidecar.runtime.factory import priced_hosts, usage_taps
from sidecar.runtime.metrics import Metrics
from sidecar.settings import Settings
from sidecar.spool import SpoolReader
from sidecar.storage.postgres import Fault, Postgres, PostgresError
from sidecar.usage.providers.table import known_routes, row_providers
from sidecar.usage.readers import UsageTaps
from sidecar.usage.response_headers import known_providers
from sidecar.usage.response_reader import DEFAULT_PROVIDER

log = logging.getLogger("sidecar.gate")

HOUR_S: Final = 3600
MEMORY: Final = "gate.answers"  # in the data directory, with SIDECAR_GATE_ON_FAILURE=last
RECORDS_MAX: Final = 200_000  # that limits are counted again from: some ten seconds
LIMITS_COMMAND_S: Final = 2.0  # of the database: who is asked more slowly than that decides nothing
BY: Final = ("subscriber", "model", "provider", "route", "status", "hour")


def limits(settings: Settings) -> tuple[Limit, ...]:
    """Those that hold; none where nobody asks for them. Raises `LimitsError` and `MetersError`."""
    return _limits(settings, read_meters(settings.meters)) if LIMITS in settings.gate.gate else ()


def providers(settings: Settings) -> set[str]:
    """Every provider that a record can name."""
    pinned = {*settings.usage.providers.values(), *(r.provider for r in settings.proxy.routes if r.provider)}
    return known_providers() | row_providers() | pinned


def _limits(settings: Settings, meters: Collection[Meter] | None) -> tuple[Limit, ...]:
    return read_limits(
        settings.limits,
        settings.gate.limits,
        meters=meters,
        dimensions=settings.attribution.dimensions,
        providers=providers(settings),
        names={id_: id_ for id_ in settings.subscribers} | {**settings.subscriber_names},
        hashed=all(is_hashed(Source.parse(text)) for text in settings.attribution.subscriber),
        routes={route.pattern.partition(" ")[2] or route.pattern for route in settings.proxy.routes}
        | {route.partition(" ")[2] for route in known_routes()},
    )


def faults(settings: Settings) -> list[str]:
    """What keeps the gate from being used, all of it."""
    found: list[str] = []
    names = [LIMITS, *SOURCES]
    for name in settings.gate.gate:
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            found.append(f"SIDECAR_GATE: {name} is nobody who can be asked: expected {', '.join(names)} or none{hint}")
    found += problems(settings, settings.gate.gate)
    meters: Collection[Meter] | None = None
    try:
        meters = read_meters(settings.meters)
        found += _missing_meters(settings, {meter.name for meter in meters})
    except MetersError:
        pass  # told by whoever reads the meters; which of them a limit may name cannot be judged
    try:
        if LIMITS in settings.gate.gate:
            _limits(settings, meters)
    except LimitsError as error:
        found += error.problems
    return found


def _missing_meters(settings: Settings, known: set[str]) -> list[str]:
    """Of the units in which those outside count down."""
    asked = settings.asked
    units = {
        "revenium": ("GATE_REVENIUM_UNIT", asked.gate_revenium_unit),
        "openmeter": ("GATE_OPENMETER_UNIT", asked.gate_openmeter_unit),
    }
    return [
        f"SIDECAR_{variable}={unit}: there is no such meter: expected one of {', '.join(sorted(known)) or 'none'}"
        for name, (variable, unit) in units.items()
        if name in settings.gate.gate and unit is not None
        if unit.startswith(METER) and unit.removeprefix(METER) not in known
    ]


def outside(settings: Settings) -> Outside | None:
    """Who is asked beside the limits; None: nobody. Raises `ValueError` for what `faults` tells."""
    found = sources(settings, settings.gate.gate)
    if not found:
        return None
    return Outside(
        names=tuple(source.name for source in found),
        measures={unit: measure_of(unit, meter) for unit, meter in _units(settings).items()},
        by_model=any(source.by_model for source in found),
        answer_s=settings.asked.gate_timeout,
    )


def _units(settings: Settings) -> dict[str, Meter | None]:
    """In which those outside count down, each with its meter."""
    meters = {METER + meter.name: meter for meter in read_meters(settings.meters)}
    units = {source.unit for source in sources(settings, settings.gate.gate)} - {None}
    return {unit: meters.get(unit) for unit in sorted(filter(None, units))}


def asking(settings: Settings) -> Asking | None:
    """Those outside, to be opened; None: nobody is asked. Raises `ValueError` for what `faults` tells."""
    found = sources(settings, settings.gate.gate)
    if not found:
        return None
    memory = settings.data_dir / MEMORY
    return Asking(found, settings.asked, on_failure=settings.gate.gate_on_failure, memory=memory)


def notes(settings: Settings) -> list[str]:
    """What is no fault and still worth knowing."""
    # What is shared with other sidecars is published, and kept there.
    kept_s = None if is_shared(settings) else settings.spool.retention
    found = remarks(limits(settings), priced=_has_prices(settings), kept_s=kept_s)
    if any(limit.needs_cost for limit in limits(settings)):
        other = {price.currency for price in price_book(settings).own if price.side is Side.PROVIDER} - {USD}
        found += [f"limits of cost_usd do not count what is priced in {currency}" for currency in sorted(other)]
    if (settings.limits or settings.gate.limits) and LIMITS not in settings.gate.gate:
        found.append("limits are defined and SIDECAR_GATE does not have limits: none of them holds")
    asked = [name for name in settings.gate.gate if name in SOURCES]
    if settings.gate.gate_dry_run and (settings.limits or settings.gate.limits or asked):
        found.append("SIDECAR_GATE_DRY_RUN: no call is denied")
    return found


def _has_prices(settings: Settings) -> bool:
    return settings.prices.prices != "none" or bool(settings.price_tables)


def models(settings: Settings) -> Callable[[str | None], Models | None]:
    """What estimates ask of models, by the name of the upstream; None: there are none to make, or no table."""
    found, asked = limits(settings), outside(settings)
    estimates = any(limit.needs_estimate for limit in found) or (asked is not None and asked.needs_estimate)
    if not _has_prices(settings) or not estimates:
        return lambda upstream: None
    book, hosts = price_book(settings), priced_hosts(settings)
    counts = any(limit.needs_cost for limit in found) or (asked is not None and asked.needs_cost)

    def of(upstream: str | None) -> Models:
        host = hosts[upstream]

        def ceiling(provider: str | None, model: str) -> int | None:
            return book.output_tokens_max(provider, model, host=host)

        def context(provider: str | None, model: str) -> int | None:
            return book.input_tokens_max(provider, model, host=host)

        return Models(_price(book, host) if counts else None, ceiling, context)

    return of


def _price(book: PriceBook, host: str) -> Price:
    """What tokens will cost. `host`: of the upstream, with its base path."""

    def find(provider: str | None, model: str | None, input_tokens: int, output_tokens: int, at_ns: int) -> int | None:
        usage = Usage(
            usage_state=UsageState.FINAL,
            provider=provider,
            model=model,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            total_tokens=input_tokens + output_tokens,
        )
        cost, _ = book.cost(usage, at_ns / SECOND_NS, host=host, record=None)
        if cost is None or cost.get("currency") not in (USD, None):
            return None
        if cost.get("total") is None:  # also of a model that has a price, but not for tokens
            return 0 if cost.get("reason") == "nothing_counted" else None
        return int(Decimal(cost["total"]) * PICO)

    return find


def charging(settings: Settings) -> Charging | None:
    """None: there is no limit."""
    found = limits(settings)
    return Charging(found, None, settings.gate.gate_unknown) if found else None


# --- in a process that serves --------------------------------------------------------------------------


def admission(policy: Policy) -> Admission:
    """What the hop asks."""
    return Admission(policy, clock_ns=time.time_ns, call_later=asyncio.get_running_loop().call_later)


def policy(settings: Settings, taps: UsageTaps, key: bytes) -> Policy | None:
    """What is to be decided before a call is sent on; None: every call may be made."""
    found, asked = limits(settings), outside(settings)
    if not found and asked is None:
        return None
    by_upstream: dict[str | None, UsageTaps] = {None: taps}
    by_upstream |= {one.name: usage_taps(settings, lambda kind: None, one.url) for one in settings.proxy.upstreams}
    payers = [Source.parse(text) for text in settings.attribution.subscriber]
    models_of = models(settings)

    def of(upstream: str | None) -> ByUpstream:
        own = by_upstream[upstream]
        deny = Denials(own.endpoints, settings.asked, statuses=settings.gate.gate_status, chance=random.random)
        return ByUpstream(_key_of(own, key), models_of(upstream), deny)

    rest = of(None)
    return Policy(
        limits=found,
        meant=partial(_meant, by_upstream),
        key_of=rest.key_of,
        reads=frozenset(name.encode() for name in CREDENTIALS),
        models=rest.models,
        deny=rest.deny,
        on_failure=settings.gate.gate_on_failure,
        dry_run=settings.gate.gate_dry_run,
        deny_unpriced=settings.gate.gate_unpriced == "deny",
        body_says_who=any(source.kind is SourceKind.BODY for source in payers),
        members=taps.body_fields,
        outside=asked,
        upstreams={one.name: of(one.name) for one in settings.proxy.upstreams},
    )


def _meant(by_upstream: Mapping[str | None, UsageTaps], method: str, target: str, upstream: str | None) -> Meant:
    taps = by_upstream.get(upstream) or by_upstream[None]
    endpoint = taps.endpoints.of(method, target)
    if method == "GET" and (socket := taps.socket(target)) is not None:
        # What it will take its messages say, each in a record of its own; which model that is of, the target.
        provider = (None if endpoint is None else endpoint.provider) or socket.provider
        return Meant(provider, (None if endpoint is None else endpoint.model) or socket.request_model, consumes=False)
    if endpoint is None:
        return Meant(taps.endpoints.provider_of(method, target), consumes=False)
    row = endpoint.row
    provider = endpoint.provider or (None if row is None else row.provider)
    consumes = row is None or row.unmetered is None
    # As its record will say, unless the response gives another away.
    assumed = provider is None and row is not None and consumes and not row.hint_only
    return Meant(DEFAULT_PROVIDER if assumed else provider, endpoint.model, consumes, assumed)


def _key_of(taps: UsageTaps, key: bytes) -> Callable[[RawHeaders], str | None]:
    """The hash of the credential that a head bears, whoever pays."""
    keyed = Attributor(
        sources=[Source(SourceKind.CREDENTIAL, "")],
        dimensions={},
        hash_key=key,
        provider=taps.endpoints.host_provider,
    )

    def find(fields: RawHeaders) -> str | None:
        subscriber, _ = keyed(fields, "", None)
        return None if subscriber is None else subscriber.id

    return find


class GatedRecorder:
    """The recorder of a process in which calls may hold something: what a call held is the owner's to settle once its
    record is on its way."""

    def __init__(self, recorder: Recorder, gate: Admission) -> None:
        self.admit = recorder.admit
        self._complete = recorder.complete
        self._gate = gate

    def complete(self, exchange: Exchange | Plain, release: Release | None) -> bool:
        gate = exchange.gate
        if gate is not None and gate.reserved:
            try:
                self._gate.ended(gate)
            except Exception:
                log.exception("what a call held cannot be given back; it is recorded all the same")
        return self._complete(exchange, release)


# --- in the process that meters ------------------------------------------------------------------------


class Settling:
    """The metrics of the intake, with the gate beside them: each call is settled where it is counted."""

    def __init__(self, metrics: Metrics, owner: Owner) -> None:
        self._metrics = metrics
        self._owner = owner
        self.add = metrics.add
        # Of calls of which no limit was asked. Where there are limits, each call comes by itself.
        self.calls_ended = metrics.calls_ended

    def call_ended(self, exchange: Exchange) -> None:
        self._owner.settle(exchange)
        # Of a socket it was decided once, for all of its messages.
        if (gate := exchange.gate) is not None and exchange.parent_id is None:
            self._metrics.gate_decided(gate.decision, gate.source, gate.limit)
        self._metrics.call_ended(exchange)


def owner(settings: Settings, asking: Asking | None) -> Owner | None:
    """Who decides; None: there is no limit, and nobody outside is asked. `asking`: open."""
    found = charging(settings)
    if found is None and asking is None:
        return None
    loop = asyncio.get_running_loop()
    return Owner(
        found or Charging((), None, settings.gate.gate_unknown),
        dry_run=settings.gate.gate_dry_run,
        clock_ns=time.time_ns,
        call_later=loop.call_later,
        others=asking,
        units=_units(settings),
        shared=lease_clock_s if is_shared(settings) else None,
    )


def is_shared(settings: Settings) -> bool:
    """Whether limits count over all sidecars that share a ledger."""
    return settings.fleet.ledger_url is not None and bool(limits(settings))


def lease_clock_s() -> float:
    """Goes on while the machine sleeps, where there is such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def fleet(settings: Settings, counters: Counters, past: Past | None) -> SharedCounters:
    """What shares these counters with other sidecars. Asks nothing of them yet."""
    url = settings.fleet.ledger_url
    assert url is not None
    claim = Claim(settings.data_dir, settings.fleet.instance, in_ledger=LEDGER_NAME in settings.backends)
    return SharedCounters(
        Postgres(url.reveal(), name=f"metering-sidecar {claim.name} limits", command_timeout_s=LIMITS_COMMAND_S),
        claim,
        counters,
        clock_s=lease_clock_s,
        wall_ns=time.time_ns,
        past=past,
    )


class LedgersPast:
    """What the shared ledger has of calls that no spool here has. `since_ns`: when the longest window began;
    `reaches_s`: from when on the spool has all, Unix seconds; `held`: by slot, the first number that it has."""

    def __init__(self, settings: Settings, since_ns: int, reaches_s: float, held: Mapping[str, int]) -> None:
        self._settings, self._held = settings, held
        self._since_s, self._reaches_s = since_ns / SECOND_NS, reaches_s
        self.forgets = reaches_s > self._since_s

    async def of_here(self, name: str, *, lost: bool, since_s: float | None) -> Counters | None:
        if lost:
            return await asyncio.to_thread(self._records, name, self._held)
        return await asyncio.to_thread(self._hours, name, max(self._since_s, since_s or 0.0), self._reaches_s)

    async def of(self, name: str) -> Counters | None:
        return await asyncio.to_thread(self._records, name, {})

    def _records(self, name: str, held: Mapping[str, int]) -> Counters | None:
        """As its records say, unless those are too many: then as their sums by hour do. Raises `StorageError`."""
        found, reader = charging(self._settings), fleet_reader(self._settings)
        if found is None or reader is None:
            return None
        since = datetime.fromtimestamp(int(self._since_s), UTC)
        with closing(reader):
            try:
                count = sum(row.records for row in reader.usage([], since, None, {"instance": [name]}))
            except PostgresError as error:
                if error.fault is Fault.MISSING:
                    return None  # this database has limits and no ledger
                raise
            if count > RECORDS_MAX:
                log.warning(
                    "limits of %s are counted again from its hours in the ledger: of its %d records too many are "
                    "wanted, so limits of keys, models, dimensions and meters begin at nothing",
                    name,
                    count,
                )
                now_s = time.time()
                return self._hours(name, self._since_s, self._reaches_s or now_s if held else now_s + HOUR_S)
            return count_records(reader.lines_of(name, since, held), found, lambda r: r.started_s >= self._since_s)

    def _hours(self, name: str, since_s: float, until_s: float) -> Counters | None:
        found, reader = charging(self._settings), fleet_reader(self._settings)
        if found is None or reader is None or until_s <= since_s:
            return None
        since, until = (datetime.fromtimestamp(int(at_s), UTC) for at_s in (since_s, until_s))
        with closing(reader):
            try:
                return count_hours(map(_hour, reader.usage(BY, since, until, {"instance": [name]})), found)
            except PostgresError as error:
                if error.fault is Fault.MISSING:
                    return None
                raise


def fleet_now(settings: Settings) -> list[Row] | None:
    """Where the limits of the fleet stand, for who runs no sidecar; None: they are not shared, or there are none.
    Blocks. Raises `PostgresError`."""
    url = settings.fleet.ledger_url
    if url is None or not is_shared(settings):
        return None
    name = Identity(settings.data_dir, settings.fleet.instance).name

    async def ask() -> list[Row]:
        database = Postgres(url.reveal(), name="metering-sidecar limits", command_timeout_s=LIMITS_COMMAND_S)
        try:
            await database.require(PART, STEPS)
            return await fleet_rows(database, name, Counters(limits(settings)))
        finally:
            await database.close()

    return asyncio.run(ask())


def remarks_on(status: SourceStatus, on_failure: str) -> list[str]:
    """What `/readyz` says of one of those outside."""
    found = []
    if status.failures:
        word = "is down" if status.down else "does not answer"
        found.append(f"{status.name} {word} ({status.reason}): calls go by SIDECAR_GATE_ON_FAILURE={on_failure}")
    if status.unread:
        found.append(f"{status.name} has {status.unread} rules that are not understood here and do not hold")
    return found


def counted(
    settings: Settings, reader: SpoolReader, instance: str, last_seq: int, outputs: Outputs | None = None
) -> Counters | None:
    """The counters as the records leave them: all of other slots, and of the one that is written here those up to
    `last_seq`. What the spool has no more is taken from the ledger, by whole hours. `outputs`: told what
    responses had. Reads files."""
    found = charging(settings)
    if found is None:
        return None
    since_ns = oldest_start_ns(found.limits, time.time_ns())
    from_s = max(since_ns / SECOND_NS, _complete_from_s(reader))
    counters = count_records(
        reader.lines(since_ns=since_ns),
        found,
        lambda r: r.started_s >= from_s and (r.instance != instance or r.seq <= last_seq),
        outputs,
    )
    # Of a ledger that many share `fleet` takes them, once that answers.
    if from_s * SECOND_NS > since_ns and settings.fleet.ledger_url is None and has_ledger(settings):
        since = datetime.fromtimestamp(since_ns // SECOND_NS, UTC)
        until = datetime.fromtimestamp(from_s, UTC)
        with closing(open_reader(settings)) as ledger:
            rows = ledger.usage(BY, since, until)
        counters.absorb(count_hours(map(_hour, rows), found))
    counters.set_back(time.time_ns())
    return counters


def ledgers_past(settings: Settings, reader: SpoolReader) -> LedgersPast | None:
    """Who is asked for what the spool has no more. Reads files."""
    found = charging(settings)
    if found is None:
        return None
    since_ns = oldest_start_ns(found.limits, time.time_ns())
    held = {slot: info[0].first_seq for slot in reader.instances() if (info := reader.segments(slot))}
    return LedgersPast(settings, since_ns, _complete_from_s(reader), held)


def _complete_from_s(reader: SpoolReader) -> float:
    """The hour from which on nothing was taken out of the spool for its age or its size; 0: nothing ever was."""
    found = 0.0
    for instance in reader.instances():
        segments = reader.segments(instance)
        if not segments or segments[0].first_seq <= 1:
            continue
        groups = reader.read(instance, segments[0].first_seq - 1, bytes_max=1)
        lines = [line for group in groups for line in group.lines[:1]]
        if lines:
            found = max(found, math.ceil(Record.from_json(lines[0]).started_s / HOUR_S) * float(HOUR_S))
    return found


def _hour(row: UsageRow) -> Hour:
    subscriber, model, provider, route, status, hour = row.group
    return Hour(
        start_ns=int(datetime.fromisoformat(hour or "").timestamp()) * SECOND_NS,
        facts=Facts(subscriber=subscriber, model=model, provider=provider, route=route),
        calls=row.calls,
        with_usage=row.with_usage,
        refused=status in ("4xx", "5xx"),
        input_tokens=row.input_tokens or 0,
        output_tokens=row.output_tokens or 0,
        total_tokens=row.total_tokens or 0,
        cost_usd=Decimal(row.cost_usd or 0),
    )


def shown(row: Row) -> dict[str, Any]:
    """A counter as `/limits` shows it."""
    limit = row.limit
    return {
        "limit": limit.name,
        "scope": limit.values_of(row.scope) or {},
        "unit": limit.unit,
        "used": limit.text(row.used),
        "reserved": limit.text(row.reserved),
        "amount": limit.text(limit.amount),
        "percent": round(100 * row.used / limit.amount, 1) if limit.amount else None,
        "window": limit.window_text or None,
        "until": moment(row.until_ns),
        "action": limit.action.value,
        **({} if row.here is None else {"here": _share(limit, row.here)}),
        **({} if not row.by else {"instances": {name: _share(limit, share) for name, share in row.by.items()}}),
    }


def _share(limit: Limit, share: tuple[int, int]) -> dict[str, str]:
    return {"used": limit.text(share[0]), "leased": limit.text(share[1])}
