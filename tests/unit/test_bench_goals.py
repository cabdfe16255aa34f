"""The goals that `make bench` prints: figures of a run in, met and missed out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import goals


def lines(raw: Mapping[str, object]) -> dict[str, str]:
    return {goal.what: goal.line(raw) for goal in goals.GOALS}


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    assert all(line.endswith("not measured") for line in lines({}).values())
    assert "P6" in goals.text({})


def test_figures_are_ratios_of_medians_within_the_run() -> None:
    rows = [{"case": "chat", "peer": "Envoy", "us": us} for us in (40.0, 50.0, 900.0)]
    rows += [{"case": "chat", "peer": "sidecar buffered", "us": us} for us in (1.0, 45.0, 60.0)]
    rows += [{"case": "chat", "peer": "sidecar committed", "us": 80.0}]
    rows += [{"case": "chat", "peer": "LiteLLM", "us": 4_500.0}]
    found = lines({"unary": rows})
    assert found["CPU of a call, buffered, by Envoy's plain hop"].endswith("0.90 ×   met")
    assert found["the same, committed"].endswith("1.60 ×   MISSED")
    assert found["CPU of a call, LiteLLM by buffered"].endswith("100.00 ×   met")
    assert found["committed, every head different"].endswith("not measured")


def test_bounds_from_below_and_single_figures() -> None:
    raw = {
        "open": {"kib_each": 25.1, "before_mib": 90.0},
        "delivery": [{"case": "meter", "us": 50.0, "cpu_s": 2.0, "records_per_cpu_s": 19_999.0}],
    }
    found = lines(raw)
    assert found["memory of an open stream (PSS, all processes)"].endswith("MISSED")
    assert found["memory before load (PSS, all processes)"].endswith("met")
    assert found["records a CPU second to a batch backend"].endswith("MISSED")
