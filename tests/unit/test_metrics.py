"""The counters: what is counted, that labels stay bounded, and that processes add up."""

from __future__ import annotations

import sys
from dataclasses import replace
from math import nextafter
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.model.balance import Balance
from sidecar.model.call_group import CallKind, Gathering
from sidecar.model.delivery import Delivered, Refused, Retry, Unknown, Verdict
from sidecar.model.exchange import Exchange, Outcome, Subscriber, Usage, UsageState
from sidecar.model.record import encode
from sidecar.runtime.hop_counts import HopCounts
from sidecar.runtime.metrics import (
    FAMILIES,
    GATHERED_CALLS_MAX,
    MODELS_MAX,
    REASONS_MAX,
    SECONDS,
    Gauges,
    Histogram,
    Metrics,
)


def call(
    *,
    model: str | None = "m",
    status: int | None = 200,
    route: str | None = "/v1/chat/completions",
    method: str = "POST",
) -> Exchange:
    usage = Usage(usage_state=UsageState.FINAL, provider="openai", model=model, input_tokens=3, output_tokens=0)
    return Exchange(
        method=method,
        url="http://u/v1",
        route=route,
        status=status,
        outcome=Outcome.COMPLETE,
        duration_ms=12.0,
        first_byte_ms=3.0,
        request_bytes=10,
        response_bytes=20,
        usage=usage,
    )


def samples(metrics: Metrics, gauges: Gauges | None = None) -> dict[tuple[Any, ...], float]:
    text = metrics.exposition(gauges or Gauges()).decode()
    return {
        (s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }


def test_a_call_is_counted_with_its_bytes_times_and_tokens() -> None:
    metrics = Metrics()
    metrics.call_ended(call())
    metrics.call_ended(call(status=None, route=None, method="BREW"))
    seen = samples(metrics)
    labels = (("method", "POST"), ("outcome", "complete"), ("route", "/v1/chat/completions"), ("status_class", "2xx"))
    assert seen[("sidecar_calls_total", *labels)] == 1
    odd = (("method", "other"), ("outcome", "complete"), ("route", "other"), ("status_class", "none"))
    assert seen[("sidecar_calls_total", *odd)] == 1
    assert seen[("sidecar_request_bytes_total",)] == 20
    assert seen[("sidecar_tokens_total", ("kind", "input"), ("model", "m"), ("provider", "openai"))] == 6
    assert seen[("sidecar_call_duration_seconds_count", ("outcome", "complete"))] == 2
    assert seen[("sidecar_call_duration_seconds_bucket", ("le", "0.01"), ("outcome", "complete"))] == 0
    assert seen[("sidecar_call_duration_seconds_bucket", ("le", "0.025"), ("outcome", "complete"))] == 2


def test_what_an_alert_waits_for_is_there_at_zero() -> None:
    seen = samples(Metrics(backends=["stripe"]))
    assert seen[("sidecar_lost_total", ("reason", "spool_full"))] == 0
    assert seen[("sidecar_released_uncommitted_total",)] == 0
    assert seen[("sidecar_blocked", ("backend", "stripe"))] == 0
    assert seen[("sidecar_verdicts_total", ("backend", "stripe"), ("verdict", "unknown"))] == 0


def test_labels_stay_bounded() -> None:
    metrics = Metrics()
    for number in range(MODELS_MAX + 50):
        metrics.call_ended(call(model=f"made-up-{number}"))
    for number in range(REASONS_MAX + 50):
        metrics.parked("stripe", f"code_{number}", 1)
    seen = samples(metrics)
    assert len({key for key in seen if key[0] == "sidecar_usage_total"}) == MODELS_MAX + 1
    parked = {key: value for key, value in seen.items() if key[0] == "sidecar_parked_total"}
    assert len(parked) == REASONS_MAX + 1
    assert sum(parked.values()) == REASONS_MAX + 50


def test_subscribers_are_labels_only_where_asked_for_and_up_to_a_number() -> None:
    def of(number: int, *, status: int = 200) -> Exchange:
        one = call(status=status)
        one.subscriber = Subscriber(id=f"who-{number}", source="header:x-tenant")
        one.cost = {"currency": "USD", "total": "0.25"}
        return one

    silent, metrics = Metrics(), Metrics(subscribers_max=3)
    for number in range(10):
        for each in (silent, metrics):
            each.call_ended(of(number, status=401))  # made-up keys take no place
            each.call_ended(of(number))
    metrics.call_ended(call())
    assert not [key for key in samples(silent) if key[0].startswith("sidecar_subscriber_")]
    seen = samples(metrics)
    calls = {key[1][1]: value for key, value in seen.items() if key[0] == "sidecar_subscriber_calls_total"}
    assert calls == {"who-0": 1, "who-1": 1, "who-2": 1, "other": 7, "unauthenticated": 10, "none": 1}
    assert seen[("sidecar_subscriber_cost_usd_total", ("subscriber", "other"))] == 7 * 0.25
    assert seen[("sidecar_subscriber_tokens_total", ("kind", "input"), ("subscriber", "other"))] == 7 * 3
    assert seen[("sidecar_route_cost_usd_total", ("route", "/v1/chat/completions"))] == 20 * 0.25
    assert seen[("sidecar_route_tokens_total", ("kind", "input"), ("route", "/v1/chat/completions"))] == 21 * 3


def test_no_label_moves_a_cursor_ends_a_line_or_has_no_end() -> None:
    metrics = Metrics()
    for model in ("x\x00y", "\x1b[31mred", "a\nb", "a\r\u202eb", "lone \udc00", "long " * 1_000):
        metrics.call_ended(call(model=model))
        metrics.parked("stripe", model, 1)
        metrics.parked("stripe", model, 1)
        metrics.usage_anomaly(model)
    gauges = Gauges(parked={("stripe", "a\x00"): 1, ("stripe", "a\x01"): 2})
    text = metrics.exposition(gauges).decode()
    assert all(line.isprintable() and len(line) < 400 for line in text.splitlines())
    seen = samples(metrics, gauges)
    assert seen[("sidecar_usage_total", ("model", "x�y"), ("provider", "openai"), ("state", "final"))] == 1
    assert seen[("sidecar_parked_total", ("backend", "stripe"), ("reason", "�[31mred"))] == 2
    assert seen[("sidecar_parked_now", ("backend", "stripe"), ("reason", "a�"))] == 3


def test_what_a_process_that_serves_has_counted_adds_up() -> None:
    whole = Metrics(backends=["ledger"])
    for _ in range(2):
        hop = HopCounts()
        hop.limit_reached("connections")
        hop.lost("stopped", 3)
        whole.add(hop.take())
        assert hop.take() == []
    seen = samples(whole)
    assert seen[("sidecar_limits_reached_total", ("limit", "connections"))] == 2
    assert seen[("sidecar_lost_total", ("reason", "stopped"))] == 6


def test_why_requests_came_to_nothing_is_counted() -> None:
    metrics = Metrics(backends=["meter"])
    timeout = Unknown("timeout")
    batches: list[list[Verdict]] = [[Retry("refused")] * 3, [timeout], [Delivered(), timeout], [Refused("no")]]
    for verdicts in batches:
        metrics.batch_settled("meter", verdicts, 0.01)
    seen = {key: value for key, value in samples(metrics).items() if key[0] == "sidecar_send_failures_total"}
    name = "sidecar_send_failures_total"
    assert seen == {
        (name, ("backend", "meter"), ("reason", "refused")): 1,
        (name, ("backend", "meter"), ("reason", "timeout")): 2,
    }


def test_the_figures_of_the_moment_come_with_the_scrape() -> None:
    balance = Balance(admitted=7, recorded=5, open=1)
    gauges = Gauges(balance=balance, pending={"ledger": 4}, parked={("ledger", "no"): 2})
    gauges.ledger_bytes, gauges.spool_bytes = 9, 8
    seen = samples(Metrics(), gauges)
    assert seen[("sidecar_admitted_total",)] == 7
    assert seen[("sidecar_balance_holds",)] == 0
    assert seen[("sidecar_ledger_bytes",)] == 9
    assert seen[("sidecar_spool_bytes",)] == 8
    assert seen[("sidecar_pending", ("backend", "ledger"))] == 4
    assert seen[("sidecar_parked_now", ("backend", "ledger"), ("reason", "no"))] == 2


def test_a_balance_that_cannot_be_read_leaves_no_old_figures() -> None:
    metrics = Metrics()
    assert ("sidecar_admitted_total",) in samples(metrics, Gauges(balance=Balance(admitted=7, recorded=7)))
    without = samples(metrics, Gauges(balance=None, disk_bytes=9))
    assert not {(f"sidecar_{name}",) for name in ("admitted_total", "recorded_total", "open", "balance_holds")} & set(
        without
    )
    assert without[("sidecar_disk_bytes",)] == 9


def test_every_family_has_help_and_the_projects_prefix() -> None:
    assert all(name.startswith("sidecar_") and family.help for name, family in FAMILIES.items())


def test_lanes_are_told_by_those_that_deliver_together() -> None:
    names = {"sidecar_lanes_held", "sidecar_lanes_resting", "sidecar_lanes_unheld"}
    metrics = Metrics(backends=())
    assert not names & {key[0] for key in samples(metrics)}
    found = samples(metrics, Gauges(lanes_held=0, lanes_resting=3, lanes_unheld=None))
    assert {key: value for key, value in found.items() if key[0] in names} == {
        ("sidecar_lanes_held",): 0,
        ("sidecar_lanes_resting",): 3,
    }, "what is not known is no number"


def test_times_counted_together_are_those_counted_one_by_one() -> None:
    at_the_edges = [edge for bound in SECONDS for edge in (bound, nextafter(bound, 0.0), nextafter(bound, 1e9))]
    seconds = [0.0, *at_the_edges, *at_the_edges[::2], 1e6]
    together, one_by_one = Histogram(), Histogram()
    together.observe_all(seconds)
    for each in seconds:
        one_by_one.observe(each)
    assert together.counts == one_by_one.counts
    assert together.total == pytest.approx(one_by_one.total)


def gathered(line: bytes, hour: int = 0, calls: int = 1) -> Gathering:
    return Gathering(CallKind(line), hour, [line] * calls, [(10, 20)] * calls, [(12.0, 3.0)] * calls)


def test_calls_that_came_together_are_counted_once_when_somebody_looks() -> None:
    metrics = Metrics()
    line = encode(call(), seq=1, instance="a")
    metrics.calls_ended(gathered(line, calls=3))
    metrics.calls_ended(gathered(line, hour=86_400, calls=2))
    for _ in range(2):
        seen = samples(metrics)
        assert seen[("sidecar_call_duration_seconds_count", ("outcome", "complete"))] == 5
        assert seen[("sidecar_first_byte_seconds_sum",)] == pytest.approx(5 * 0.003)
        assert seen[("sidecar_request_bytes_total",)] == 50
    metrics.calls_ended(gathered(line))
    assert {day: sum(times.whole.counts) for day, times in metrics.days.items()} == {0: 4, 1: 2}


def test_of_calls_that_wait_to_be_counted_only_so_many_are_kept() -> None:
    metrics = Metrics()
    kept = gathered(encode(call(), seq=1, instance="a"), calls=GATHERED_CALLS_MAX)
    metrics.calls_ended(kept)
    before = sys.getrefcount(kept)
    metrics.calls_ended(gathered(encode(call(), seq=2, instance="a")))
    assert sys.getrefcount(kept) == before - 1


def test_calls_that_cannot_be_counted_hide_no_others(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    metrics.calls_ended(gathered(b"no record"))
    metrics.calls_ended(gathered(encode(call(), seq=1, instance="a")))
    assert samples(metrics)[("sidecar_request_bytes_total",)] == 10
    assert [record.message for record in caplog.records] == [
        "calls could not be counted; they are recorded all the same"
    ]


def test_those_who_call_first_are_told_apart_whichever_way_their_calls_are_counted() -> None:
    metrics = Metrics(subscribers_max=1)
    first, second = (replace(call(), subscriber=Subscriber(name, "header:x-tenant")) for name in ("first", "second"))
    metrics.calls_ended(gathered(encode(first, seq=1, instance="a")))
    metrics.call_ended(second)
    seen = samples(metrics)
    assert seen[("sidecar_subscriber_calls_total", ("subscriber", "first"))] == 1
    assert seen[("sidecar_subscriber_calls_total", ("subscriber", "other"))] == 1
