"""What `config/` has to copy: the rules fire on what they name, and the manifests say what a cluster wants to hear."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sidecar import __version__
from sidecar.runtime.metrics import FAMILIES, Gauges, Metrics

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "config"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def promtool(*arguments: str, given: bytes = b"") -> str:
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


@needs_promtool
def test_each_alert_fires_on_its_fault_and_none_without(tmp_path: Path) -> None:
    cases = tmp_path / "alerts_test.yml"
    text = (ROOT / "tests/data/alerts_test.yml").read_text()
    cases.write_text(text.replace("RULES", str(CONFIG / "alerts.yml")))
    promtool("check", "rules", str(CONFIG / "alerts.yml"))
    promtool("check", "config", str(CONFIG / "prometheus.yml"))
    promtool("test", "rules", str(cases))


@needs_promtool
def test_what_is_scraped_is_well_formed() -> None:
    promtool("check", "metrics", given=Metrics(backends=("ledger",)).exposition(Gauges()))


def test_what_runs_is_scraped_once_however_often_it_is_scraped() -> None:
    metrics = Metrics()
    metrics.exposition(Gauges())
    text = metrics.exposition(Gauges(disk_bytes=7, disk_low_bytes=3, chunks_set_aside=2)).decode()
    assert text.count("\nsidecar_build_info{") == 1
    assert f'version="{__version__}"' in text
    assert f'python="{platform.python_version()}"' in text
    assert "\nprocess_resident_memory_bytes " in text
    assert "\nsidecar_disk_bytes 7.0" in text
    assert "\nsidecar_chunks_set_aside 2.0" in text


def test_alerts_and_dashboard_speak_of_what_there_is() -> None:
    names = {
        name + suffix
        for name, family in FAMILIES.items()
        for suffix in {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.kind, ("",))
    }
    for file in ("alerts.yml", "grafana.json", "grafana-usage.json"):
        used = set(re.findall(r"\bsidecar_[a-z_]+", (CONFIG / file).read_text()))
        assert used <= names, file
    job = re.search(r"job_name: (\S+)", (CONFIG / "prometheus.yml").read_text())
    assert job is not None
    assert f'up{{job="{job[1]}"}} == 0' in (CONFIG / "alerts.yml").read_text()


def test_each_alert_has_a_case_in_which_it_fires() -> None:
    cases = yaml.safe_load((ROOT / "tests/data/alerts_test.yml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    (group,) = yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"]
    names = {rule["alert"] for rule in group["rules"]}
    assert {check["alertname"] for check in checks} <= names
    assert names == {check["alertname"] for check in checks if check["exp_alerts"]}


def test_each_alert_says_where_its_page_is() -> None:
    """And each page is that of an alert, in their order."""
    (group,) = yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    urls = [rule["annotations"]["runbook_url"] for rule in group["rules"]]
    assert urls == [f"docs/runbook.md#{name.lower()}" for name in names]
    assert re.findall(r"^## (.+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE) == names


def test_no_alert_hands_a_strangers_text_to_a_shell() -> None:
    """A subscriber's name is whatever a client sends; `action` is copied into a terminal."""
    for rule in yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"][0]["rules"]:
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["action"])) <= {"backend"}


def test_the_manifests_keep_to_what_is_needed() -> None:
    manifest = (CONFIG / "kubernetes.yml").read_text()
    for wanted in (
        "seccompProfile: {type: RuntimeDefault}",
        "automountServiceAccountToken: false",
        "kind: NetworkPolicy",
        "runAsNonRoot: true",
        "readOnlyRootFilesystem: true",
        "capabilities: {drop: [ALL]}",
        "1.29 or later",
        "kubectl create secret generic metering",
        "SIDECAR_ADMIN_TOKEN_FILE",
        f"image: metering-sidecar:{__version__}\n",
    ):
        assert wanted in manifest, wanted
    assert ":latest" not in manifest
    assert re.search(r"requests: \{cpu: \S+, memory: \S+\}", manifest)
    assert re.search(r"limits: \{cpu: \S+, memory: \S+\}", manifest)
    compose = (CONFIG / "compose.yml").read_text()
    assert "mem_limit:" in compose
    assert "pids_limit:" in compose
    assert '"127.0.0.1:9464:9464"' in compose


def test_the_env_file_leaves_the_images_volume_alone() -> None:
    """`docker run --env-file` with a directory that the image does not have would not start."""
    lines = (CONFIG / "sidecar.env").read_text().splitlines()
    assert not any(line.startswith("SIDECAR_DATA_DIR") for line in lines)
