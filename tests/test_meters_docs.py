"""docs/meters.md and docs/record.md: their tables are the code's, and their examples do what they say."""

from __future__ import annotations

import json
import re
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from readme_tables import METERS_PAGE, METERS_TABLES, RECORD_PAGE, RECORD_TABLES, written
from support.backend_fixtures import record, usage
from support.schema import faults

from sidecar.backends import backend_settings
from sidecar.meters import expression, properties
from sidecar.meters.definition import DEFAULT_METERS, METERS_MAX, Bucket, Kind, Meter, Reset, read_meters
from sidecar.meters.expression import compile_expression
from sidecar.model.record import Record
from sidecar.runtime import backend_factory
from sidecar.settings import load

ROOT = Path(__file__).parent.parent
PAGE = METERS_PAGE.read_text()
DEFAULTS, OWN = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
EXPRESSIONS = re.findall(r"^\| [^|]+ \| `([^`]+)` \|$", PAGE.partition("## Expressions")[2], re.MULTILINE)


def test_the_tables_are_what_the_code_says() -> None:
    assert written(PAGE, METERS_TABLES) == PAGE, "run `make readme`"
    page = RECORD_PAGE.read_text()
    assert written(page, RECORD_TABLES) == page, "run `make readme`"


def own_meters(tmp_path: Path, text: str = OWN) -> tuple[Meter, ...]:
    file = tmp_path / "sidecar.toml"
    file.write_text(text)
    settings = load(
        {"SIDECAR_CONFIG": str(file), "SIDECAR_UPSTREAM_URL": "https://api.example.com"},
        backend_settings=backend_settings(),
    )
    assert backend_factory.faults(settings) == []
    return read_meters(settings.meters, backend_factory.vocabulary(settings))


def test_the_example_of_an_own_field_measures_what_it_says(tmp_path: Path) -> None:
    by_name = {meter.name: meter for meter in own_meters(tmp_path)}
    pro = record(1, route="/reports", dimensions={"plan": "pro"}, usage=usage(units={"rows": 30, "pages": "2500"}))
    free = record(2, route="/other", dimensions={"plan": "free"}, usage=usage(units={"rows": 7, "pages": 1}))
    assert by_name["report_rows"].quantity(pro) == 30
    assert by_name["report_rows"].quantity(free) is None
    assert by_name["thousand_pages"].quantity(pro) == Decimal("2.5")
    assert by_name["thousand_pages"].quantity(free) is None
    assert by_name["thousand_pages"].event_name == "pages"
    assert by_name["credits"].quantity(pro) == 15
    assert by_name["credits"].quantity(free) == 7


def test_the_default_that_is_written_out_is_the_default() -> None:
    (table,) = tomllib.loads(DEFAULTS)["meters"]
    assert read_meters([table]) == DEFAULT_METERS[:1]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_the_expressions_give_numbers(text: str) -> None:
    call = record(
        1, dimensions={"plan": "pro"}, usage=usage(model="gpt-5", cache_read_input_tokens=3, units={"rows": 30})
    )
    known = properties.Vocabulary.of(["plan"], ["rows"])
    assert isinstance(compile_expression(text, known).result(call), (int, Decimal))


def test_the_page_has_enough_of_them_and_every_word() -> None:
    assert len(EXPRESSIONS) >= 6
    for word in (*Kind, *Bucket, *Reset, *expression.MACROS, "group_by", "multiplier", "anchor_day", "event_name"):
        assert f"`{word}`" in PAGE, word
    for name in properties.FIXED:
        assert f"| `{name}` |" in PAGE
    assert f"At\nmost {METERS_MAX} meters" in PAGE
    assert f"{expression.EXPRESSION_CHARS_MAX:,} characters" in PAGE


def test_all_units_that_providers_count_are_in_the_table() -> None:
    """What the readers write into `units`, found in their source: a table of names, or a text in brackets."""
    found: set[str] = set()
    for path in (ROOT / "sidecar" / "usage" / "providers").glob("*.py"):
        source = path.read_text()
        found |= set(re.findall(r"units\[\"(\w+)\"\]", source))
        found |= set(re.findall(r"units_in: .*?\{\"[\w-]+\": \"(\w+)\"", source))
        for block in re.findall(r"^_UNITS = [{(](.*?)[})]$", source, re.DOTALL | re.MULTILINE):
            found |= set(re.findall(r"\"\w+\": \"(\w+)\"", block) or re.findall(r"\"(\w+)\"", block))
    assert len(found) > 8
    assert found == set(properties.PROVIDER_UNITS)


def test_the_example_of_a_record_is_one() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", RECORD_PAGE.read_text(), re.DOTALL)
    line = json.dumps(json.loads(example)).encode()
    assert faults(line) == []
    read = Record.from_json(line)
    assert read.subscriber is not None
    shown: dict[str, Any] = json.loads(example)
    assert sum(map(Decimal, shown["cost"]["parts"].values())) == Decimal(shown["cost"]["total"])
