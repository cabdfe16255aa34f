"""The tables of the README and of the docs that come from the code.

`python tests/readme_tables.py` writes them (`make readme`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from sidecar.backends import BACKENDS, answers, backend_settings
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
