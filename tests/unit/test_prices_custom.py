"""Prices of one's own: which one holds, what a customer is charged, and every fault of a definition, all at once."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from sidecar.backends import backend_settings
from sidecar.meters.definition import DEFAULT_METERS, Kind, Meter
from sidecar.model.exchange import Exchange, Outcome, Usage, UsageState
from sidecar.model.record import Record, encode
from sidecar.prices import PriceBook, PricesError, TableError, faults, notes, price_book, table_of
from sidecar.prices.book import ESTIMATES, UNKNOWNS
from sidecar.prices.custom import AMOUNTS, CONTEXTS, read_prices
from sidecar.prices.table import builtin
from sidecar.settings import Settings, SettingsError, load

NOW_S = datetime(2026, 11, 20, 12, 0, tzinfo=UTC).timestamp()
TABLE = builtin()
MILLION = {"input_tokens": 1_000_000, "output_tokens": 100_000}


def book(*tables: dict[str, Any], meters: tuple[Meter, ...] = DEFAULT_METERS) -> PriceBook:
    return PriceBook(TABLE, read_prices(tables, meters))


def usage(provider: str | None = "openai", model: str | None = "gpt-5", **more: Any) -> Usage:
    return Usage(**{"usage_state": UsageState.FINAL, "provider": provider, "model": model, **MILLION, **more})


def cost(prices: PriceBook, call: Usage | None = None, started_s: float = NOW_S, **more: Any) -> str | None:
    found, _ = prices.cost(call or usage(), started_s, **more)
    assert found is not None
    total: str | None = found["total"]
    return total


def charge(prices: PriceBook, call: Usage | None = None, **more: Any) -> tuple[str | None, str, str | None]:
    call = call or usage()
    found, amount = prices.charge(call, NOW_S, prices.cost(call, NOW_S, **more), **more)
    assert found is not None
    assert (found["total"] is None) == (amount is None)
    return found["total"], found["state"], found.get("reason")


def record(call: Usage | None = None, **more: Any) -> Record:
    exchange = Exchange(
        **{
            "method": "GET",
            "url": "https://api.example.com/v1/things",
            "id": "0" * 36,
            "started_ns": int(NOW_S * 1e9),
            "first_byte_ms": 1.0,
            "duration_ms": 2.0,
            "status": 200,
            "outcome": Outcome.COMPLETE,
            "usage": call,
            **more,
        }
    )
    return Record.from_json(encode(exchange, seq=1, instance="i"))


OWN = {"provider": "openai", "model": "gpt-5*", "input": "1", "output": "8"}


def test_one_s_own_price_goes_before_the_table_s() -> None:
    prices = book(OWN)
    found, _ = prices.cost(usage(), NOW_S)
    assert found == {
        "currency": "USD",
        "total": "1.8",
        "parts": {"input": "1", "output": "0.8"},
        "state": "exact",
        "source": "custom",
        "model": "gpt-5*",
    }
    assert cost(prices, usage(model="gpt-4o")) == "3.5"  # the table's
    assert cost(prices, usage(provider="azure.ai.openai")) == "2.25"


def test_a_model_of_nobody_has_the_price_that_it_is_given() -> None:
    prices = book({"provider": "ollama", "model": "*", "input": 0, "output": "0.000001", "per": 1})
    assert cost(prices, usage("ollama", "llama3.3")) == "0.1"


def test_output_without_a_price_is_not_free() -> None:
    found, _ = book({"provider": "openai", "model": "*", "input": "1"}).cost(usage(), NOW_S)
    assert found is not None
    assert (found["total"], found["state"], found["reason"]) == ("1", "estimated", "unpriced_unit")


def test_amounts_stay_in_the_currency_of_their_list() -> None:
    call = usage("alibaba.dashscope", "qwen-max")
    found, _ = book().cost(call, NOW_S)
    assert found is not None
    assert (found["total"], found["state"]) == (None, "unpriced")  # its list is in CNY, which is no reason for a guess
    own = {"provider": "alibaba.dashscope", "model": "qwen-*", "input": "2.4", "output": "9.6", "currency": "CNY"}
    found, _ = book(own).cost(call, NOW_S)
    assert found is not None
    assert (found["total"], found["currency"]) == ("3.36", "CNY")


def test_the_most_specific_holds() -> None:
    prices = book(
        {"provider": "*", "model": "*", "input": "1", "output": "0"},
        {"provider": "openai", "model": "*", "input": "2", "output": "0"},
        {"provider": "openai", "model": "gpt-*", "input": "3", "output": "0"},
        {"provider": "openai", "model": "gpt-5-mini", "input": "4", "output": "0"},
        {"provider": "*", "model": "gpt-5-mini", "input": "5", "output": "0"},
    )
    for provider, model, dollars in (
        ("mistral_ai", "x", "1"),
        ("openai", "o3", "2"),
        ("openai", "gpt-5", "3"),
        ("openai", "gpt-5-mini", "4"),
        ("azure.ai.openai", "gpt-5-mini", "5"),
    ):
        assert cost(prices, usage(provider, model)) == dollars


def test_the_table_s_word_for_a_provider_will_do_too() -> None:
    assert cost(book({"provider": "aws", "model": "*", "input": "7"}), usage("aws.bedrock", "m")) == "7"
    assert cost(book({"provider": "aws.bedrock", "model": "*", "input": "7"}), usage("aws.bedrock", "m")) == "7"


def test_a_price_holds_from_a_day_until_the_next() -> None:
    prices = book(
        {**OWN, "from": date(2026, 1, 1), "input": "1"},
        {**OWN, "from": "2026-06-01", "until": date(2026, 7, 1), "input": "2"},
    )
    by_day = {"2025-12-31": "2.25", "2026-01-01": "1.8", "2026-05-31": "1.8", "2026-06-01": "2.8", "2026-07-01": "2.25"}
    for day, dollars in by_day.items():
        at = datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
        assert cost(prices, started_s=at) == dollars, day


def test_tiers_hold_for_the_whole_request_and_caches_have_their_prices() -> None:
    own = {**OWN, "cache_read": "0.1", "cache_write_5m": "1.25", "cache_write_1h": "2"}
    prices = book({**own, "tiers": [{"above": 200_000, "input": "2", "cache_read": "0.2"}]})
    call = usage(
        input_tokens=200_001,
        output_tokens=0,
        cache_read_input_tokens=100_000,
        cache_write_input_tokens=2_000,
        cache_write_1h_input_tokens=1_000,
    )
    found, _ = prices.cost(call, NOW_S)
    assert found is not None
    assert found["parts"] == {
        "input": "0.196002",
        "cache_read": "0.02",
        "cache_write": "0.00125",
        "cache_write_1h": "0.002",
    }


def test_terms_of_service_multiply_and_those_that_are_not_named_are_an_estimate() -> None:
    prices = book({**OWN, "multipliers": {"batch": "0.5", "priority": "2"}})
    assert cost(prices, batch=True) == "0.9"
    assert cost(prices, usage(service_tier="priority")) == "3.6"
    found, _ = prices.cost(usage(service_tier="flex"), NOW_S)
    assert found is not None
    assert (found["total"], found["state"], found["reason"]) == ("1.8", "estimated", "tier")


def test_a_markup_alone_multiplies_what_would_hold() -> None:
    prices = book({"provider": "openai", "model": "*", "markup": "0.9", "minimum": "3"})
    assert cost(prices) == "3"  # 2.25 x 0.9, and at least that
    assert cost(prices, usage(input_tokens=10_000_000)) == "12.15"
    found, _ = prices.cost(usage(), NOW_S)
    assert found is not None
    assert found["source"] == f"custom+{TABLE.source}"
    assert found["parts"] == {"input": "1.125", "output": "0.9", "minimum": "0.975"}


# The customer's side


def test_without_a_price_for_it_there_is_no_charge() -> None:
    prices = book(OWN)
    assert not prices.charges
    assert prices.charge(usage(), NOW_S, prices.cost(usage(), NOW_S)) == (None, None)


def test_a_charge_is_a_multiple_of_the_cost() -> None:
    prices = book({"for": "customer", "provider": "*", "model": "*", "markup": "1.2"})
    assert prices.charges
    assert cost(prices) == "2.25"
    assert charge(prices) == ("2.7", "exact", None)
    assert charge(prices, usage(model="gpt-5-mini-2099-01-01")) == (None, "unpriced", "unknown_model")
    assert charge(prices, usage("exa", None, cost_usd="0.01", usage_state=UsageState.ABSENT)) == (
        "0.012",
        "declared",
        None,
    )


def test_a_charge_has_amounts_of_its_own_in_another_currency() -> None:
    own = {"for": "customer", "provider": "openai", "model": "*", "input": "3", "output": "20", "currency": "EUR"}
    prices = book(own)
    found, _ = prices.charge(usage(), NOW_S, prices.cost(usage(), NOW_S))
    assert found is not None
    assert (found["currency"], found["total"], found["state"]) == ("EUR", "5", "exact")
    assert charge(prices, usage(model="gpt-5-mini-2099-01-01")) == ("5", "exact", None)
    other = usage("mistral_ai", "mistral-large-latest")
    assert prices.charge(other, NOW_S, prices.cost(other, NOW_S)) == (None, None)


def test_a_meter_has_a_price_too() -> None:
    prices = book({"for": "customer", "meter": "api_calls", "unit": "0.002"})
    assert prices.needs_record
    plain = record()
    assert prices.of_record(plain)[0] == (None, None)
    found, amount = prices.of_record(plain)[1]
    assert found is not None
    assert (found["total"], found["parts"], amount) == ("0.002", {"meter:api_calls": "0.002"}, 2_000_000_000)
    # An unreachable upstream's calls are measured by no meter.
    assert prices.of_record(record(outcome=Outcome.UNREACHABLE))[1] == (None, None)


def test_a_meter_s_price_is_added_to_the_model_s() -> None:
    prices = book(
        {"meter": "api_calls", "unit": "1", "per": 1000},
        {"for": "customer", "provider": "*", "model": "*", "markup": "2"},
        {"for": "customer", "meter": "output_tokens", "unit": "1", "per": 1_000_000},
    )
    (found, _), (paid, _) = prices.of_record(record(usage()))
    assert found is not None
    assert paid is not None
    assert found["parts"] == {"input": "1.25", "output": "1", "meter:api_calls": "0.001"}
    assert found["total"] == "2.251"
    assert paid["total"] == "4.602"
    unknown, _ = prices.cost(usage(), NOW_S)  # without the record: not all of it is known
    assert unknown is not None
    assert (unknown["state"], unknown["reason"]) == ("estimated", "meter")


# Faults


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"model": "m", "input": "1"}, "provider is missing"),
        ({"provider": "p", "input": "1"}, "model is missing"),
        ({"provider": "", "model": "m", "input": "1"}, "provider is wrong"),
        ({"provider": "p", "model": "m"}, "has no price"),
        ({"provider": "p", "model": "m", "input": "-1"}, "input is wrong: -1 is no amount"),
        ({"provider": "p", "model": "m", "input": 0.1}, 'input = 0.1 is a float.*put it in quotes, "0.1"'),
        ({"provider": "p", "model": "m", "input": "1e-3x"}, "input is wrong"),
        ({"provider": "p", "model": "m", "input": True}, "input is wrong"),
        ({"provider": "p", "model": "m", "input": "NaN"}, "input is wrong"),
        ({"provider": "p", "model": "m", "input": "1", "ouput": "2"}, "'ouput' is no field"),
        ({"provider": "p", "model": "m", "input": "1", "per": 0}, "per is wrong"),
        ({"provider": "p", "model": "m", "input": "1", "currency": "usd"}, "currency is wrong"),
        ({"provider": "p", "model": "m", "input": "1", "for": "me"}, "for is wrong"),
        ({"provider": "p", "model": "m", "input": "1", "from": "soon"}, "from is wrong"),
        ({"provider": "p", "model": "m", "input": "1", "from": datetime(2026, 1, 1, tzinfo=UTC)}, "from is wrong"),
        ({"provider": "p", "model": "m", "input": "1", "from": "2026-02-01", "until": "2026-02-01"}, "is not after"),
        ({"provider": "p", "model": "m", "input": "1", "tiers": {"above": 1}}, "tiers is wrong"),
        ({"provider": "p", "model": "m", "input": "1", "tiers": [{"input": "2"}]}, "tiers above is missing"),
        ({"provider": "p", "model": "m", "input": "1", "tiers": [{"above": 5, "output": "2"}]}, "has no base price"),
        ({"provider": "p", "model": "m", "input": "1", "tiers": [{"above": 5, "input": 2.5}]}, "is a float"),
        ({"provider": "p", "model": "m", "input": "1", "tiers": [{"above": 5}, {"above": 5}]}, "two begin above 5"),
        ({"provider": "p", "model": "m", "input": "1", "multipliers": {"bulk": "1"}}, "'bulk' is none of"),
        ({"provider": "p", "model": "m", "input": "1", "cache_write_1h": "1"}, "cache_write_5m is missing"),
        ({"provider": "p", "model": "m", "markup": "-2"}, "markup is wrong"),
        ({"provider": "p", "model": "m", "markup": "2", "currency": "EUR"}, "currency has no meaning"),
        ({"meter": "nope", "unit": "1"}, "there is no meter 'nope'; there are api_calls"),
        ({"meter": "api_calls"}, "unit is missing"),
        ({"meter": "api_calls", "unit": 0.5}, "unit = 0.5 is a float"),
        ({"meter": "api_calls", "unit": "1", "provider": "p"}, "'provider' is no field of a meter's price"),
        ({"meter": "peak", "unit": "1"}, "peak is a MAX"),
    ],
)
def test_a_fault_is_named(table: dict[str, Any], says: str) -> None:
    meters = (*DEFAULT_METERS, Meter(name="peak", kind=Kind.MAX, field="input_tokens"))
    with pytest.raises(PricesError, match=says) as raised:
        read_prices([table], meters)
    assert all(problem.startswith("prices number 1") for problem in raised.value.problems)


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ([OWN, OWN], "prices openai gpt-5* for the provider: stands there twice"),
        (
            [{**OWN, "from": "2026-01-01"}, {**OWN, "from": "2026-01-01"}],
            "prices openai gpt-5* for the provider: stands there twice from 2026-01-01",
        ),
        (
            [{**OWN, "until": "2026-06-01"}, {**OWN, "from": "2026-05-01"}],
            "prices openai gpt-5* for the provider: the one until 2026-06-01 and the one from 2026-05-01 overlap",
        ),
        (
            [{**OWN, "currency": "EUR"}, {"meter": "api_calls", "unit": "1"}],
            (
                "prices for the provider: a meter's price is added to the model's, and these are in EUR and USD: "
                "expected one currency"
            ),
        ),
        (
            # The cost of some calls is in euros, and what is charged for those is a multiple of it.
            [
                {**OWN, "currency": "EUR"},
                {"for": "customer", "provider": "*", "model": "*", "markup": "1.2"},
                {"for": "customer", "meter": "api_calls", "unit": "1"},
            ],
            (
                "prices for the customer: a meter's price is added to the model's, and these are in EUR and USD: "
                "expected one currency"
            ),
        ),
    ],
)
def test_entries_that_do_not_go_together_are_named(tables: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(PricesError) as raised:
        read_prices(tables, DEFAULT_METERS)
    assert raised.value.problems == (says,)


def test_days_that_two_claim_are_told_beside_what_else_is_wrong_with_either() -> None:
    with pytest.raises(PricesError) as raised:
        read_prices([{**OWN, "input": "-1"}, OWN], DEFAULT_METERS)
    assert [problem.partition(":")[0] for problem in raised.value.problems] == [
        "prices number 1 (openai gpt-5*)",
        "prices openai gpt-5* for the provider",
    ]


def test_a_multiple_of_dollars_goes_with_a_meter_in_dollars() -> None:
    markup = {"for": "customer", "provider": "*", "model": "*", "markup": "1.2"}
    assert len(read_prices([OWN, markup, {"for": "customer", "meter": "api_calls", "unit": "1"}], DEFAULT_METERS)) == 3


def test_a_provider_that_nobody_is_is_told_with_who_may_be_meant() -> None:
    with pytest.raises(PricesError, match=r"'opneai' is unknown here.*did you mean openai") as raised:
        read_prices([{**OWN, "provider": "opneai"}], DEFAULT_METERS, {"openai", "anthropic"})
    assert len(raised.value.problems) == 1
    for fit in ("openai", "OpenAI", "*"):
        assert read_prices([{**OWN, "provider": fit}], DEFAULT_METERS, {"openai", "anthropic"})


def test_the_record_s_word_for_a_provider_goes_before_the_table_s() -> None:
    tables = [{**OWN, "provider": "google", "input": "1"}, {**OWN, "provider": "gcp.vertex_ai", "input": "2"}]
    for prices in (book(*tables), book(*tables[::-1])):
        assert cost(prices, usage("gcp.vertex_ai", output_tokens=0)) == "2"
        assert cost(prices, usage("gcp.gemini", output_tokens=0)) == "1"


def test_charges_of_two_currencies_are_said(tmp_path: Path) -> None:
    head, own = '[[prices]]\nfor = "customer"\nprovider = "*"\n', 'input = "1"\ncurrency = "EUR"\n'
    markup = head + 'model = "*"\nmarkup = "1.2"\n'
    assert notes(settings(tmp_path, markup)) == []
    assert notes(settings(tmp_path, head + 'model = "a"\n' + own)) == []
    said = ["charges are in EUR and USD: a meter of charge adds them up as they are"]
    assert notes(settings(tmp_path, markup + head + 'model = "a"\n' + own)) == said
    of_cost = '[[prices]]\nprovider = "openai"\nmodel = "a"\n' + own
    assert notes(settings(tmp_path, markup + of_cost)) == said


def test_the_same_for_provider_and_customer_are_two(tmp_path: Path) -> None:
    assert len(read_prices([OWN, {**OWN, "for": "customer"}], DEFAULT_METERS)) == 2


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(PricesError) as raised:
        read_prices([{"model": "m", "input": -1, "x": 1}, {"meter": "no"}], DEFAULT_METERS)
    assert len(raised.value.problems) == 5


# Settings


def settings(tmp_path: Path, toml: str = "", **variables: str) -> Settings:
    path = tmp_path / "sidecar.toml"
    path.write_text(toml)
    environ = {"SIDECAR_CONFIG": str(path), "SIDECAR_UPSTREAM_URL": "https://api.openai.com", **variables}
    return load(environ, backend_settings=backend_settings(), judge=faults)


def test_prices_are_set_in_the_file(tmp_path: Path) -> None:
    text = '[[prices]]\nprovider = "openai"\nmodel = "*"\ninput = "9"\noutput = 1\nfrom = 2026-01-01\n'
    found = settings(tmp_path, text)
    assert ("[[prices]]", "*") in {(line.variable, line.value) for line in found.effective}
    assert cost(price_book(found)) == "9.1"


def test_the_table_is_a_setting(tmp_path: Path) -> None:
    assert price_book(settings(tmp_path)).source == TABLE.source
    assert price_book(settings(tmp_path, SIDECAR_PRICES="none")).table is None
    assert price_book(settings(tmp_path, 'prices = "none"\n')).table is None
    assert price_book(settings(tmp_path, SIDECAR_COST="declared")).declared_first
    file = tmp_path / "prices.json"
    file.write_text(
        '[{"id":"p","api_pattern":"x","models":[{"id":"m","match":{"equals":"m"},"prices":{"input_mtok":2}}]}]'
    )
    book = price_book(settings(tmp_path, SIDECAR_PRICES=str(file)))
    assert book.source.startswith("genai-prices/file-")
    assert cost(book, usage("p", "m", output_tokens=0)) == "2"


def test_faults_of_prices_are_told_with_all_others_at_the_start(tmp_path: Path) -> None:
    text = 'bogus = 1\n[[prices]]\nmodel = "m"\ninput = 0.5\n'
    with pytest.raises(SettingsError) as raised:
        settings(tmp_path, text, SIDECAR_PRICES=str(tmp_path / "nowhere.json"))
    said = "\n".join(raised.value.problems)
    for part in ("bogus", "provider is missing", "is a float", "nowhere.json: cannot be read: No such file"):
        assert part in said
    with pytest.raises(SettingsError, match=r"expected \[\[prices\]\] tables"):
        settings(tmp_path, "prices = 7\n")


def test_a_book_says_what_cannot_be_used(tmp_path: Path) -> None:
    found = load(
        {"SIDECAR_PRICES": str(tmp_path), "SIDECAR_CONFIG": ""}, backend_settings=backend_settings(), serving=False
    )
    with pytest.raises(PricesError, match="cannot be read: Is a directory"):
        price_book(found)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x.json", "a\0b"])
def test_a_path_that_is_none_is_told(name: str) -> None:
    with pytest.raises(TableError, match="is no path"):
        table_of(name)


# The page


PAGE = (Path(__file__).parent.parent.parent / "docs" / "prices.md").read_text()


def test_the_page_s_example_of_a_cost_is_what_is_made() -> None:
    shown = json.loads(PAGE.split("```json\n")[1].split("```")[0])
    call = usage(model="gpt-5-2025-08-07", input_tokens=1000, output_tokens=200, cache_read_input_tokens=300)
    assert PriceBook(TABLE).cost(call, NOW_S)[0] == shown


def test_the_page_s_prices_can_be_used() -> None:
    tables = tomllib.loads(PAGE.split("```toml\n")[1].split("```")[0])["prices"]
    prices = book(*tables)
    assert cost(prices) == "3.52"  # a million is above the tier
    assert charge(prices, record=record(usage())) == ("4.226", "exact", None)
    known = set(AMOUNTS) | set(CONTEXTS)
    assert known <= set(re.findall(r"`(\w+)`", PAGE))


def test_the_page_has_every_reason() -> None:
    first, second = PAGE.split("An estimate says why:")
    assert set(re.findall(r"`(\w+)`", first.split("| `unpriced` |")[1])) - {"total"} == set(UNKNOWNS)
    table = second.split("## Which price")[0]
    listed = [
        word for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for word in re.findall(r"`(\w+)`", line)
    ]
    assert sorted(listed) == sorted((*ESTIMATES, "reason"))  # and the head of the table
