"""The rules and dashboards for the Prometheus Operator, made from those for Prometheus and Grafana themselves.

`python tests/manifests.py` writes them (`make manifests`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "config"
PLACE = CONFIG / "kubernetes" / "monitoring"
HEAD = "# Written by `make manifests` from {source}: change it there.\n"
NAME = "metering-sidecar"


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Text of several lines as such: it is read by people, and by whoever compares two versions."""


def _text(dumper: yaml.SafeDumper, value: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def written() -> dict[Path, str]:
    """Each file with its text."""
    labels = {"app.kubernetes.io/name": NAME}
    rules = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": NAME, "labels": labels},
        "spec": yaml.safe_load((CONFIG / "alerts.yml").read_text()),
    }
    boards = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        # The label by which the Grafana chart's helper finds dashboards.
        "metadata": {"name": f"{NAME}-dashboards", "labels": {**labels, "grafana_dashboard": "1"}},
        "data": {
            f"{NAME}-{path.name}": path.read_text().rstrip() + "\n" for path in sorted(CONFIG.glob("grafana*.json"))
        },
    }
    return {
        PLACE / "rules.yaml": HEAD.format(source="config/alerts.yml") + _dumped(rules),
        PLACE / "dashboards.yaml": HEAD.format(source="config/grafana*.json") + _dumped(boards),
    }


def _dumped(document: dict[str, Any]) -> str:
    return str(yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True))


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text)
