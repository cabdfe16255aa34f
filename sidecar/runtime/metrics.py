"""What happened, counted: one method for each kind of happening, one exposition for Prometheus.

Counts are plain numbers in dictionaries and `prometheus_client` only writes them out: on the way of
a call that costs 0.1 µs where a client counter costs 0.3 and a histogram 0.8 (measured). They
are the metering process's; what only those that serve can count, they tell it (`hop_counts`).

Labels are bounded: routes are configured or known patterns, models and reasons beyond their cap
fall into `other`; a path is never a label, and a subscriber only where `SIDECAR_METRICS_SUBSCRIBERS`
says how many. Series that an alert waits for exist at zero from the start, so that "no loss" and
"nobody counts" look different.
"""

from __future__ import annotations

import logging
import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from operator import add, truediv
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import sidecar
from sidecar.meters.hourly import UNAUTHENTICATED
from sidecar.model.balance import Balance
from sidecar.model.call_group import NO_PRICE, CallGroup, Gathering, groups_of
from sidecar.model.delivery import Blocked, Retry, Unknown, Verdict
from sidecar.model.exchange import Exchange, Outcome, Subscriber, Usage, UsageState, cut
from sidecar.runtime.hop_counts import HopEvents

log = logging.getLogger(__name__)

GATHERED_CALLS_MAX: Final = 1_000  # that wait to be counted: their lines are kept meanwhile, 1 MB
MODELS_MAX: Final = 200  # distinct model names in a label; a deployment rarely uses more than a few dozen
LABEL_CHARS_MAX: Final = 128  # of a model or a reason; most models have fewer than 60
OTHER: Final = "other"  # subscribers beyond the cap
NOBODY: Final = "none"  # calls that said not who they are
REASONS_MAX: Final = 50  # distinct reasons of one family; ours are fixed words, a vendor's codes need not be
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
STATUS_CLASSES: Final = ("none", "1xx", "2xx", "3xx", "4xx", "5xx", "other", "other", "other", "other")
LOST_REASONS: Final = ("spool_full", "spool_failed", "stopped", "unreadable")
GIVEN_UP: Final = ("unreadable", "deadly", "no_head")  # why a frame is
SECONDS: Final = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    600.0,
)
REJECTED_REASONS: Final = (
    "malformed", "bad_chunk", "unknown_method", "target_too_long", "head_too_large", "head_timeout",
)  # fmt: skip
LIMITS: Final = (
    "connections", "calls", "spool_full", "proxy_fault", "drains", "drains_share", "disconnect_drain", "idle_timeout",
    "response_timeout", "head_timeout", "url_chars", "user_agent_chars", "header_name_chars", "header_names_chars",
    "usage_chars",
)  # fmt: skip
ATTRIBUTION_ANOMALIES: Final = ("credentials_conflict", "header_repeated", "query_repeated", "dimension_cut")
UPSTREAM_FAILURES: Final = (
    "dns", "tls", "refused", "timeout", "reset", "not_http", "no_route", "no_resources", "other",
)  # fmt: skip
REDIRECTS: Final = ("rewritten", "off", "outside", "scheme")  # as `redirects` has them
PICO: Final = 10**12  # in a dollar
DAY_S: Final = 86_400
DAYS_MAX: Final = 31  # days of which the times are kept: a month
_TOKEN_KINDS: Final = (
    ("input", "input_tokens"),
    ("output", "output_tokens"),
    ("cache_read_input", "cache_read_input_tokens"),
    ("cache_write_input", "cache_write_input_tokens"),
    ("reasoning_output", "reasoning_output_tokens"),
)
_BOTH_WAYS: Final = frozenset({"input", "output"})  # the others are parts of these


@dataclass(frozen=True, slots=True)
class Family:
    """One metric as its user sees it. Counters get `_total` appended where it is written out."""

    kind: str  # counter, gauge, histogram
    help: str
    labels: tuple[str, ...] = ()


FAMILIES: Final[Mapping[str, Family]] = {
    "sidecar_calls": Family("counter", "Calls that ended", ("route", "method", "status_class", "outcome")),
    "sidecar_call_duration_seconds": Family("histogram", "From letting a call in to its end", ("outcome",)),
    "sidecar_first_byte_seconds": Family("histogram", "From letting a call in to the upstream's first byte"),
    "sidecar_request_bytes": Family("counter", "Body bytes that clients sent"),
    "sidecar_response_bytes": Family("counter", "Body bytes that clients were sent"),
    "sidecar_tokens": Family("counter", "Tokens that responses reported", ("kind", "provider", "model")),
    "sidecar_usage": Family("counter", "Model calls, by what is known of their usage", ("state", "provider", "model")),
    "sidecar_usage_anomalies": Family("counter", "Odd content met while reading usage", ("kind",)),
    "sidecar_attribution_anomalies": Family("counter", "Odd heads met while finding out who pays", ("kind",)),
    "sidecar_rejected": Family("counter", "Requests refused before they became a call", ("reason",)),
    "sidecar_gate_decisions": Family(
        "counter", "Whether calls may be made: `allowed`, `denied`, `shadow`", ("decision", "source", "limit")
    ),
    "sidecar_gate_questions": Family(
        "counter", "Questions to those whom the gate asks outside: `answered`, or why not", ("source", "result")
    ),
    "sidecar_gate_unanswered": Family(
        "counter", "Calls decided without an answer that is believed; `last`: by an old one",
        ("source", "decision", "reason"),
    ),
    "sidecar_gate_source_down": Family("gauge", "1 while no call waits for it, as it does not answer", ("source",)),
    "sidecar_limits_away": Family("gauge", "1 while the limits that sidecars share cannot be counted"),
    "sidecar_limits_failures": Family("counter", "Questions about shared limits that the database did not answer"),
    "sidecar_upstream_retries": Family("counter", "Calls sent again because a pooled connection was dead"),
    "sidecar_upstream_failures": Family("counter", "Calls that got no response from the upstream", ("reason",)),
    "sidecar_upstream_faults": Family(
        "counter", "The same by upstream, where there are several", ("upstream", "reason")
    ),
    "sidecar_upstream_calls": Family(
        "counter", "Calls that ended, by upstream, where there are several", ("upstream", "status_class", "outcome")
    ),
    "sidecar_not_recorded": Family("counter", "Calls on routes with `record = false`", ("route",)),
    "sidecar_upstream_redirects": Family(
        "counter", "Redirects to the upstream's own address: `rewritten`, or why not", ("what",)
    ),
    "sidecar_limits_reached": Family("counter", "How often a named limit was reached", ("limit",)),
    "sidecar_connections": Family("gauge", "Client connections that are open"),
    "sidecar_drains": Family("gauge", "Responses read on although their client left"),
    "sidecar_commits": Family("counter", "Groups committed to the spool"),
    "sidecar_commit_seconds": Family("histogram", "Commit of one group, with its fsync"),
    "sidecar_committed_records": Family("counter", "Records committed to the spool"),
    "sidecar_committed_bytes": Family("counter", "Record bytes committed to the spool"),
    "sidecar_lost": Family("counter", "Records that could not be kept", ("reason",)),
    "sidecar_frames_given_up": Family("counter", "What serving processes told of calls and nobody can read", ("why",)),
    "sidecar_released_uncommitted": Family("counter", "Responses that left before the record was on disk, or shipped"),
    "sidecar_admitted": Family("counter", "Calls let in, over restarts"),
    "sidecar_recorded": Family("counter", "Records on disk, over restarts"),
    "sidecar_open": Family("gauge", "Calls let in whose record is not on disk yet"),
    "sidecar_balance_holds": Family("gauge", "1 when admitted = recorded + open + lost and every backend adds up"),
    "sidecar_spool_degraded": Family("gauge", "1 while the promise of the durability mode is suspended"),
    "sidecar_directory_copied": Family("gauge", "1 while a copied data directory waits to be adopted"),
    "sidecar_disk_free_bytes": Family("gauge", "Room left where the data directory is"),
    "sidecar_disk_bytes": Family("gauge", "Size of that disk"),
    "sidecar_disk_low_bytes": Family("gauge", "`SIDECAR_DISK_LOW_BYTES`, below which free room is an alarm"),
    "sidecar_chunks_set_aside": Family("gauge", "Damaged files of records that were copied and are kept for you"),
    "sidecar_spool_bytes": Family("gauge", "Size of the spool; delivered records stay until their retention is over"),
    "sidecar_meter_values_not_computed": Family(
        "counter", "Values that the ledger lacks, because a meter's expression gave no number", ("meter",)
    ),
    "sidecar_ledger_bytes": Family("gauge", "Size of the ledger: it keeps a row for each subscriber, model and hour"),
    "sidecar_cost_usd": Family(
        "counter", "What calls cost, in US dollars, as far as that is known", ("provider", "model")
    ),
    "sidecar_unpriced_calls": Family(
        "counter", "Model calls whose cost is not known, because no price is", ("provider", "model")
    ),
    "sidecar_route_tokens": Family("counter", "Tokens that responses reported, by route", ("route", "kind")),
    "sidecar_route_cost_usd": Family("counter", "What calls cost, in US dollars, by route", ("route",)),
    "sidecar_subscriber_calls": Family(
        "counter", "Calls by who pays; `SIDECAR_METRICS_SUBSCRIBERS` says how many are told apart", ("subscriber",)
    ),
    "sidecar_subscriber_tokens": Family("counter", "Tokens by who pays, likewise", ("subscriber", "kind")),
    "sidecar_subscriber_cost_usd": Family(
        "counter", "What calls cost by who pays, in US dollars, likewise", ("subscriber",)
    ),
    "sidecar_sealed_events": Family("counter", "Events sealed for delivery", ("backend",)),
    "sidecar_verdicts": Family("counter", "What backends said of events", ("backend", "verdict")),
    "sidecar_send_failures": Family(
        "counter", "Requests that a backend did not settle: `refused`, `dns`, `http_503`, …", ("backend", "reason")
    ),
    "sidecar_send_seconds": Family("histogram", "One request to a backend", ("backend",)),
    "sidecar_parked": Family("counter", "Records parked", ("backend", "reason")),
    "sidecar_skipped": Family("counter", "Records that have no event at a backend", ("backend", "reason")),
    "sidecar_pending": Family("gauge", "Records on disk that a backend has not settled", ("backend",)),
    "sidecar_parked_now": Family("gauge", "Records that are parked", ("backend", "reason")),
    "sidecar_oldest_pending_seconds": Family("gauge", "Age of a backend's oldest unsettled record", ("backend",)),
    "sidecar_retry_after_seconds": Family("gauge", "What is left of a wait that a backend asked for", ("backend",)),
    "sidecar_blocked": Family("gauge", "1 while a backend takes nothing until somebody acts", ("backend",)),
    "sidecar_instance_lag_seconds": Family(
        "gauge", "Age of the oldest record of a sidecar that the shared ledger lacks", ("instance",)
    ),
    "sidecar_instance_silent_seconds": Family(
        "gauge", "Since a sidecar was last heard of by the shared ledger", ("instance",)
    ),
    "sidecar_lanes_held": Family("gauge", "Lanes that are delivered from here, where sidecars deliver together"),
    "sidecar_lanes_resting": Family("gauge", "Lanes that are held here and cannot be delivered, or were just taken"),
    "sidecar_lanes_unheld": Family("gauge", "Lanes that no sidecar holds, as this one saw it within the last seconds"),
    "sidecar_collected": Family(
        "counter", "Of `collect`: messages that were read; `stored`, `duplicate` or `aside`", ("outcome",)
    ),
    "sidecar_collect_missed": Family("counter", "Messages that left the stream before they were read", ("consumer",)),
    "sidecar_collect_reading": Family("gauge", "1 while the stream is read, 0 while it cannot be", ("consumer",)),
    "sidecar_collect_pending": Family("gauge", "Messages of the stream that were not read yet", ("consumer",)),
    "sidecar_collect_aside": Family("gauge", "Messages that are kept aside: no records, or too old", ("consumer",)),
    "sidecar_build_info": Family("gauge", "1, labelled with what runs", ("version", "python")),
}  # fmt: skip

Key = tuple[str, ...]


def label(text: str) -> str:
    """A label's value, of which no byte moves a cursor, ends a line or fills a screen, whoever chose it."""
    clean = text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return cut(clean, LABEL_CHARS_MAX)


class Histogram:
    """Counts in fixed buckets of seconds, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    @classmethod
    def of_ms(cls, times: Sequence[float]) -> Histogram:
        """Of milliseconds."""
        found = cls()
        found.observe_all(list(map(truediv, times, repeat(1e3))))
        return found

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def observe_all(self, seconds: Sequence[float]) -> None:
        """`observe` of each, in C: a batch holds hundreds."""
        for at, count in Counter(map(bisect_left, repeat(SECONDS), seconds)).items():
            self.counts[at] += count
        self.total += sum(seconds)

    def add(self, other: Histogram) -> None:
        """Count what another one counted."""
        self.counts = list(map(add, self.counts, other.counts))
        self.total += other.total

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as the exposition wants them."""
        rows, running = [], 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            running += count
            rows.append((bound, float(running)))
        return rows


@dataclass(slots=True, frozen=True)
class DayTimes:
    """How long the calls of a day took, and until their first byte."""

    whole: Histogram = field(default_factory=Histogram)
    first_byte: Histogram = field(default_factory=Histogram)


@dataclass(slots=True, kw_only=True)
class Gauges:
    """What is read at the moment of a scrape rather than counted as it happens."""

    balance: Balance | None = None  # None: it cannot be read now
    degraded: bool = False
    copied: bool = False
    disk_free_bytes: int = 0
    disk_bytes: int = 0
    disk_low_bytes: int = 0
    chunks_set_aside: int = 0
    spool_bytes: int = 0
    ledger_bytes: int = 0
    pending: dict[str, int] = field(default_factory=dict)
    parked: dict[tuple[str, str], int] = field(default_factory=dict)
    oldest_pending_s: dict[str, float] = field(default_factory=dict)
    retry_after_s: dict[str, float] = field(default_factory=dict)
    instance_lag_s: dict[str, float] = field(default_factory=dict)  # of a fleet, by instance
    instance_silent_s: dict[str, float] = field(default_factory=dict)
    lanes_held: int | None = None  # None, here and below: there are none, or they cannot be looked at
    lanes_resting: int | None = None
    lanes_unheld: int | None = None


class Metrics(HopEvents, Collector):
    """The counts of one process. Build as many as you like: each has its own registry."""

    def __init__(self, *, backends: Sequence[str] = (), subscribers_max: int = 0) -> None:
        """`subscribers_max`: how many subscribers are told apart, those that call first; 0: none is a label."""
        self._subscribers_max = subscribers_max
        self._subscribers: dict[str, str] = {}  # those told apart -> the label
        self._days: dict[int, DayTimes] = {}
        self._gathered: list[Gathering] = []  # not counted yet
        self._gathered_calls = 0
        self._counters: dict[str, dict[Key, float]] = {n: {} for n, f in FAMILIES.items() if f.kind == "counter"}
        self._histograms: dict[str, dict[Key, Histogram]] = {
            n: {} for n, f in FAMILIES.items() if f.kind == "histogram"
        }
        self._gauges: dict[str, dict[Key, float]] = {n: {} for n, f in FAMILIES.items() if f.kind == "gauge"}
        self._models: dict[str, str] = {}  # as answers name them -> the label
        # Found once: the dictionaries that every call touches.
        self._calls = self._counters["sidecar_calls"]
        self._request_bytes = self._counters["sidecar_request_bytes"]
        self._response_bytes = self._counters["sidecar_response_bytes"]
        self._tokens = self._counters["sidecar_tokens"]
        self._usage = self._counters["sidecar_usage"]
        self._durations = {
            outcome: self._histograms["sidecar_call_duration_seconds"].setdefault((outcome.value,), Histogram())
            for outcome in Outcome
        }
        self._first_byte = self._histograms["sidecar_first_byte_seconds"].setdefault((), Histogram())
        self._commits = self._histograms["sidecar_commit_seconds"].setdefault((), Histogram())
        self._start_at_zero(backends)

    # --- happenings on the way of a call -------------------------------------------------------

    def call_ended(self, exchange: Exchange) -> None:
        """Count one call, its times, bytes and tokens. Of a WebSocket's message only the tokens."""
        if self._subscribers_max:  # which are told apart is decided in the order of their calls
            self._count_gathered()
        payer = self._payer(exchange.subscriber, exchange.status, exchange.outcome)
        if exchange.parent_id is not None:
            if exchange.usage is not None:
                self._count_usage(exchange, payer)
            return
        if payer is not None:
            self._count("sidecar_subscriber_calls", (payer,))
        status, outcome = exchange.status, exchange.outcome
        method = exchange.method if exchange.method in METHODS else "other"
        status_class = STATUS_CLASSES[0 if status is None else status // 100]
        key = (exchange.route or "other", method, status_class, outcome)
        self._calls[key] = self._calls.get(key, 0) + 1
        if exchange.upstream is not None:
            self._count("sidecar_upstream_calls", (exchange.upstream, status_class, outcome))
        self._request_bytes[()] += exchange.request_bytes
        self._response_bytes[()] += exchange.response_bytes
        day = self._day(exchange.started_ns // (DAY_S * 1_000_000_000))
        if exchange.duration_ms is not None:
            self._durations[outcome].observe(exchange.duration_ms / 1e3)
            day.whole.observe(exchange.duration_ms / 1e3)
        if exchange.first_byte_ms is not None:
            self._first_byte.observe(exchange.first_byte_ms / 1e3)
            day.first_byte.observe(exchange.first_byte_ms / 1e3)
        if exchange.usage is not None:
            self._count_usage(exchange, payer)

    def calls_ended(self, gathered: Gathering) -> None:
        """The same for calls that differ in numbers only. They are counted together with those that come after them,
        when somebody looks: commits are many, and each would cost what hundreds of calls do."""
        self._gathered.append(gathered)
        self._gathered_calls += len(gathered.lines)
        if self._gathered_calls > GATHERED_CALLS_MAX:
            self._count_gathered()

    def _count_gathered(self) -> None:
        gathered, self._gathered, self._gathered_calls = self._gathered, [], 0
        for group in groups_of(gathered):
            try:
                self._count_group(group)
            except Exception:
                log.exception("calls could not be counted; they are recorded all the same")

    def _count_group(self, group: CallGroup) -> None:
        record = group.kind.example
        method = record.method if record.method in METHODS else "other"
        key = (record.route or "other", method, STATUS_CLASSES[(record.status or 0) // 100], record.outcome)
        self._calls[key] = self._calls.get(key, 0) + group.calls
        if record.upstream is not None:
            self._count("sidecar_upstream_calls", (record.upstream, *key[2:]), group.calls)
        self._request_bytes[()] += group.request_bytes
        self._response_bytes[()] += group.response_bytes
        whole = first = Histogram.of_ms(group.durations_ms)
        if group.first_bytes_ms != group.durations_ms:  # of most responses the first byte comes with the last
            first = Histogram.of_ms(group.first_bytes_ms)
        self._durations[record.outcome].add(whole)
        self._first_byte.add(first)
        self.add_day(group.hour // DAY_S, DayTimes(whole, first))
        payer = self._payer(record.subscriber, record.status, record.outcome)
        if payer is not None:
            self._count("sidecar_subscriber_calls", (payer,), group.calls)
        if record.usage is not None:
            self._add_usage(record.usage, group.calls, group.tokens.get, record.route, payer)
            if group.priced:
                self._add_cost(record.usage, group.cost_pico / PICO, record.route, payer)
            if group.without_price:
                self._add_unpriced(record.usage, group.without_price)

    @property
    def days(self) -> Mapping[int, DayTimes]:
        """By number of the day since 1970, UTC."""
        self._count_gathered()
        return self._days

    def add_day(self, number: int, times: DayTimes) -> None:
        """More times of a day."""
        day = self._day(number)
        day.whole.add(times.whole)
        day.first_byte.add(times.first_byte)

    def count(self, name: str, text: str, count: float = 1) -> None:
        self._count_capped(name, tuple(text.split("\t")) if text else (), count)

    def gate_decided(self, decision: str, source: str, limit: str | None) -> None:
        """`limit`: the one that denied a call, or would have; None: none did."""
        self._count_capped("sidecar_gate_decisions", (decision, source, limit or ""))

    def set_gate(
        self,
        questions: Mapping[Key, int],
        unanswered: Mapping[Key, int],
        down: Mapping[str, bool],
    ) -> None:
        """All that was counted of those whom the gate asks outside. Their reasons are fixed words."""
        self._counters["sidecar_gate_questions"] = {**questions}
        self._counters["sidecar_gate_unanswered"] = {**unanswered}
        self._gauges["sidecar_gate_source_down"] = {(name,): int(is_down) for name, is_down in down.items()}

    def set_shared_limits(self, failures: int, *, is_away: bool) -> None:
        """How it stands with limits that are shared with other sidecars."""
        self._gauges["sidecar_limits_away"][()] = int(is_away)
        self._counters["sidecar_limits_failures"] = {(): failures}

    def add(self, counts: Iterable[tuple[str, str, float]]) -> None:
        """What a process that serves has counted (`HopCounts.take`): family, label, count."""
        for name, text, count in counts:
            self.count(name, text, count)

    def set_open(self, *, connections: int, drains: int) -> None:
        """What is open in all processes that serve."""
        self._gauges["sidecar_connections"][()] = connections
        self._gauges["sidecar_drains"][()] = drains

    def connections_changed(self, delta: int) -> None:
        self._gauges["sidecar_connections"][()] += delta

    def drains_changed(self, delta: int) -> None:
        self._gauges["sidecar_drains"][()] += delta

    # --- happenings in the spool ----------------------------------------------------------------

    def committed(self, records: int, size_bytes: int, seconds: float) -> None:
        self._counters["sidecar_commits"][()] += 1
        self._counters["sidecar_committed_records"][()] += records
        self._counters["sidecar_committed_bytes"][()] += size_bytes
        self._commits.observe(seconds)

    # --- happenings in delivery -----------------------------------------------------------------

    def sealed(self, backend: str, events: int) -> None:
        self._count("sidecar_sealed_events", (backend,), events)

    def batch_settled(self, backend: str, verdicts: Sequence[Verdict], seconds: float) -> None:
        """One request to a backend was answered, or was not."""
        kinds = Counter(map(type, verdicts))
        for kind, count in kinds.items():
            self._count("sidecar_verdicts", (backend, kind.__name__.lower()), count)
        if kinds.keys() & {Retry, Unknown, Blocked}:
            failure = next(v.reason for v in verdicts if isinstance(v, Retry | Unknown | Blocked))
            self._count_capped("sidecar_send_failures", (backend, failure))
        self._histograms["sidecar_send_seconds"].setdefault((backend,), Histogram()).observe(seconds)

    def parked(self, backend: str, reason: str, count: int) -> None:
        self._count_capped("sidecar_parked", (backend, reason), count)

    def skipped(self, backend: str, reason: str, count: int) -> None:
        self._count_capped("sidecar_skipped", (backend, reason), count)

    def blocked(self, backend: str, reason: str | None) -> None:
        """A backend takes nothing until an operator acts; None: it takes again."""
        self._gauges["sidecar_blocked"][(backend,)] = 0 if reason is None else 1

    def collecting(self, consumer: str, *, reading: bool, pending: int, aside: int) -> None:
        """How `collect` stands; `serve` has none of these series, so that an alert can ask for the first."""
        self._gauges["sidecar_collect_reading"][(consumer,)] = int(reading)
        self._gauges["sidecar_collect_pending"][(consumer,)] = pending
        self._gauges["sidecar_collect_aside"][(consumer,)] = aside
        self._count("sidecar_collect_missed", (consumer,), 0)
        for outcome in ("stored", "duplicate", "aside"):
            self._count("sidecar_collected", (outcome,), 0)

    # --- reading ---------------------------------------------------------------------------------

    def exposition(self, gauges: Gauges) -> bytes:
        """The text that Prometheus scrapes, with the figures of the moment."""
        self._count_gathered()
        self._set_gauges(gauges)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        registry.register(ProcessCollector(registry=None))  # `process_*` of this process
        return generate_latest(registry)

    def collect(self) -> Iterable[Metric]:
        """One family after the other, in the order of the table above."""
        for name, family in FAMILIES.items():
            yield from self._family(name, family)

    # --- helpers ---------------------------------------------------------------------------------

    def _count(self, name: str, key: Key, count: float = 1) -> None:
        counts = self._counters[name]
        counts[key] = counts.get(key, 0) + count

    def _count_capped(self, name: str, key: Key, count: float = 1) -> None:
        counts = self._counters[name]
        if key not in counts:
            key = tuple(map(label, key))
            if key not in counts and len(counts) >= REASONS_MAX:
                key = (*key[:-1], "other")
        counts[key] = counts.get(key, 0) + count

    def _day(self, number: int) -> DayTimes:
        found = self._days.get(number)
        if found is None:
            found = self._days[number] = DayTimes()
            while len(self._days) > DAYS_MAX:
                del self._days[min(self._days)]
        return found

    def _payer(self, subscriber: Subscriber | None, status: int | None, outcome: Outcome) -> str | None:
        """The label of who pays, of which there are not too many; None: nobody is told apart. A credential that the
        upstream turned down is nobody's, as in the ledger: made-up keys take no place."""
        if not self._subscribers_max:
            return None
        if subscriber is None:
            return NOBODY
        if status in (401, 403) and outcome is not Outcome.DENIED:
            return UNAUTHENTICATED
        known = self._subscribers.get(subscriber.id)
        if known is None:
            if len(self._subscribers) >= self._subscribers_max:
                return OTHER
            known = self._subscribers[subscriber.id] = label(subscriber.id)
        return known

    def _count_usage(self, exchange: Exchange, payer: str | None) -> None:
        usage = exchange.usage
        assert usage is not None
        self._add_usage(usage, 1, partial(getattr, usage), exchange.route, payer)
        cost = exchange.cost
        if cost is not None and cost.get("total") is None:
            # Of a call that failed, or is free, nothing was consumed that had a price.
            if cost.get("reason") in NO_PRICE and usage.usage_state is not UsageState.ABSENT:
                self._add_unpriced(usage, 1)
        elif cost is not None and cost.get("currency") == "USD":
            self._add_cost(usage, float(cost["total"]), exchange.route, payer)

    def _add_cost(self, usage: Usage, usd: float, route: str | None, payer: str | None) -> None:
        self._count("sidecar_cost_usd", self._of_model(usage), usd)
        self._count("sidecar_route_cost_usd", (route or "other",), usd)
        if payer is not None:
            self._count("sidecar_subscriber_cost_usd", (payer,), usd)

    def _add_unpriced(self, usage: Usage, calls: int) -> None:
        self._count("sidecar_unpriced_calls", self._of_model(usage), calls)

    def _of_model(self, usage: Usage) -> tuple[str, str]:
        """The labels of a model, of which there are not too many."""
        provider = usage.provider or "other"
        model = usage.model or usage.request_model or "other"
        known = self._models.get(model)
        if known is None:
            known = "other"
            if len(self._models) < MODELS_MAX:
                known = self._models[model] = label(model)
        return provider, known

    def _add_usage(
        self, usage: Usage, calls: int, tokens_of: Callable[[str], int | None], route: str | None, payer: str | None
    ) -> None:
        """`tokens_of`: how many of a kind, by the name of its field."""
        provider, model = self._of_model(usage)
        state = (usage.usage_state, provider, model)
        self._usage[state] = self._usage.get(state, 0) + calls
        for kind, attribute in _TOKEN_KINDS:
            tokens = tokens_of(attribute)
            if tokens:
                key = (kind, provider, model)
                self._tokens[key] = self._tokens.get(key, 0) + tokens
                if kind in _BOTH_WAYS:
                    self._count("sidecar_route_tokens", (route or "other", kind), tokens)
                    if payer is not None:
                        self._count("sidecar_subscriber_tokens", (payer, kind), tokens)

    def value_not_computed(self, meter: str) -> None:
        """An expression gave no number for a record, and the ledger adds nothing for it."""
        self._count("sidecar_meter_values_not_computed", (meter,), 1)

    def _start_at_zero(self, backends: Sequence[str]) -> None:
        for name, family in FAMILIES.items():
            if not family.labels and family.kind != "histogram":
                (self._counters if family.kind == "counter" else self._gauges)[name][()] = 0
        self._counters["sidecar_lost"].update({(reason,): 0 for reason in LOST_REASONS})
        self._counters["sidecar_frames_given_up"].update({(why,): 0 for why in GIVEN_UP})
        self._counters["sidecar_usage_anomalies"][("answer_unclaimed",)] = 0  # an alert asks for its increase
        self._counters["sidecar_rejected"].update({(reason,): 0 for reason in REJECTED_REASONS})
        self._counters["sidecar_limits_reached"].update({(name,): 0 for name in LIMITS})
        self._counters["sidecar_upstream_failures"].update({(reason,): 0 for reason in UPSTREAM_FAILURES})
        self._counters["sidecar_upstream_redirects"].update({(what,): 0 for what in REDIRECTS})
        self._counters["sidecar_attribution_anomalies"].update({(kind,): 0 for kind in ATTRIBUTION_ANOMALIES})
        for backend in backends:
            self._gauges["sidecar_blocked"][(backend,)] = 0
            self._gauges["sidecar_retry_after_seconds"][(backend,)] = 0
            self._counters["sidecar_sealed_events"][(backend,)] = 0
            for verdict in ("delivered", "duplicate", "retry", "refused", "blocked", "unknown"):
                self._counters["sidecar_verdicts"][(backend, verdict)] = 0

    def _set_gauges(self, gauges: Gauges) -> None:
        balance = gauges.balance
        # No series rather than an old figure, or one that looks like a restart.
        self._counters["sidecar_admitted"] = {} if balance is None else {(): balance.admitted}
        self._counters["sidecar_recorded"] = {} if balance is None else {(): balance.recorded}
        self._gauges["sidecar_open"] = {} if balance is None else {(): balance.open}
        self._gauges["sidecar_balance_holds"] = {} if balance is None else {(): int(balance.holds)}
        self._gauges["sidecar_spool_degraded"][()] = int(gauges.degraded)
        self._gauges["sidecar_directory_copied"][()] = int(gauges.copied)
        self._gauges["sidecar_disk_free_bytes"][()] = gauges.disk_free_bytes
        self._gauges["sidecar_disk_bytes"][()] = gauges.disk_bytes
        self._gauges["sidecar_disk_low_bytes"][()] = gauges.disk_low_bytes
        self._gauges["sidecar_chunks_set_aside"][()] = gauges.chunks_set_aside
        # Here and not where a process counts: the sum over workers is no version.
        self._gauges["sidecar_build_info"] = {(sidecar.__version__, platform.python_version()): 1}
        self._gauges["sidecar_spool_bytes"][()] = gauges.spool_bytes
        self._gauges["sidecar_ledger_bytes"][()] = gauges.ledger_bytes
        self._gauges["sidecar_pending"] = {(name,): value for name, value in gauges.pending.items()}
        parked: Counter[Key] = Counter()
        for (name, why), value in gauges.parked.items():
            parked[(name, label(why))] += value
        self._gauges["sidecar_parked_now"] = dict(parked)
        self._gauges["sidecar_oldest_pending_seconds"] = {(n,): v for n, v in gauges.oldest_pending_s.items()}
        self._gauges["sidecar_retry_after_seconds"] = {(n,): v for n, v in gauges.retry_after_s.items()}
        self._gauges["sidecar_instance_lag_seconds"] = {(label(n),): v for n, v in gauges.instance_lag_s.items()}
        self._gauges["sidecar_instance_silent_seconds"] = {(label(n),): v for n, v in gauges.instance_silent_s.items()}
        for name, lanes in (
            ("sidecar_lanes_held", gauges.lanes_held),
            ("sidecar_lanes_resting", gauges.lanes_resting),
            ("sidecar_lanes_unheld", gauges.lanes_unheld),
        ):
            # No series rather than none held: `min` over sidecars is then over those that take part.
            self._gauges[name] = {} if lanes is None else {(): lanes}

    def _family(self, name: str, family: Family) -> Iterator[Metric]:
        if family.kind == "histogram":
            histogram = HistogramMetricFamily(name, family.help, labels=family.labels)
            for key, row in self._histograms[name].items():
                histogram.add_metric(key, row.buckets(), row.total)
            yield histogram
            return
        counts = (self._counters if family.kind == "counter" else self._gauges)[name]
        kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
        metric = kind(name, family.help, labels=family.labels)
        for key, value in counts.items():
            metric.add_metric(key, value)
        yield metric
