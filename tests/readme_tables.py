"""The tables of the README and of the docs that come from the code.

`python tests/readme_tables.py` writes them (`make readme`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sidecar.backends import BACKENDS, answers, backend_settings, lago, ledgerbee
from sidecar.backends.stripe import backend as stripe
from sidecar.meters import definition, properties
from sidecar.model import record_schema
from sidecar.runtime.metrics import FAMILIES
from sidecar.settings import SECTIONS, Setting, Settings, section_settings
from sidecar.usage.providers import realtime
from sidecar.usage.providers.table import render

TOML_ONLY = """\
TOML only: `[routes."/v1/things/{id}"]` with `on_disconnect` and `provider`, `[subscribers.ID]` with
`backend = "its id there"`, `[[meters]]`, `[[prices]]`; `[dimensions]`, `[elements]` and `[providers]` may be tables
too."""

README = Path(__file__).parent.parent / "README.md"
BACKENDS_PAGE = README.parent / "docs" / "backends.md"
METERS_PAGE = README.parent / "docs" / "meters.md"
RECORD_PAGE = README.parent / "docs" / "record.md"
RECORD_SCHEMA = README.parent / "docs" / "record.schema.json"


def settings_tables() -> str:
    parts = []
    for section in SECTIONS.values():
        about = "What all parts share." if section is Settings else section.__doc__ or ""
        parts += [about, _table((None, setting) for setting in section_settings(section))]
    parts += [TOML_ONLY, "Of the backends, each under the name that `SIDECAR_BACKENDS` has for it:"]
    for name, settings in backend_settings().items():
        head = f"<details><summary><code>{name}</code>: {BACKENDS[name].summary}</summary>"
        parts.append(f"{head}\n\n{_table((name, setting) for setting in settings)}\n\n</details>")
    return "\n\n".join(parts)


def metrics_table() -> str:
    rows = ["| metric | labels | |", "|---|---|---|"]
    for name, family in FAMILIES.items():
        shown = f"{name}_total" if family.kind == "counter" else name
        labels = " ".join(f"`{label}`" for label in family.labels)
        rows.append(f"| `{shown}` | {labels} | {family.help} |")
    return "\n".join(rows)


def _table(settings: Iterable[tuple[str | None, Setting]]) -> str:
    rows = ["| setting | default | |", "|---|---|---|"]
    for backend, setting in settings:
        default = f"`{setting.default}`" if setting.default else "required" if setting.required else "–"
        also = f"; also {', '.join(f'`{name}`' for name in setting.also)}" if setting.also else ""
        key = " 🔑" if setting.secret else ""
        rows.append(f"| `{setting.variable(backend)}`{key} | {default} | {setting.help}{also} |")
    return "\n".join(rows)


def usage_table() -> str:
    return (render() + realtime.render()).rstrip()


TABLES: dict[str, Callable[[], str]] = {"settings": settings_tables, "usage": usage_table, "metrics": metrics_table}


PAGE_TABLES: dict[str, Callable[[], str]] = {"answers": answers.table}


def fields_table() -> str:
    rows = ["| field | | |", "|---|---|---|"]
    for name, (kind, about) in record_schema.FIELDS.items():
        rows.append(f"| `{name}` | {_kind(kind)} | {about} |")
    return "\n".join(rows)


def usage_fields_table() -> str:
    properties = record_schema.schema()["properties"]["usage"]["properties"]
    rows = ["| field of `usage` | | |", "|---|---|---|"]
    for name, kind in properties.items():
        rows.append(f"| `{name}` | {_kind(kind)} | {record_schema.usage_about(name)} |")
    return "\n".join(rows)


def outcomes_table() -> str:
    rows = ["| `outcome` | |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{outcome}` | {about} |" for outcome, about in record_schema.OUTCOMES.items())])


def _kind(schema: dict[str, Any]) -> str:
    """A JSON type in a word or two."""
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return "text"
    kinds = schema.get("type", "anything")
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    words = {"string": "text", "integer": "whole number", "number": "number", "array": "list", "boolean": "true, false"}
    shown = [words.get(name, name) for name in names if name != "null"]
    return " or ".join(shown) + (", null" if "null" in names else "")


RECORD_TABLES: dict[str, Callable[[], str]] = {
    "fields": fields_table,
    "usage fields": usage_fields_table,
    "outcomes": outcomes_table,
}


def properties_table() -> str:
    rows = ["| property | | |", "|---|---|---|"]
    rows += [f"| `{name}` | {properties.type_of(name)} | {properties.about(name)} |" for name in properties.FIXED]
    rows.append("| `dimension_NAME` | text | an own dimension: `SIDECAR_DIMENSIONS`, `[dimensions]` |")
    rows.append("| `unit_NAME` | decimal | an own field: `SIDECAR_ELEMENTS`, `[elements]`; or one of these: |")
    for name, about in properties.PROVIDER_UNITS.items():
        rows.append(f"| `{properties.unit_name(name)}` | decimal | {about} |")
    return "\n".join(rows)


def aggregations_table() -> str:
    rows = ["| `type` | of | adds up to | `bucket_size` | sent to |", "|---|---|---|---|---|"]
    for kind, (of, total) in definition.ABOUT.items():
        buckets = ", ".join(definition.Bucket) if kind in definition.BUCKETED else "–"
        takers = ", ".join(name for name, takes in KINDS_TAKEN.items() if kind in takes)
        rows.append(f"| `{kind}` | {of} | {total} | {buckets} | {takers} |")
    return "\n".join(rows)


KINDS_TAKEN = {
    "ledger": frozenset(definition.Kind),
    "stripe": stripe.TAKES,
    "ledgerbee": ledgerbee.TAKES,
    "lago": lago.TAKES,
}
METERS_TABLES: dict[str, Callable[[], str]] = {"properties": properties_table, "aggregations": aggregations_table}


def written(text: str, tables: dict[str, Callable[[], str]] = TABLES) -> str:
    """The page with its tables as the code has them now."""
    for name, table in tables.items():
        found = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- {name} end -->)", re.DOTALL)
        text, count = found.subn(lambda match, table=table: f"{match[1]}\n{table()}\n\n{match[2]}", text)  # type: ignore[misc]
        assert count == 1, f"there is no place for the {name} table"
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
    BACKENDS_PAGE.write_text(written(BACKENDS_PAGE.read_text(), PAGE_TABLES))
    METERS_PAGE.write_text(written(METERS_PAGE.read_text(), METERS_TABLES))
    RECORD_PAGE.write_text(written(RECORD_PAGE.read_text(), RECORD_TABLES))
    RECORD_SCHEMA.write_text(record_schema.text())
