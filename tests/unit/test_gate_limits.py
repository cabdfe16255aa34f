"""What limits say, what is wrong with them, and what a finished call adds to them."""

from __future__ import annotations

import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sidecar.backends import backend_settings
from sidecar.cli import main
from sidecar.gate.limits import (
    PICO,
    Action,
    Charging,
    Facts,
    Limit,
    LimitsError,
    bounded,
    oldest_start_ns,
    read_limits,
    remarks,
)
from sidecar.gate.owner import exchange_of
from sidecar.gate.windows import SECOND_NS, Calendar, Sliding
from sidecar.meters.definition import read_meters
from sidecar.model.exchange import Exchange, Gate, Outcome, Subscriber, Usage, UsageState
from sidecar.model.record import Record, encode
from sidecar.runtime import factory, gate_factory
from sidecar.settings import load
from sidecar.spool.frames import gate_of, packed_gate

METERS = read_meters(
    [
        {"name": "calls_ok", "aggregation": {"type": "COUNT"}, "filters": [{"key": "status_class", "values": ["2xx"]}]},
        {"name": "weighed", "aggregation": {"type": "SUM", "field": "output_tokens", "multiplier": "0.5"}},
        {"name": "peak", "aggregation": {"type": "MAX", "field": "output_tokens"}},
    ]
)
AT_NS = 1_795_000_000 * SECOND_NS


def read(text: str = "", *short: str, **there: Any) -> tuple[Limit, ...]:
    tables = tomllib.loads(text).get("limits", [])
    given: dict[str, Any] = {"meters": METERS, "dimensions": ["team"], "providers": ["openai"], "routes": ["/v1/x"]}
    given |= {"names": {"acme": "Acme Inc."}, **there}
    return read_limits(tables, short, **given)


def wrong(text: str = "", *short: str, **there: Any) -> list[str]:
    with pytest.raises(LimitsError) as caught:
        read(text, *short, **there)
    return list(caught.value.problems)


def test_the_long_form() -> None:
    (limit,) = read(
        """
        [[limits]]
        name = "acme-monthly"
        subscriber = "acme"
        unit = "cost_usd"
        amount = "0.000001500001"
        window = "month"
        timezone = "Europe/Berlin"
        anchor_day = 31
        action = "shadow"
        """
    )
    assert limit.scopes == (("subscriber", "acme"),)
    assert limit.amount == 1_500_001
    assert limit.text(limit.amount) == "0.000001500001"
    assert limit.action is Action.SHADOW
    assert isinstance(limit.window, Calendar)
    assert (limit.window.unit, limit.window.anchor_day) == ("month", 31)
    assert limit.needs_body
    assert not limit.is_rate


def test_the_short_form() -> None:
    found = read("", "calls=600/minute", "cost_usd=50.5/month", "concurrent=20", "total_tokens=1000/90s", "calls=9")
    assert [limit.name for limit in found] == [
        "calls-per-minute",
        "cost_usd-per-month",
        "concurrent",
        "total_tokens-per-90s",
        "calls-per-total",
    ]
    assert found[1].amount == int(Decimal("50.5") * PICO)
    assert found[3].window == Sliding(90)
    assert [limit.is_rate for limit in found] == [True, False, True, True, False]
    assert all(limit.scopes == (("subscriber", "*"),) for limit in found)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('unit = "tokens"\namount = 1\nwindow = "day"', "unit 'tokens' is unknown"),
        ('amount = 1\nwindow = "day"', "unit is missing"),
        ('unit = "meter:nobody"\namount = 1\nwindow = "day"', "there is no such meter, so nothing would ever reach it"),
        ('unit = "meter:peak"\namount = 1\nwindow = "day"', "a meter of kind MAX does not add up"),
        ('unit = "calls"\nwindow = "day"', "amount is missing"),
        ('unit = "calls"\namount = -1\nwindow = "day"', "amount is negative"),
        ('unit = "calls"\namount = "-1"\nwindow = "day"', "amount is negative"),
        ('unit = "cost_usd"\namount = 0.5\nwindow = "day"', "amount is a float, which is never exact"),
        ('unit = "calls"\namount = "1.5"\nwindow = "day"', "amount is finer than calls is counted"),
        ('unit = "calls"\namount = true\nwindow = "day"', "amount is wrong"),
        ('unit = "calls"\namount = 1', "window is missing"),
        ('unit = "calls"\namount = 1\nwindow = "fortnight"', "window 'fortnight' is unknown"),
        ('unit = "calls"\namount = 1\nwindow = "0s"', "window '0s' is unknown"),
        ('unit = "calls"\namount = 1\nwindow = "400d"', "window '400d' is unknown"),
        ('unit = "concurrent"\namount = 1\nwindow = "day"', "window has no meaning"),
        ('unit = "calls"\namount = 1\nwindow = "day"\ntimezone = "Mars/Base"', "timezone 'Mars/Base' is unknown"),
        ('unit = "calls"\namount = 1\nwindow = "day"\ntimezone = "../etc/passwd"', "is unknown"),
        ('unit = "calls"\namount = 1\nwindow = "day"\nanchor_day = 3', "anchor_day has a meaning only"),
        ('unit = "calls"\namount = 1\nwindow = "month"\nanchor_day = 32', "anchor_day is wrong"),
        ('unit = "calls"\namount = 1\nwindow = "day"\naction = "stop"', "action is wrong"),
        ('unit = "calls"\namount = 1\nwindow = "day"\ntenant = "x"', "'tenant' is no field of a limit"),
        ('unit = "calls"\namount = 1\nwindow = "day"\nprovider = "opnai"', "no call would ever reach this limit"),
        ('unit = "calls"\namount = 1\nwindow = "day"\nroute = "/v2"', "no call would ever reach this limit"),
        ('unit = "calls"\namount = 1\nwindow = "day"\ndimensions.feature = "x"', "no call is filed under it"),
        ('unit = "calls"\namount = 1\nwindow = "day"\nmodel = 3', "model is wrong"),
        ('unit = "calls"\namount = "2M"\nwindow = "day"', "as a text where it is no whole one: \"0.5\", not '2M'"),
        ('unit = "cost_usd"\namount = 1.5\nwindow = "day"', 'write it as a text: "1.5"'),
        ('unit = "calls"\namount = 1\nwindow = "day"\nsubscribr = "x"', "did you mean subscriber?"),
        ('unit = "calls"\namount = 1\nwindow = "day"\nprovider = "opnai"', "did you mean openai?"),
        ('unit = "calls"\namount = 1\nwindow = "day"\nmodel = "gpt-5*"', "model 'gpt-5*' is no pattern"),
        ('unit = "calls"\namount = 1\nwindow = "day"\nsubscriber = " acme"', "subscriber ' acme' is no pattern"),
        ('unit = "calls"\namount = 1\nwindow = "day"\nsubscriber = "Acme Inc."', "is what acme is called"),
        ('unit = "calls"\namount = 1\nwindow = "day"\nkey = "sk-secret"', "key is no id that a call can have"),
    ],
)
def test_what_is_wrong_is_said(table: str, said: str) -> None:
    (problem,) = wrong(f'[[limits]]\nname = "one"\n{table}')
    assert problem.startswith("limit one: ")
    assert said in problem


def test_all_that_is_wrong_is_said_at_once() -> None:
    problems = wrong(
        """
        [[limits]]
        name = "same"
        unit = "calls"
        amount = 1
        window = "day"
        [[limits]]
        name = "same"
        unit = "calls"
        amount = 2
        window = "hour"
        [[limits]]
        name = "bad name"
        unit = "cals"
        amount = -1
        window = "x"
        """,
        "calls:600",
        "calls=1/fortnight",
    )
    assert "limit same: is defined 2 times" in problems
    assert sum(problem.startswith("limit number 3: ") for problem in problems) == 4
    assert any(problem.startswith("SIDECAR_LIMITS: 'calls:600' is wrong") for problem in problems)
    assert any("calls=1/fortnight: window 'fortnight' is unknown" in problem for problem in problems)


def test_a_wrong_value_is_quoted_as_far_as_it_helps_to_find_it() -> None:
    long = "x" * 5000
    given = f'[[limits]]\nname = "a"\nunit = "{long}"\namount = "{long}"\nwindow = "{long}"\nmodel = " {long}"'
    problems = wrong(f'{given}\ntimezone = "{long}"\n{long} = 1', long, f"calls={long}/day", f"calls=1/{long}")
    assert len(problems) > 6
    assert max(map(len, problems)) < 400


@pytest.mark.parametrize("amount", ["inf", "-inf", "nan"])
def test_an_amount_that_is_no_number_is_not_to_be_written_as_a_text(amount: str) -> None:
    (problem,) = wrong(f'[[limits]]\nname = "a"\nunit = "calls"\namount = {amount}\nwindow = "day"')
    assert "expected a number of at least 0" in problem
    assert problem.endswith(f"not '{amount}'")


def test_a_name_that_stands_twice_is_said_beside_what_is_wrong_with_either() -> None:
    problems = wrong(
        """
        [[limits]]
        name = "same"
        unit = "calls"
        amount = -1
        window = "day"
        [[limits]]
        name = "same"
        unit = "calls"
        amount = 2
        window = "hour"
        """
    )
    assert [problem.partition(":")[0] for problem in problems] == ["limit same", "limit same"]
    assert "is defined 2 times" in problems[1]


def test_where_all_ids_are_hashes_a_limit_of_another_id_can_never_be_reached() -> None:
    table = '[[limits]]\nname = "a"\nunit = "calls"\namount = 1\nwindow = "day"\nsubscriber = "{}"'
    (problem,) = wrong(table.format("sk-secret"), hashed=True)
    assert "subscriber is no id that a call can have" in problem
    assert "sk-secret" not in problem, "it may be a key"
    for fit in ("key_" + "0123456789abcdef" * 2, "unauthenticated", "*", ""):
        assert read(table.format(fit), hashed=True)
    assert read(table.format("acme"))
    assert read(table.format("acme"), hashed=True, names={"acme": "acme"}), "it is configured"


def test_a_time_zone_that_changes_nothing_is_said() -> None:
    table = '[[limits]]\nname = "a"\nunit = "calls"\namount = 1\nwindow = "{}"\ntimezone = "{}"'
    for window, zone, said in (
        ("24h", "Europe/Berlin", True),
        ("total", "Asia/Tokyo", True),
        ("24h", "UTC", False),
        ("day", "Europe/Berlin", False),
    ):
        notes = remarks(read(table.format(window, zone)))
        assert notes == ([f"limit a: timezone {zone} changes nothing: its window has no calendar"] if said else [])


def test_values_with_commas_make_no_two_calls_one() -> None:
    (limit,) = read(
        '[[limits]]\nname = "pair"\nunit = "calls"\namount = 1\nwindow = "day"\nsubscriber = "*"\nmodel = "*"'
    )
    calls = [("a,b", "c"), ("a", "b,c"), ("a%2Cb", "c"), ("a%", "2Cb,c"), ("a|b", "c")]
    scopes = [limit.scope_of(Facts(subscriber=who, model=model)) for who, model in calls]
    assert len(set(scopes)) == len(calls)
    for scope, (who, model) in zip(scopes, calls, strict=True):
        assert scope is not None
        assert limit.values_of(scope) == {"subscriber": who, "model": model}
        assert limit.counts_in(scope, "2026-11-18", AT_NS)
        counter = limit.key(scope, AT_NS)
        assert counter.partition("|")[2].rpartition("|")[0] == scope, "as it is read back from a record"


def test_check_tells_what_is_wrong_with_limits_and_prices_also_where_meters_are_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sidecar.toml").write_text(
        """
        upstream_url = "https://api.example.com"
        [[meters]]
        name = "broken"
        aggregation = { type = "MEAN" }
        [[limits]]
        name = "on-a-meter"
        unit = "meter:broken"
        amount = -1
        window = "day"
        [[limits]]
        name = "bedrock"
        provider = "aws.bedrock"
        unit = "calls"
        amount = 1
        window = "day"
        [[limits]]
        name = "nobody"
        provider = "aws"
        unit = "calls"
        amount = 1
        window = "day"
        [[prices]]
        meter = "broken"
        unit = "-1"
        [[prices]]
        provider = "opnai"
        model = "m"
        input = "1"
        """
    )
    monkeypatch.setenv("SIDECAR_CONFIG", str(tmp_path / "sidecar.toml"))
    assert main(["check"]) == 2
    head, *told = capsys.readouterr().err.splitlines()
    assert head == "the configuration has 5 problems:"
    for begin in (
        "  meter broken: ",
        "  prices number 1 (broken): unit is wrong",
        "  prices number 2 (opnai m): provider 'opnai' is unknown",
        "  limit on-a-meter: amount is negative",
        "  limit nobody: provider 'aws' is unknown here",
    ):
        assert any(line.startswith(begin) for line in told), (begin, told)


def test_every_provider_that_a_record_can_name_may_have_a_limit() -> None:
    known = gate_factory.providers(load({}, backend_settings=backend_settings(), serving=False))
    assert known >= {"openai", "anthropic", "aws.bedrock", "gcp.vertex_ai", "ollama", "sglang", "huggingface.tei"}


def test_prices_of_ones_own_are_what_money_is_set_aside_by_without_a_table(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        """
        upstream_url = "https://api.openai.com"
        limits = "cost_usd=9/day"
        [[prices]]
        provider = "openai"
        model = "own"
        input = "1"
        output = "2"
        [[prices]]
        provider = "openai"
        model = "cn"
        input = "1"
        currency = "CNY"
        """
    )
    environ = {"SIDECAR_CONFIG": str(tmp_path / "s.toml"), "SIDECAR_PRICES": "none"}
    settings = load(environ, backend_settings=backend_settings())
    models = gate_factory.models(settings)(None)
    assert models is not None
    assert models.price is not None
    assert models.price("openai", "own", 10, 20, AT_NS) == 50_000_000
    assert models.price("openai", "cn", 10, 20, AT_NS) is None
    assert models.price("openai", "other", 10, 20, AT_NS) is None
    assert gate_factory.notes(settings) == ["limits of cost_usd do not count what is priced in CNY"]


def test_a_model_that_is_priced_by_something_else_than_tokens_has_a_price(tmp_path: Path) -> None:
    environ = {"SIDECAR_UPSTREAM_URL": "https://api.openai.com", "SIDECAR_LIMITS": "cost_usd=9/day"}
    models = gate_factory.models(load(environ, backend_settings=backend_settings()))(None)
    assert models is not None
    assert models.price is not None
    assert models.price("openai", "whisper-1", 10, 20, AT_NS) == 0
    assert models.price("openai", "nobody-knows-it", 10, 20, AT_NS) is None


def test_an_amount_of_nothing_is_allowed_and_said() -> None:
    limits = read('[[limits]]\nname = "stop"\nunit = "calls"\namount = 0\nwindow = "total"\nmodel = "gpt-5"')
    assert remarks(limits) == ["limit stop: its amount is 0: every call is denied"]
    # Nobody is told to wait for what never comes.
    assert not any(limit.is_rate for limit in read("", "calls=0/minute", "concurrent=0", "calls=0/90s"))


@pytest.mark.parametrize(
    ("scope", "facts", "expected"),
    [
        ("", {}, "unauthenticated"),
        ("", {"subscriber": "acme"}, "acme"),
        ('subscriber = "acme"', {"subscriber": "other"}, None),
        ('subscriber = "unauthenticated"', {}, "unauthenticated"),
        ('subscriber = ""', {"subscriber": "acme"}, ""),
        ('model = "gpt-5"', {"subscriber": "acme", "model": "gpt-5"}, "gpt-5"),
        ('model = "gpt-5"', {"subscriber": "acme"}, None),
        ('model = "*"', {"subscriber": "acme"}, None),
        ('model = "gpt-5"\nsubscriber = "*"', {"subscriber": "acme", "model": "gpt-5"}, "gpt-5,acme"),
        ('key = "*"', {"key": "key_1"}, "key_1"),
        ('key = "*"', {}, None),
        ('dimensions.team = "*"', {"dimensions": (("team", "a"),)}, "a"),
        # who leaves it out is not without a limit
        ('dimensions.team = "*"', {}, "(none)"),
        ('dimensions.team = "a"', {}, None),
        ('provider = "openai"', {"provider": "openai"}, "openai"),
        ('route = "/v1/x"', {"route": "/v1/x"}, "/v1/x"),
    ],
)
def test_which_counter_a_call_falls_under(scope: str, facts: dict[str, Any], expected: str | None) -> None:
    (limit,) = read(f'[[limits]]\nname = "one"\nunit = "calls"\namount = 1\nwindow = "total"\n{scope}')
    assert limit.scope_of(Facts(**facts)) == expected


LONG = "m" * 60_000


@pytest.mark.parametrize("scope", ['model = "*"', 'model = "*"\nsubscriber = "*"\ndimensions.team = "*"'])
def test_a_long_value_is_cut_in_a_counters_name_and_stays_a_counter_of_its_own(scope: str) -> None:
    (limit,) = read(f'[[limits]]\nname = "one"\nunit = "calls"\namount = 1\nwindow = "day"\n{scope}')

    def of(text: str) -> str:
        found = limit.scope_of(Facts(model=text, subscriber="s" + text, dimensions=(("team", "t" + text),)))
        assert found is not None
        return found

    values = [LONG, LONG + "x", LONG + ",", "%,|" * 20_000, "é" * 600, "\ud800" * 600, "m" * 512, "short"]
    scopes = [of(value) for value in values]
    assert len(set(scopes)) == len(values)
    for found in scopes:
        assert all(len(value) <= 512 for value in found.split(","))
        assert limit.counts_in(found, "2026-11-18", AT_NS)
        assert limit.values_of(found) is not None
    cut = of(LONG).split(",")[0]
    assert cut.startswith("mmm")
    assert cut[-33] == "…"
    assert of("m" * 512).split(",")[0] == "m" * 512


def test_a_limit_of_a_long_value_holds_for_that_alone() -> None:
    for more in ("", 'subscriber = "*"'):
        (limit,) = read(
            f'[[limits]]\nname = "one"\nunit = "calls"\namount = 1\nwindow = "day"\nmodel = "{LONG}"\n{more}'
        )
        scope = limit.scope_of(Facts(model=LONG, subscriber="a"))
        assert scope is not None
        assert limit.counts_in(scope, "2026-11-18", AT_NS)
        assert limit.scope_of(Facts(model=bounded(LONG), subscriber="a")) == scope
        assert limit.scope_of(Facts(model=LONG + "x", subscriber="a")) is None
        assert not limit.counts_in(scope.replace("…", "."), "2026-11-18", AT_NS)


def call(outcome: Outcome = Outcome.COMPLETE, state: UsageState | None = UsageState.FINAL, **given: Any) -> Exchange:
    usage = None
    if state is not None:
        usage = Usage(
            usage_state=state,
            model=given.pop("model", "gpt-5"),
            provider="openai",
            input_tokens=given.pop("input_tokens", 10),
            output_tokens=given.pop("output_tokens", 5),
            cost_usd=given.pop("cost_usd", None),
        )
    return Exchange(
        method="POST",
        url="u",
        subscriber=Subscriber("acme", "test"),
        outcome=outcome,
        usage=usage,
        started_ns=AT_NS,
        status=given.pop("status", 200),
        first_byte_ms=1.0,
        **given,
    )


LIMITS = read("", "calls=9", "input_tokens=9", "output_tokens=9", "total_tokens=9", "concurrent=9", "cost_usd=9")
HELD = {
    "calls-per-total|acme|total": 1,
    "total_tokens-per-total|acme|total": 100,
    "concurrent|acme|total": 1,
}


def charged(exchange: Exchange, unknown: str = "reserve", **given: Any) -> dict[str, tuple[int, int]]:
    charging = Charging(LIMITS, given.get("price"), unknown)
    return {charge.limit.unit: (charge.amount, charge.reserved) for charge in charging.charges(exchange)}


def test_a_known_usage_takes_the_place_of_what_was_reserved() -> None:
    found = charged(call(gate=Gate("allowed", reserved=HELD)))
    assert found == {
        "calls": (1, 1),
        "input_tokens": (10, 0),
        "output_tokens": (5, 0),
        "total_tokens": (15, 100),
        "concurrent": (0, 1),
    }


@pytest.mark.parametrize(
    ("key", "window", "more", "expected"),
    [
        # as it is
        ("one|acme|2026-11-18", "day", "", "one|acme|2026-11-18"),
        ("one|acme|2026-11", "month", "", "one|acme|2026-11"),
        ("one|acme|", "24h", "", "one|acme|"),
        # let in by another clock, in the period before or after
        ("one|acme|2026-11-17", "day", "", "one|acme|2026-11-17"),
        ("one|acme|2026-11-19", "day", "", "one|acme|2026-11-19"),
        ("one|acme|2027-02-01", "day", "", "one|acme|2027-02-01"),
        # what stood under this name had another window then, another scope, or another value
        ("one|acme|2026-11", "day", "", "one|acme|2026-11-18"),
        ("one|acme|", "month", "", "one|acme|2026-11"),
        ("one|acme|2026-11", "24h", "", "one|acme|"),
        ("one|acme|2026-11", "month", "anchor_day = 15", "one|acme|2026-11-15"),
        ("one|acme|2026-11-18", "day", 'subscriber = "*"\nmodel = "*"', "one|acme,gpt-5|2026-11-18"),
        ("one|acme,gpt-5|2026-11-18", "day", 'subscriber = ""', "one||2026-11-18"),
        ("one|acme|2026-11-18", "day", 'model = "gpt-5"', "one|gpt-5|2026-11-18"),
    ],
)
def test_a_limit_that_is_another_one_by_now_is_charged_by_what_the_record_says(
    key: str, window: str, more: str, expected: str
) -> None:
    (limit,) = read(f'[[limits]]\nname = "one"\nunit = "output_tokens"\namount = 9\nwindow = "{window}"\n{more}')
    (charge,) = Charging([limit]).charges(call(gate=Gate("allowed", reserved={key: 7})))
    assert (charge.key, charge.amount) == (expected, 5)
    assert charge.reserved == (7 if key == expected else 0)
    assert charge.scope == expected.split("|")[1]


@pytest.mark.parametrize(
    ("units", "reserved"), [({"one": "total_tokens"}, 7), (None, 7), ({"two": "cost_usd"}, 7), ({"one": "cost_usd"}, 0)]
)
def test_what_was_set_aside_in_another_unit_is_not_charged_in_this_one(
    units: dict[str, str] | None, reserved: int
) -> None:
    """A record that does not say the unit is of before, or of a limit that counts calls."""
    (limit,) = read('[[limits]]\nname = "one"\nunit = "total_tokens"\namount = 9\nwindow = "total"')
    gate = Gate("allowed", reserved={"one|acme|total": 7}, units=units)
    lost = call(Outcome.UNKNOWN, None, status=None, gate=gate)
    assert [(c.amount, c.reserved) for c in Charging([limit]).charges(lost)] == [(7, 7)] * (reserved > 0)
    (known,) = Charging([limit]).charges(call(gate=gate))
    assert (known.amount, known.reserved) == (15, reserved)


@pytest.mark.parametrize(
    ("state", "unknown", "expected"),
    [
        (UsageState.ABSENT, "reserve", 100),
        (UsageState.ABSENT, "observed", 0),
        (UsageState.ABSENT, "zero", 0),
        (UsageState.PARTIAL, "reserve", 100),
        (UsageState.PARTIAL, "observed", 15),
        (UsageState.PARTIAL, "zero", 0),
    ],
)
def test_a_usage_that_stays_unknown(state: UsageState, unknown: str, expected: int) -> None:
    tokens = {"input_tokens": None, "output_tokens": None} if state is UsageState.ABSENT else {}
    left = call(Outcome.CLIENT_LEFT, state, gate=Gate("allowed", reserved=HELD), **tokens)
    assert charged(left, unknown)["total_tokens"] == (expected, 100)
    assert charged(left, unknown)["calls"] == (1, 1)


@pytest.mark.parametrize(
    "exchange",
    [
        call(Outcome.DENIED, None),
        call(Outcome.REFUSED, None),
        call(Outcome.UNREACHABLE, UsageState.ABSENT, input_tokens=None, output_tokens=None, status=502),
        call(Outcome.COMPLETE, None, status=500),
        call(Outcome.COMPLETE, UsageState.ABSENT, input_tokens=None, output_tokens=None, status=429),
    ],
)
def test_what_consumed_nothing_gives_everything_back(exchange: Exchange) -> None:
    exchange.gate = Gate("allowed", reserved=HELD)
    assert charged(exchange) == {"calls": (0, 1), "total_tokens": (0, 100), "concurrent": (0, 1)}
    exchange.gate = None
    assert charged(exchange) == {}


@pytest.mark.parametrize("gate", [Gate("undecided", source="", sent=False), Gate("allowed", sent=False)])
def test_what_never_went_upstream_took_nothing(gate: Gate) -> None:
    left = call(Outcome.CLIENT_LEFT, None, status=None, gate=gate)
    assert charged(left) == {}
    assert charged(exchange_of(Record.from_json(encode(left, seq=1, instance="i")))) == {}


def test_a_call_whose_end_nobody_saw_is_charged_what_was_reserved() -> None:
    lost = call(Outcome.UNKNOWN, None, status=None, gate=Gate("allowed", reserved=HELD))
    assert charged(lost)["total_tokens"] == (100, 100)
    assert charged(lost, "observed")["total_tokens"] == (0, 100)
    assert charged(lost)["calls"] == (1, 1)


def test_a_message_of_a_socket_is_no_call_and_its_tokens_count() -> None:
    found = charged(call(parent_id="other"))
    assert "calls" not in found
    assert found["total_tokens"] == (15, 0)


def test_money_is_what_the_provider_says_else_what_the_table_says_else_what_was_reserved() -> None:
    assert charged(call(cost_usd="0.0031"))["cost_usd"] == (3_100_000_000, 0)
    assert charged(call(), price=lambda *asked: 42)["cost_usd"] == (42, 0)
    said = call(cost={"currency": "USD", "total": "0.25", "state": "exact"}, cost_usd="9")
    assert charged(said)["cost_usd"] == (250_000_000_000, 0)
    held = Gate("allowed", reserved={"cost_usd-per-total|acme|total": 7})
    assert charged(call(gate=held), price=lambda *asked: None)["cost_usd"] == (7, 7)
    assert charged(call(gate=held), "observed", price=lambda *asked: None)["cost_usd"] == (0, 7)


def test_what_a_call_can_have_taken_at_most_is_charged_where_its_usage_stays_unknown() -> None:
    (limit,) = read("", "total_tokens=5")
    key = "total_tokens-per-total|acme|total"

    def charged(gate: Gate, **given: Any) -> tuple[int, int]:
        (found,) = Charging([limit]).charges(call(gate=gate, **given))
        return found.amount, found.reserved

    cut = Gate("allowed", None, "limits", 0.0, {key: 900}, at_most={key: 30})
    left = {"outcome": Outcome.CLIENT_LEFT, "state": UsageState.ABSENT, "input_tokens": None, "output_tokens": None}
    assert charged(cut, **left) == (30, 900)
    assert charged(Gate("allowed", None, "limits", 0.0, {key: 900}, at_most={"other": 1}), **left) == (900, 900)
    assert charged(cut, state=UsageState.PARTIAL, outcome=Outcome.CLIENT_LEFT, output_tokens=90) == (100, 900)
    assert charged(cut) == (15, 900)
    line = encode(call(id="0" * 36, gate=cut), seq=1, instance="i")
    assert Record.from_json(line).gate == cut
    assert gate_of(packed_gate(cut)) == cut


def test_meters_count_in_millionths() -> None:
    limits = read("", "meter:calls_ok=5", "meter:weighed=5")
    found = {charge.limit.unit: charge.amount for charge in Charging(limits).charges(call())}
    assert found == {"meter:calls_ok": 1_000_000, "meter:weighed": 2_500_000}


def test_a_cost_that_nobody_knows_is_no_meter_of_nothing() -> None:
    meters = read_meters(
        [
            {
                "name": "spend",
                "aggregation": {"type": "SUM", "field": "cost_usd"},
                "filters": [{"key": "model", "values": ["gpt-5"]}],
            }
        ]
    )
    (limit,) = read("", "meter:spend=5", meters=meters)
    key = "meter-spend-per-total|acme|total"
    gate, dollar = Gate("allowed", reserved={key: 7}), {"currency": "USD", "total": "1.5"}

    def charged(unknown: str, **given: Any) -> int:
        (found,) = Charging([limit], None, unknown).charges(call(gate=gate, **given))
        return found.amount

    assert charged("reserve", cost=dollar) == 1_500_000
    assert charged("reserve") == 7
    assert charged("zero") == 0
    assert charged("reserve", model="gpt-4") == 0, "the meter does not measure it"
    assert limit.needs_cost
    assert remarks([limit], priced=False) == [
        "limit meter-spend-per-total: only costs that providers state are counted: there are no prices"
    ]


def test_a_limit_of_a_meter_of_money_asks_for_prices(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        """
        upstream_url = "https://api.openai.com"
        limits = "meter:spend=9/day"
        [[meters]]
        name = "spend"
        aggregation = { type = "SUM", field = "cost_usd" }
        [[prices]]
        provider = "openai"
        model = "own"
        input = "1"
        output = "2"
        """
    )
    environ = {"SIDECAR_CONFIG": str(tmp_path / "s.toml"), "SIDECAR_PRICES": "none"}
    models = gate_factory.models(load(environ, backend_settings=backend_settings()))(None)
    assert models is not None
    assert models.price is not None
    assert models.price("openai", "own", 10, 20, AT_NS) == 50_000_000


@pytest.mark.parametrize(
    ("target", "model", "provider"),
    [
        ("/v1/realtime?model=gpt-realtime", "gpt-realtime", "openai"),
        ("/v1/%72ealtime?x=1&model=gpt-realtime", "gpt-realtime", "openai"),
        ("/openai/realtime?api-version=1&deployment=gpt-rt", "gpt-rt", "openai"),
        ("/v1/responses?model=gpt-5", "gpt-5", "openai"),
        ("/v1/audio/transcriptions/realtime?model=voxtral", "voxtral", "mistral_ai"),
        ("/v1/realtime", None, "openai"),
        ("/v1/models?model=x", None, None),
    ],
)
def test_which_model_a_socket_is_of_its_target_says(target: str, model: str | None, provider: str | None) -> None:
    environ = {"SIDECAR_UPSTREAM_URL": "http://127.0.0.1:1", "SIDECAR_LIMITS": "calls=9/day"}
    settings = load(environ, backend_settings=backend_settings())
    policy = gate_factory.policy(settings, factory.usage_taps(settings, lambda kind: None), b"k" * 32)
    assert policy is not None
    meant = policy.meant("GET", target, None)
    assert (meant.model, meant.provider, meant.consumes) == (model, provider, False)
    assert policy.meant("POST", "/v1/realtime?model=x", None).model is None, "no socket begins so"


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ('model = "*"\nunit = "calls"\nwindow = "month"', "model"),
        ('key = "*"\nunit = "calls"\nwindow = "8d"', "key"),
        ('"dimensions.team" = "*"\nunit = "calls"\nwindow = "total"', "dimensions.team"),
        ('unit = "meter:weighed"\nwindow = "year"', "a meter:weighed"),
        ('model = "*"\nunit = "calls"\nwindow = "day"', None),
        ('model = "*"\nunit = "calls"\nwindow = "7d"', None),
        ('model = "*"\nunit = "concurrent"', None),
        ('provider = "*"\nunit = "calls"\nwindow = "month"', None),
    ],
)
def test_what_a_start_does_not_know_of_a_limit_is_said(fields: str, what: str | None) -> None:
    made = read(f'[[limits]]\nname = "one"\namount = 1\n{fields}')
    assert remarks(made) == []
    found = remarks(made, kept_s=7 * 86_400.0)
    assert len(found) == (what is not None)
    if what is not None:
        assert found[0].startswith(f"limit one: the ledger's sums by hour do not know it by {what}: ")


def test_of_limits_that_are_shared_nothing_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        '[[limits]]\nname = "one"\nunit = "calls"\namount = 1\nwindow = "month"\nmodel = "*"\n'
    )
    environ = {"SIDECAR_CONFIG": str(tmp_path / "s.toml"), "SIDECAR_UPSTREAM_URL": "http://127.0.0.1:1"}
    for more, count in (({}, 1), ({"SIDECAR_LEDGER_URL": "postgresql://x@127.0.0.1/x"}, 0)):
        settings = load({**environ, **more}, backend_settings=backend_settings())
        assert len(gate_factory.notes(settings)) == count


def test_how_far_back_records_count() -> None:
    limits = read("", "calls=1/hour", "calls=1/90s", "concurrent=1")
    assert oldest_start_ns(limits, AT_NS) == AT_NS - AT_NS % (3600 * SECOND_NS)
    assert oldest_start_ns(read("", "calls=1"), AT_NS) == 0
    assert oldest_start_ns((), AT_NS) == AT_NS
