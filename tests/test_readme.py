"""What is written for people is true: the README's tables and commands, and the examples in `config/`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import readme_tables
import yaml

from sidecar.backends import backend_settings
from sidecar.cli import COMMANDS, parser
from sidecar.prices import price_book
from sidecar.runtime.hop_counts import HopEvents
from sidecar.runtime.metrics import FAMILIES, Metrics
from sidecar.settings import CONFIG, PREFIX, Setting, Settings, all_settings, core_settings, load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONFIGS = sorted(path for path in (ROOT / "config").rglob("*") if path.is_file())
DOCS = [ROOT / "README.md", ROOT / "Dockerfile", *CONFIGS, *sorted((ROOT / "docs").rglob("*.md"))]
COLLECTOR = ("collect",)  # called by the library that Metrics is a collector of
PATCHES = ("wait.yaml", "service.yaml")  # lists of steps
VARIABLES = {CONFIG} | {
    name
    for backend, setting in all_settings(backend_settings())
    for name in (setting.variable(backend), *([setting.variable(backend) + "_FILE"] if setting.secret else []))
}
SERIES = {
    name + suffix
    for name, family in FAMILIES.items()
    for suffix in ("", *{"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.kind, []))
}


def shell_lines(path: Path) -> Iterator[str]:
    """Lines of `sh` blocks, continued ones joined, comments gone."""
    for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in re.split(r"&&|;", line.split(" #")[0]) if part.strip())


def test_the_tables_are_what_the_code_says() -> None:
    assert readme_tables.written(README) == README, "run `make readme`"


@pytest.mark.parametrize("variable", sorted(VARIABLES - {v for v in VARIABLES if v.endswith("_FILE")}))
def test_every_setting_is_in_the_readme(variable: str) -> None:
    assert f"`{variable}`" in README


def test_every_answer_of_the_admin_port_is_named_and_whom_it_is_for() -> None:
    admin = ROOT / "sidecar" / "runtime" / "admin"
    free = re.findall(r'add_get\("(/\w+)"', (admin / "__init__.py").read_text())
    guarded = re.findall(r'^ +\("(/\w+)",', (admin / "reports.py").read_text(), re.MULTILINE)
    assert len(free) > 3
    assert len(guarded) > 3
    row = re.search(r"^\| `SIDECAR_ADMIN_LISTEN` .*", README, re.MULTILINE)
    rule = re.search(r"The admin port only reads\. (.*?) are for whoever", README, re.DOTALL)
    assert row is not None
    assert rule is not None
    assert [path for path in free + guarded if f"`{path}`" not in row[0]] == []
    assert [path for path in free if f"`{path}`" not in rule[1]] == []


@pytest.mark.parametrize("setting", core_settings(), ids=lambda setting: setting.name)
def test_every_setting_does_something(setting: Setting) -> None:
    sources = [path for path in (ROOT / "sidecar").rglob("*.py") if path.parent.name != "settings"]
    used = any(re.search(rf"\bsettings\.(\w+\.)?{setting.name}\b", path.read_text()) for path in sources)
    assert used, f"{setting.variable()} is accepted and not used"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_metric_is_written(name: str) -> None:
    """By name, in a place that is not its row: a method of `Metrics`, or what hands counts on to one."""
    row = re.compile(rf'"{name}": Family\(')
    sources = [row.sub("", path.read_text()) for path in (ROOT / "sidecar").rglob("*.py")]
    assert any(f'"{name}"' in text for text in sources), f"{name} is in the table, and nobody writes it"


def public(of: type) -> set[str]:
    return {name for name, what in vars(of).items() if callable(what) and not name.startswith("_")}


@pytest.mark.parametrize("method", sorted(public(Metrics) | public(HopEvents)))
def test_every_method_that_writes_a_metric_is_called(method: str) -> None:
    sources = [path for path in (ROOT / "sidecar").rglob("*.py") if path.name not in ("metrics.py", "hop_counts.py")]
    called = method in COLLECTOR or any(re.search(rf"\.{method}\b", path.read_text()) for path in sources)
    assert called, f"Metrics.{method} writes what nobody tells it"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_name_that_is_mentioned_exists(path: Path) -> None:
    text = path.read_text()
    # `SIDECAR_…` and `SIDECAR_<BACKEND>_…` speak of many; an underscore at the end is part of such a pattern.
    mentioned = set(re.findall(rf"\b{PREFIX}[A-Z0-9_]*[A-Z0-9]\b", text))
    assert mentioned <= VARIABLES
    series = set(re.findall(r"\bsidecar_[a-z_]+\b(?=[^a-z_/.=]|$)", text)) if path.suffix != ".py" else set()
    assert series <= SERIES


def test_every_command_has_its_line() -> None:
    for name in COMMANDS:
        assert f"`metering-sidecar {name}" in README
    for kind in ("status", "verify", "parked", "redrive", "cancel", "complain", "export"):
        assert f"`metering-sidecar spool {kind}" in README


@pytest.mark.parametrize("path", [p for p in DOCS if p.suffix == ".md"], ids=lambda path: path.name)
def test_what_is_shown_in_a_shell_can_be_typed(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in shell_lines(path):
        words = shlex.split(line)
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "metering-sidecar":
            parser().parse_args(words[1:])


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`metering-sidecar ([^`]+)`", README))))
def test_what_is_named_in_the_text_can_be_typed(command: str) -> None:
    words = shlex.split(command.replace("\\|", "|"))
    parser().parse_args(words)


def test_files_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert "://" in target or (ROOT / target).exists(), target


def test_the_env_file_can_be_used_with_every_line_switched_on(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    environ = {}
    for line in (ROOT / "config/sidecar.env").read_text().splitlines():
        found = re.fullmatch(r"#?(SIDECAR_\w+)=(.*)", line)
        if found:
            environ[found[1]] = str(secret) if found[2].startswith("/run/secrets/") else found[2]
    assert len(environ) > 10
    assert load(environ, backend_settings=backend_settings()).proxy.upstream_url == "https://api.example.com"


def test_the_toml_file_can_be_used() -> None:
    settings = load({CONFIG: str(ROOT / "config/sidecar.toml")}, backend_settings=backend_settings())
    assert len(settings.proxy.routes) == 2
    assert settings.subscribers == {"acme": {"revenium": "acme-corp"}}


def test_the_prices_in_the_toml_file_can_be_used_as_they_are(tmp_path: Path) -> None:
    text = (ROOT / "config/sidecar.toml").read_text()
    head, found, examples = text.partition("# [[prices]]\n")
    assert found
    file = tmp_path / "sidecar.toml"
    file.write_text(head + found[2:] + re.sub(r"^# ?", "", examples, flags=re.MULTILINE))
    settings = load({CONFIG: str(file)}, backend_settings=backend_settings())
    book = price_book(settings)
    assert len(book.own) == 3
    assert book.charges


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.suffix in (".yml", ".yaml") and p.name not in PATCHES], ids=lambda path: path.name
)
def test_the_yaml_files_can_be_read(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        assert isinstance(document, dict)


def test_every_alert_says_what_to_do() -> None:
    (group,) = yaml.safe_load((ROOT / "config/alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert rule["expr"].count("(") == rule["expr"].count(")"), rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "action", "runbook_url"}


def test_the_grace_periods_are_longer_than_the_stop() -> None:
    stop_s = Settings().serve.stop_delay_s + Settings().serve.stop_s + 10  # and the last delivery
    service = yaml.safe_load((ROOT / "config/compose.yml").read_text())["services"]["metering-sidecar"]
    assert float(service["stop_grace_period"].removesuffix("s")) > stop_s
    pod = next(yaml.safe_load_all((ROOT / "config/kubernetes.yml").read_text()))["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > stop_s


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads((ROOT / "config/grafana.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")"), panel["title"]
            assert target["expr"].count("{") == target["expr"].count("}"), panel["title"]
