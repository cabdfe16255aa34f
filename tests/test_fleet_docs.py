"""The figures of docs/fleet.md are those that come of what they are worked out from, and that is what the code has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fleet_sizing
import pytest
from fleet_sizing import PAGE, SCALES, TABLES
from readme_tables import written

from sidecar.backends import backend_settings
from sidecar.delivery.limits import Limits
from sidecar.ledger.lanes import LANES
from sidecar.runtime import backend_factory
from sidecar.settings import Settings, load

TEXT = PAGE.read_text()


def test_the_table_is_what_the_figures_say() -> None:
    assert written(TEXT, TABLES) == TEXT, "run `python tests/fleet_sizing.py`"


def test_the_arithmetic_is_that_of_a_pocket_calculator() -> None:
    large = SCALES[-1]
    assert (large.sidecars, large.records_a_day) == (10_000, 1_000_000_000)
    assert large.mean_a_s == pytest.approx(1e9 / 24 / 3600)
    assert large.peak_a_s == pytest.approx(34_722, abs=1)
    assert large.each_a_s == pytest.approx(3.47, abs=0.01)
    assert large.transactions_a_s() == 20_000
    assert large.batch() == 18
    assert large.working() == 10
    assert (large.in_flight(100), large.in_flight(1)) == (3, 218)
    assert large.ids(3600) == pytest.approx(125e6)
    assert large.stream_bytes() == 1.3e12
    rows = {name: [figure(at) for at in SCALES] for name, figure in fleet_sizing.ROWS}
    assert rows["**PostgreSQL**: a day's partition"] == ["16 GB", "155 GB", "1.6 TB"]
    assert rows["memory of each for the ids of an hour, at the peak"] == ["250 MB", "2.5 GB", "25 GB"]


def test_what_is_said_of_requests_under_way_is_what_a_lane_of_stripe_may_have() -> None:
    settings = load(
        {
            "SIDECAR_UPSTREAM_URL": "http://x",
            "SIDECAR_STRIPE_API_KEY": "sk_test_x",
            "SIDECAR_STRIPE_METERS": "api_calls",
        },
        backend_settings=backend_settings(),
    )
    (backend,) = backend_factory.of_a_lane(settings, ["stripe"])
    at_once = backend.abilities.concurrency
    a_s = at_once * 1000 // fleet_sizing.VENDOR_MS
    said = " ".join(TEXT.split())
    assert f"16 lanes of which each has {at_once} requests under way (Stripe) are {LANES * a_s} events a second" in said
    assert f"those of one customer {a_s}." in said


def test_what_goes_in_is_what_the_code_and_the_other_pages_have() -> None:
    assert 1 / Limits().sums_linger_s == fleet_sizing.SUMS_A_S
    assert Settings().spool.retention == fleet_sizing.RETENTION_DAYS * 86_400
    page = (Path(PAGE).parent / "record.md").read_text()
    shown = re.search(r"```json\n(\{\"id\".*?)\n```", page, re.DOTALL)
    assert shown is not None
    line = json.dumps(json.loads(shown[1]), separators=(",", ":"), ensure_ascii=False)
    assert len(line.encode()) == pytest.approx(fleet_sizing.LINE_BYTES, rel=0.02)
