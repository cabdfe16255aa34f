"""Expressions in CEL: two libraries agree on them, their decimals are exact, and none can stop the metering."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import celpy
import pytest
from celpy import celtypes
from celpy.evaluation import CELEvalError
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backend_fixtures import odd_records, record, usage

from sidecar.meters.definition import MetersError, read_meters
from sidecar.meters.expression import (
    EXPRESSION_CHARS_MAX,
    FUNCTIONS,
    Expression,
    ExpressionError,
    Failure,
    Result,
    compile_expression,
    exact,
)
from sidecar.meters.properties import FIXED, FLAGS, TEXTS, WHOLE, Vocabulary, value_of
from sidecar.model.delivery import AddsUp
from sidecar.model.record import Record
from sidecar.runtime.backend_factory import backends
from sidecar.runtime.metrics import Gauges, Metrics
from sidecar.settings import Settings

# A second opinion

celpy.Environment()  # raises the limit of recursion, once


def by_celpy(text: str, names: tuple[str, ...], given_record: Record) -> Result:
    """What `cel-python` makes of it, which shares no code with the library that is used."""
    environment = celpy.Environment(runner_class=celpy.InterpretedRunner)
    program = environment.program(environment.compile(text))
    values = {name: value for name in names if (value := value_of(given_record, name)) is not None}
    try:
        found: Any = program.evaluate({name: wrapped(value) for name, value in values.items()})
    except (CELEvalError, ArithmeticError, TypeError, ValueError):
        return None if len(values) < len(names) else Failure("")
    if isinstance(found, (bool, celtypes.BoolType, str)) or not isinstance(found, (int, float)):
        return Failure("")
    if isinstance(found, int):
        return int(found)
    amount = exact(float(found))
    return Failure("") if amount is None else amount


def wrapped(value: Any) -> Any:
    if isinstance(value, bool):
        return celtypes.BoolType(value)
    if isinstance(value, int):
        return celtypes.IntType(value)
    return celtypes.DoubleType(value) if isinstance(value, Decimal) else celtypes.StringType(value)


WRITTEN = (
    "input_tokens * 2 + output_tokens",
    "double(input_tokens) * 0.00000125 + double(output_tokens) * 0.00001",
    "model.startsWith('gpt') ? input_tokens : 0",
    "model == 'gpt-5' ? 1.25 : model.startsWith('claude') ? 3.0 : double(status) / 100.0",
    "status in [200, 201] ? 1 : 0",
    "status >= 200 && status < 300 ? output_tokens : 0",
    "streamed ? 1 : 2",
    "unit_audio_seconds * 2.0",
    "cost_usd * 1.2",
    "dimension_team == 'a' ? 3 : 4",
    "model.matches('^gpt-5.*') ? 1 : 2",
    "model.contains('mini') || model.endsWith('5') ? 1 : 2",
    "[input_tokens, output_tokens].map(x, x * 2).size()",
    "[1, 2, 200].exists(x, x == status) ? 1 : 0",
    "(input_tokens + 999) / 1000",
    "input_tokens % 7",
    "-output_tokens",
    "output_tokens / input_tokens",
    "output_tokens % input_tokens",
    "input_tokens * input_tokens * input_tokens",
    "int(duration_ms / 1000.0) + 1",
    "int(cost_usd * 1000000.0)",
    "duration_ms > 1000.0 ? 1 : 0",
    "double(output_tokens) / double(input_tokens)",
    "!streamed || input_tokens > 10 ? input_tokens : output_tokens",
    "size(method)",
    "unit_audio_seconds > 1.0 || true ? 1 : 2",
    "true || unit_audio_seconds > 1.0 ? 1 : 2",
    "input_tokens > output_tokens ? input_tokens : output_tokens",
    "{'gpt-5': 2, 'gpt-5-mini': 1}[request_model]",
    "double(request_bytes + response_bytes) / 1048576.0",
)

records = st.builds(
    lambda model, sent, received, status, streamed, seconds, cost, team, duration: record(
        1, status=status, duration_ms=duration, dimensions={} if team is None else {"team": team},
        usage=usage(
            model=model, request_model=model, input_tokens=sent, output_tokens=received, streamed=streamed,
            units={} if seconds is None else {"audio_seconds": seconds}, cost_usd=cost,
        ),
    ),
    st.sampled_from(["gpt-5", "gpt-5-mini", "claude-opus-4", "o5", ""]),
    st.none() | st.sampled_from([0, 1, 2**31, 2**62]) | st.integers(0, 10**7),
    st.none() | st.integers(0, 10**7), st.sampled_from([200, 201, 404, 500]), st.booleans(),
    st.none() | st.floats(0, 1e6), st.none() | st.decimals(0, 100, places=6).map(str),
    st.none() | st.sampled_from(["a", "b"]), st.floats(0, 1e6),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(records)
def test_both_libraries_give_the_same(given_record: Record) -> None:
    for text in WRITTEN:
        found = compiled(text).result(given_record)
        other = by_celpy(text, compiled(text).names, given_record)
        if isinstance(found, Failure) or isinstance(other, Failure):
            # Where something is unknown besides, `cel-python` cannot tell which of both it is.
            assert not isinstance(found, (int, Decimal)), (text, found, other)
            assert not isinstance(other, (int, Decimal)), (text, found, other)
        else:
            assert found == other, text


_COMPILED: dict[str, Expression] = {}


def compiled(text: str) -> Expression:
    if text not in _COMPILED:
        _COMPILED[text] = compile_expression(text)
    return _COMPILED[text]


def made_up(chance: random.Random, depth: int, kind: str) -> str:
    """A random expression of a kind: int, double, bool or string."""
    if depth <= 0 or chance.random() < 0.15:
        return chance.choice(
            {
                "int": ["input_tokens", "output_tokens", "status", "request_bytes", str(chance.randrange(1000))],
                "double": ["duration_ms", "cost_usd", f"{chance.randrange(10**6) / 1000}", "0.1"],
                "bool": ["streamed", "true", "false"],
                "string": ["model", "method", "'gpt-5'", "dimension_feature"],
            }[kind]
        )

    def part(of: str) -> str:
        return made_up(chance, depth - 1, of)

    ways: list[Callable[[], str]] = {
        "int": [
            lambda: f"({part('int')} {chance.choice('+-*/%')} {part('int')})",
            lambda: f"({part('bool')} ? {part('int')} : {part('int')})",
            lambda: f"-{part('int')}",
            lambda: f"int({part('double')})",
        ],
        "double": [
            lambda: f"({part('double')} {chance.choice('+-*/')} {part('double')})",
            lambda: f"double({part('int')})",
            lambda: f"({part('bool')} ? {part('double')} : {part('double')})",
        ],
        "bool": [
            lambda: f"({part('int')} {chance.choice(['<', '<=', '>', '>=', '==', '!='])} {part('int')})",
            lambda: f"({part('double')} {chance.choice(['<', '>'])} {part('double')})",
            lambda: f"({part('bool')} {chance.choice(['&&', '||'])} {part('bool')})",
            lambda: f"!{part('bool')}",
            lambda: f"{part('string')}.{chance.choice(['startsWith', 'endsWith', 'contains'])}({part('string')})",
            lambda: f"({part('string')} == {part('string')})",
            lambda: f"({part('int')} in [1, 200, {part('int')}])",
        ],
        "string": [lambda: f"({part('string')} + {part('string')})", lambda: f"string({part('string')})"],
    }[kind]
    return chance.choice(ways)()


def test_both_libraries_give_the_same_for_expressions_made_up_by_chance() -> None:
    seed = 7
    chance = random.Random(seed)
    calls = [each for each in odd_records() if each.subscriber is None or each.subscriber.id.isascii()]
    compared = 0
    while compared < 150:
        text = made_up(chance, chance.randrange(1, 5), chance.choice(["int", "double"]))
        try:
            found = compile_expression(text)
        except ExpressionError:
            continue
        for each in chance.sample(calls, 3):
            ours, theirs = found.result(each), by_celpy(text, found.names, each)
            if type(ours) in (int, Decimal) and type(theirs) in (int, Decimal):
                assert ours == theirs, f"seed {seed}: {text}"
                compared += 1


# Decimals


@pytest.mark.parametrize(
    ("value", "billed"),
    [
        (0.1 + 0.2, "0.3"),
        (1.1 * 1.1, "1.21"),
        (0.1 * 3, "0.3"),
        (30 * 0.1, "3"),
        (64.5, "64.5"),
        (1e-7, "0.0000001"),
        (1.23456789012345e-12, "0.000000000001234567890123"),
        (1e-24, "0.000000000000000000000001"),
        (1e-30, "0"),
        (-0.0, "0"),
        (2.0**53, "9007199254740992"),
        (9007199254740991.0, "9007199254740991"),
        (1e18, "1000000000000000000"),
        (123456789.12345679, "123456789.123457"),
    ],
)
def test_a_double_is_billed_as_the_decimal_that_was_meant(value: float, billed: str) -> None:
    found = exact(value)
    assert found is not None
    assert found == Decimal(billed)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e300, 1e19])
def test_what_is_no_amount_is_none(value: float) -> None:
    assert exact(value) is None


@given(st.decimals(-(10**9), 10**9, places=6))
def test_a_decimal_of_15_digits_comes_back_as_it_went_in(amount: Decimal) -> None:
    assert exact(float(amount)) == amount


# What cannot be used, and what cannot be computed


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("(" * 400 + "1" + ")" * 400, "cannot be read"),
        ("-(" * 300 + "1" + ")" * 300, "cannot be read"),
        ("[" * 400 + "1" + "]" * 400, "cannot be read"),
        ("size(" * 160 + "'a'" + ")" * 160, "cannot be read"),
        ("'" + "a" * EXPRESSION_CHARS_MAX + "'", "longer than 1000"),
        ("1" * 200, "cannot be read"),
        ("'abc", "cannot be read"),
        ("1\x00", "cannot be read"),
        ("'\ud800'.size()", "cannot be read"),
        ("[1].map(x, [1].map(y, y)).size()", "at most 1"),
        ("['a'].map(x, x + x).map(x, x + x).size()", "at most 1"),
        ("[1].exists(x, model.matches('a')) ? 1 : 2", "none beside a macro"),
        ("model.matches(model) ? 1 : 2", "not written down"),
        ("matches(model, 'a') ? 1 : 2", "not written down"),
        ("model.matches('a' + 'b') ? 1 : 2", "not written down"),
        (r"model.matches('\\pL{100}') ? 1 : 2", "costs too much"),
        ("model.matches('((a{0,9}){0,9}){0,9}') ? 1 : 2", "costs too much"),
        ("model.matches('" + "." * 50 + "') ? 1 : 2", "costs too much"),
        ("model.matches('(') ? 1 : 2", "no regular expression"),
        (" || ".join(["model.matches('a')"] * 5) + " ? 1 : 2", "too many matches"),
        ("model == 'gpt-5' ? input_tokens * 1.5 : 1.0", "types do not go together"),
        ("status == 200 ? model : 'x'", "gives no number"),
        ("model == 'a' ? 1 : true", "gives no number"),
        ("lowerAscii(model) == 'a' ? 1 : 2", "uses lowerAscii(), which is no function"),
        ("false ? nothing : 1", "reads nothing, which no record has"),
        ("1 / 0", "gives no number for any"),
        ("[1].map(y, y).size() + y", "outside of its macro"),
    ],
)
def test_what_could_harm_is_a_fault_of_the_configuration(text: str, word: str) -> None:
    with pytest.raises(ExpressionError, match=word.replace("(", r"\(").replace(")", r"\)")):
        compile_expression(text)
    with pytest.raises(MetersError, match="meter m: aggregation expression"):
        read_meters([{"name": "m", "aggregation": {"type": "SUM", "expression": text}}])


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        ("output_tokens / input_tokens", {"input_tokens": 0}, "division by zero"),
        ("output_tokens % input_tokens", {"input_tokens": 0}, "division by zero"),
        ("input_tokens * input_tokens", {"input_tokens": 2**62}, "overflow: beyond 64 bits"),
        ("double(output_tokens) / double(input_tokens)", {"input_tokens": 0}, "inf is no amount"),
        ("double(input_tokens) * 1e300", {"input_tokens": 10**6}, "1e+306 is no amount"),
        ("{'a': 1}[model]", {"model": "b"}, "a list or a map has no such element"),
        ("[1, 2][input_tokens % 1000]", {"input_tokens": 43}, "a list or a map has no such element"),
        ("int(model) + 1", {"model": "seven"}, "a text does not say what it is turned into"),
    ],
)
def test_what_cannot_be_computed_says_why(text: str, changes: dict[str, Any], reason: str) -> None:
    call = record(1, usage=usage(**changes))
    found = compile_expression(text)
    assert found.result(call) == Failure(reason)
    assert found.value(call) is None
    (meter,) = read_meters([{"name": "m", "aggregation": {"type": "SUM", "expression": text}}])
    assert (meter.quantity(call), meter.failure(call)) == (None, reason)


async def test_what_the_ledger_lacks_for_it_is_counted_by_meter(tmp_path: Path) -> None:
    """Each time, while the log has it once; other backends park the record."""
    sides = {"each": "output_tokens / input_tokens", "fine": "output_tokens * 2"}
    tables = [{"name": name, "aggregation": {"type": "SUM", "expression": text}} for name, text in sides.items()]
    metrics = Metrics(backends=["ledger"])
    settings = replace(Settings(), data_dir=tmp_path, meters=tuple(tables), backends=("ledger", "file"))
    ledger, other = backends(settings, not_computed=metrics.value_not_computed)
    records = [record(number, usage=usage(input_tokens=number % 2)) for number in range(1, 5)]
    assert isinstance(ledger, AddsUp)
    ledger.add_up(records)
    ledger.add_up(records[:2])
    other.encode(records)
    said = metrics.exposition(Gauges()).decode()
    assert 'sidecar_meter_values_not_computed_total{meter="each"} 3.0' in said
    assert 'meter="fine"' not in said
    for backend in (ledger, other):
        await backend.aclose()


def test_a_number_beyond_64_bits_is_no_other_number() -> None:
    for number in (2**63, 2**64, 2**80, -(2**63) - 1):
        assert compile_expression("input_tokens + 1").of({"input_tokens": number}) == Failure(
            "a number is beyond 64 bits"
        )


def test_what_is_not_known_is_no_failure() -> None:
    found = compile_expression("output_tokens / input_tokens")
    assert found.result(record(1, usage=usage(input_tokens=None))) is None
    assert found.result(record(1, usage=None)) is None
    assert compile_expression("model == 'x' ? unit_rows : 2.0").result(record(1)) == 2, "it was not asked for"


def test_a_failure_is_logged_once_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    found = compile_expression("output_tokens / input_tokens")
    for _ in range(3):
        assert found.value(record(1, usage=usage(input_tokens=0))) is None
    assert [entry.message for entry in caplog.records if "division by zero" in entry.message] != []
    assert len(caplog.records) == 1


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("()[]{}<>=!?:.,+-*/%&|'\"\\ \n0123456789abexmtu_\x00é😀"), max_size=60))
def test_no_text_does_more_than_fail(text: str) -> None:
    try:
        found = compile_expression(text)
    except ExpressionError:
        return
    result = found.result(record(1))
    assert result is None or isinstance(result, (int, Decimal, Failure))


SIGNS = ("map", "exists", "(", ")", "[", "]", ".", ",", "+", "*", "'a'", "1", "1.5", "?", ":", "==", "x", "&&")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*FIXED, *FUNCTIONS, *SIGNS]), max_size=20))
def test_no_words_in_a_row_do_more_than_fail(words: list[str]) -> None:
    try:
        found = compile_expression("".join(words))
    except ExpressionError:
        return
    for each in odd_records():
        result = found.result(each)
        assert result is None or isinstance(result, (int, Decimal, Failure))


def test_the_dearest_expressions_that_are_taken_are_bounded() -> None:
    """In a process with a limit on its processor time: a bomb would be killed, and this fails."""
    ones = "[" + ",".join(["1"] * 235) + "]"
    texts = [
        f"{ones}.map(x, x + x).size()",
        f"{ones}.filter(x, {ones}.size() > x).size()",
        "['" + "a" * 300 + "'].map(a, " + " + ".join(["a"] * 150) + ").size()",
        " || ".join([r"model.matches(r'\w\w\w\w\w\w\w\w\w\w\w\w\w\w\w\w\w\w\w')"] * 4) + " ? 1 : 2",
        "+".join(["size(model)"] * 75),
        "+".join(["input_tokens"] * 70),
    ]
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from decimal import Decimal
from sidecar.meters.expression import compile_expression
for text in {texts!r}:
    found = compile_expression(text)
    for _ in range(20):
        assert type(found.of({{"model": "é" * 1024, "input_tokens": 7}})) in (int, Decimal), text
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_the_library_only_expressions_are_refused() -> None:
    """As on a platform that it has no wheel for."""
    program = """
import importlib.util, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cel":
            raise ModuleNotFoundError(name)
real = importlib.util.find_spec
import sidecar.meters.expression as expression
expression.find_spec = lambda name: None if name == "cel" else real(name)
from sidecar.meters.definition import MetersError, read_meters
read_meters([{"name": "m", "aggregation": {"type": "SUM", "field": "input_tokens"}}])
try:
    read_meters([{"name": "m", "aggregation": {"type": "SUM", "expression": "input_tokens"}}])
except MetersError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.startswith("meter m: aggregation expression needs the CEL library, which is not installed")
    assert "musl" in done.stdout


def test_the_command_line_of_the_library_is_not_loaded() -> None:
    program = """
import sys
from sidecar.meters.expression import compile_expression
compile_expression("input_tokens + 1")
print(sorted({"typer", "rich", "prompt_toolkit", "pygments"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.strip() == "[]"


# Names


def test_the_names_that_are_read_are_the_free_ones() -> None:
    for text, names in (
        ("input_tokens + output_tokens", ("input_tokens", "output_tokens")),
        ("[1, 2].map(x, x * status).size()", ("status",)),
        ("model.startsWith('status') ? 1 : 2", ("model",)),
        ("{'model': 1}.model", ()),
        ("1 // input_tokens", ()),
        ("'input_tokens'.size()", ()),
        ("[1].map(model, model).size()", ("model",)),
    ):
        assert compile_expression(text).names == names, text


def test_own_names_are_closed_where_they_are_known() -> None:
    vocabulary = Vocabulary.of(["plan"], ["rows"])
    assert compile_expression("dimension_plan == 'a' ? unit_rows : 0.0", vocabulary).names == (
        "dimension_plan",
        "unit_rows",
    )
    for text, near in (
        ("unit_rowz * 2.0", "reads unit_rowz, which no record has; did you mean unit_rows?"),
        ("rows * 2.0", "did you mean unit_rows?"),
        ("units.rows * 2.0", "did you mean unit_rows?"),
        ("units['rows'] * 2.0", "did you mean unit_rows?"),
        ("dimension_plam == 'a' ? 1 : 2", "did you mean dimension_plan?"),
        ("prompt_tokens * 2", "did you mean input_tokens?"),
    ):
        with pytest.raises(ExpressionError) as caught:
            compile_expression(text, vocabulary)
        assert near in str(caught.value)


def test_the_samples_have_the_types_of_the_records() -> None:
    for name in FIXED:
        value = value_of(record(1, usage=usage(service_tier="a", cost_usd="1"), charge={"total": "1"}), name)
        if value is not None:
            kind = str if name in TEXTS else bool if name in FLAGS else int if name in WHOLE else Decimal
            assert type(value) is kind, name


@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(("input_tokens", "output_tokens")), st.integers(-(2**64), 2**64) | st.integers(0, 10**5)
        )
    )
)
def test_many_at_once_are_billed_as_one_by_one(rows: list[dict[str, Any]]) -> None:
    for text in (
        "double(input_tokens) * 1.25 + double(output_tokens) * 0.1",
        "input_tokens - output_tokens",
        "double(input_tokens) / double(output_tokens) * 1e-7",
        "input_tokens * output_tokens",
    ):
        expression = compile_expression(text)
        one_by_one = [found for row in rows if isinstance(found := expression.of(row), (int, Decimal))]
        assert sorted(map(repr, expression.values(rows))) == sorted(map(repr, one_by_one))
