"""The record's form: every kind of record is what docs/record.schema.json says, which is what the model says."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from support.backend_fixtures import HOSTILE, odd_records, record, usage
from support.schema import SCHEMA_FILE, faults
from support.usage_samples import load, play

from sidecar.backends import backend_settings
from sidecar.model.exchange import (
    URL_CHARS_MAX,
    USAGE_FIELDS,
    Exchange,
    Gate,
    Outcome,
    Subscriber,
    Usage,
    UsageState,
    cut_usage,
)
from sidecar.model.exchange import cut as cut_text
from sidecar.model.record import RECORD_VERSION, Record, encode
from sidecar.model.record_schema import FIELDS, LEFT_OUT, OUTCOMES, schema, text
from sidecar.prices import price_book
from sidecar.runtime import factory
from sidecar.settings import load as load_settings
from sidecar.spool.types import encode_intent, settle

SAMPLES = {name: sample for name, sample in load().items() if not sample.websocket}
SETTINGS = load_settings({"SIDECAR_UPSTREAM_URL": "https://api.openai.com"}, backend_settings=backend_settings())


def exchange(**changes: Any) -> Exchange:
    known: dict[str, Any] = {
        "id": "0199f7a0-0000-7000-8000-000000000001",
        "method": "POST",
        "url": "https://api.example.com/v1/x",
        "started_ns": 1_763_629_200_123_456_789,
        "status": 200,
        "outcome": Outcome.COMPLETE,
        "subscriber": Subscriber("acme", "header:x-tenant"),
    }
    return Exchange(**(known | changes))


def test_the_published_schema_is_what_the_model_says() -> None:
    assert SCHEMA_FILE.read_text() == text(), "python tests/readme_tables.py writes it anew"
    Draft202012Validator.check_schema(schema())


def test_the_schema_has_the_fields_of_the_line_in_their_order() -> None:
    full = exchange(charge={"total": "1"}, gate=Gate("undecided", source="", sent=False), upstream="openai")
    row = json.loads(encode(full, seq=1, instance="i"))
    Draft202012Validator(schema()).validate(row | {"charge": None})
    rare = {"cost", "charge", "gate", "upstream"}  # behind the others in a line
    assert [name for name in FIELDS if name not in rare] == [name for name in row if name not in rare]
    assert set(FIELDS) == set(row)
    assert row["version"] == RECORD_VERSION == 1
    bare = json.loads(encode(exchange(), seq=1, instance="i"))
    assert set(schema()["required"]) <= set(bare)
    assert set(FIELDS) - set(bare) <= LEFT_OUT
    assert set(schema()["properties"]["usage"]["properties"]) == set(USAGE_FIELDS)
    assert set(OUTCOMES) == set(Outcome)


@pytest.mark.parametrize("each", odd_records(), ids=lambda each: str(each.seq))
def test_odd_records_are_of_that_form(each: Record) -> None:
    assert faults(each.json) == []


@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_outcome_is(outcome: Outcome) -> None:
    assert faults(encode(exchange(outcome=outcome, status=None, error="it broke"), seq=1, instance="i")) == []


@pytest.mark.parametrize(
    "gate",
    [
        Gate("allowed"),
        Gate("denied", "acme-monthly", "limits", 0.25, {"acme-monthly|acme|1793491200": 1200}),
        Gate(
            "allowed", None, "limits", 0.0, {"a|b|c": 2**70, "a|b|d": 1}, at_most={"a|b|c": 7}, units={"a": "cost_usd"}
        ),
        Gate("shadow", None, "on_failure", 12.5),
    ],
    ids=lambda gate: gate.decision,
)
def test_what_the_gate_said_is(gate: Gate) -> None:
    assert faults(encode(exchange(gate=gate, outcome=Outcome.DENIED, status=402), seq=1, instance="i")) == []


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_what_providers_state_is_with_its_cost(name: str) -> None:
    """Every recorded response, read and priced."""
    sample = SAMPLES[name]
    try:
        found, _ = play(sample, [sample.body])
    except AssertionError:
        found = None  # nobody reads that one
    one = exchange(usage=found, url=f"https://api.openai.com{sample.path}", status=sample.status)
    factory.pricing(SETTINGS, price_book(SETTINGS))(one)
    assert faults(encode(one, seq=1, instance="i")) == []


@pytest.mark.parametrize("name", ["openai_chat.json", "anthropic_messages.json"])
def test_what_customers_are_charged_is(name: str, tmp_path: Any) -> None:
    file = tmp_path / "sidecar.toml"
    file.write_text('[[prices]]\nfor = "customer"\nprovider = "*"\nmodel = "*"\nmarkup = "1.25"\n')
    settings = load_settings(
        {"SIDECAR_UPSTREAM_URL": "https://api.openai.com", "SIDECAR_CONFIG": str(file)},
        backend_settings=backend_settings(),
    )
    one = exchange(usage=play(SAMPLES[name], [SAMPLES[name].body])[0])
    factory.pricing(settings, price_book(settings))(one)
    assert one.charge is not None
    line = encode(one, seq=1, instance="i")
    assert faults(line) == []
    charge = json.loads(line)["charge"]
    if charge["total"] is None:
        assert charge["state"] == "unpriced"
    else:
        assert sum(map(Decimal, charge["parts"].values())) == Decimal(charge["total"])


def test_what_is_cut_is() -> None:
    cut = usage(model="m" * 5000, request_model="é" * 5000, service_tier="x" * 600, error="e" * 5000)
    cut_usage(cut, lambda _: None)
    one = exchange(
        usage=cut,
        url=cut_text("http://up/" + "a" * 5000, URL_CHARS_MAX),
        user_agent=cut_text("u" * 5000, 512),
        request_headers=[cut_text("X-" + "h" * 5000, 128)] * 32,
        dimensions={"d" * 100: "v" * 5000},
    )
    assert one.url.endswith("…")
    assert faults(encode(one, seq=1, instance="i")) == []


def test_a_call_that_was_found_open_is() -> None:
    line = settle(encode_intent(exchange(), instance="i"), seq=7, instance="i")
    assert json.loads(line)["version"] == RECORD_VERSION
    assert faults(line) == []


def test_what_json_cannot_hold_is_written_so_that_it_is() -> None:
    found = Usage(usage_state=UsageState.FINAL, input_tokens=2**80, raw_usage={"x": [2**90, b"y"]})
    odd = exchange(url="http://up/\udcff", request_headers=["\udcff"], dimensions={"\udcff": HOSTILE}, usage=found)
    assert faults(encode(odd, seq=1, instance="i")) == []


@given(st.dictionaries(st.sampled_from([n for n in USAGE_FIELDS if n.endswith("_tokens")]), st.integers(0, 2**80)))
def test_token_counts_of_any_size_are(counts: dict[str, int]) -> None:
    found = Usage(usage_state=UsageState.PARTIAL)
    for name, count in counts.items():
        setattr(found, name, count)
    one = exchange(usage=found)
    assert faults(encode(one, seq=1, instance="i")) == []


def test_a_record_of_before_the_version_still_is() -> None:
    row = json.loads(record(1).json)
    del row["version"]
    assert faults(json.dumps(row).encode()) == []
    assert Record.from_json(json.dumps(row).encode()).seq == 1


def test_a_later_field_does_no_harm() -> None:
    row = json.loads(record(1).json) | {"upstream": "openai", "shard": 7}
    row["usage"]["thoughts"] = 1
    assert faults(json.dumps(row).encode()) == []
    assert Record.from_json(json.dumps(row).encode()).seq == 1


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda row: row.pop(name)


@pytest.mark.parametrize(
    "spoil",
    [
        *[_without(name) for name in schema()["required"]],
        lambda row: row.update(version=2),
        lambda row: row.update(seq=-1),
        lambda row: row.update(seq="1"),
        lambda row: row.update(outcome="done"),
        lambda row: row.update(status="200"),
        lambda row: row.update(started_at="2026-11-21T09:00:00+01:00"),
        lambda row: row.update(subscriber="acme"),
        lambda row: row.update(request_headers={"a": "b"}),
        lambda row: row.update(dimensions={"a": 1}),
        lambda row: row.update(duration_ms=-1),
        lambda row: row.update(upstream=3),
        lambda row: row.update(gate={"decision": "maybe", "limit": None, "source": "limits", "age_s": 0}),
        lambda row: row.update(cost={"total": 0.5}),
        lambda row: row["usage"].update(usage_state="unknown"),
        lambda row: row["usage"].update(units=[1]),
        lambda row: row["usage"].update(model=7),
        lambda row: row["usage"].pop("input_tokens"),
    ],
)
def test_what_is_not_of_that_form_is_found(spoil: Callable[[dict[str, Any]], object]) -> None:
    row = json.loads(record(1).json)
    spoil(row)
    assert faults(json.dumps(row).encode()) != []
