"""What is written on backends keeps up: each has its sections, and the settings in the README's can be loaded."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from readme_tables import BACKENDS_PAGE, PAGE_TABLES, written

from sidecar.backends import BACKENDS, Context, answers, backend_settings
from sidecar.dev import demo, mock_backends
from sidecar.ledger import LedgerStore
from sidecar.meters.definition import read_meters
from sidecar.settings import load

DOCS = Path(__file__).parent.parent / "docs"
README = (DOCS.parent / "README.md").read_text()
(CHAPTER,) = re.findall(r"^## Backends\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE)
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", CHAPTER, re.DOTALL | re.MULTILINE))
PAGE = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (DOCS / "backends.md").read_text(), re.DOTALL | re.MULTILINE))


def test_every_backend_has_its_sections_and_none_is_made_up() -> None:
    assert list(SECTIONS) == list(BACKENDS)
    assert list(PAGE) == list(BACKENDS)
    assert all(len(text.strip()) > 100 for text in PAGE.values())


@pytest.mark.parametrize("name", list(BACKENDS))
async def test_the_settings_of_a_section_make_that_backend(name: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", SECTIONS[name], re.DOTALL)
    environ = dict(line.split("=", 1) for line in block.splitlines())
    assert len(environ) <= 5
    environ["SIDECAR_UPSTREAM_URL"] = "https://api.example.com"
    settings = load(environ, backend_settings=backend_settings())
    assert settings.backends == (name,)
    context = Context(data_dir=tmp_path, open_ledger=lambda: LedgerStore(tmp_path / "ledger.db"))
    backend = BACKENDS[name].make(settings.backend(name), context)
    assert backend.name == name
    await backend.aclose()


def test_every_backend_on_the_network_has_gone_all_the_steps() -> None:
    """Each has a place at the receiver and in the demo; the file names that the page speaks of are there."""
    on_the_network = set(BACKENDS) - {"ledger", "file", "nats"}  # `nats` is tried with a real server
    assert set(demo.STAND_INS) == on_the_network
    assert set(mock_backends.backends()) == on_the_network
    page = (DOCS / "adding-a-backend.md").read_text()
    for name in re.findall(r"`((?:sidecar|tests|docs)/[\w/.-]+)`", page):
        assert (DOCS.parent / name).exists(), name


def test_what_counts_as_delivered_is_written_as_the_code_has_it() -> None:
    page = BACKENDS_PAGE.read_text()
    assert written(page, PAGE_TABLES) == page, "python tests/readme_tables.py writes the table anew"
    assert {name.partition(" ")[0] for name in answers.ANSWERS} == set(BACKENDS) - {"ledger", "file", "nats"}


def test_the_toml_of_the_page_is_right() -> None:
    text = (DOCS / "backends.md").read_text()
    subscribers, *meters = (tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL))
    assert all(theirs.keys() <= BACKENDS.keys() for theirs in subscribers["subscribers"].values())
    read = [read_meters(tables["meters"])[0] for tables in meters]
    assert [(meter.name, meter.is_money) for meter in read] == [
        ("output_tokens", False),
        ("llm_cost_micro_usd", True),
        ("llm_cost", True),
    ]
