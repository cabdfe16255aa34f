"""Every expression of the dashboards and of the alerts, asked of a real Prometheus that scrapes a running sidecar: it
gives data, or it is known by name that there is none while all is well."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import yaml
from support.ports import free_port
from support.whole import ROOT, Whole, running_receiver

from sidecar.dev.demo import CALLS
from sidecar.dev.mock_llm import Script, ScriptedLLM

CONFIG: Final = ROOT / "config"
DASHBOARDS: Final = ("grafana.json", "grafana-usage.json")
WINDOW: Final = "1m"  # of rates and ranges: the test has scraped for some seconds
LIMIT_S: Final = 40.0
ROUNDS: Final = 2  # an increase needs a sample before and one after

pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
    pytest.mark.timeout(180),
]

# Panels without data while all is well, with the reason.
EMPTY_PANELS: Final[dict[str, str]] = {}
# Of alerts: series that only a fault makes, with what it is.
EMPTY_SERIES: Final = {
    'sidecar_skipped_total{reason=~"gap|retired"}': "a backend that was left out",
    **dict.fromkeys(
        ("sidecar_collect_reading", "sidecar_collect_missed_total", "sidecar_collect_aside"), "only `collect` has them"
    ),
    **dict.fromkeys(("sidecar_instance_lag_seconds", "sidecar_instance_silent_seconds"), "of a shared ledger"),
    **dict.fromkeys(("sidecar_lanes_unheld", "sidecar_lanes_resting"), "of a fleet whose sidecars deliver together"),
}
# Beside what the demo sends: a model that nobody has a price of.
UNPRICED: Final = replace(CALLS[0], subscriber="acme", body={**CALLS[0].body, "model": "made-up-for-the-test"})
SENT: Final = (*CALLS, UNPRICED)
# Alerts of which something is true of what the test does.
FIRES: Final = {
    "MeteringRecordsParked", "MeteringUnpricedCalls", "MeteringUsageMissing", "MeteringSubscribersUncounted",
}  # fmt: skip


def dashboard(name: str) -> list[dict[str, Any]]:
    found: dict[str, Any] = json.loads((CONFIG / name).read_text())
    return [panel for panel in found["panels"] if panel["type"] != "row"]


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def written_out(expression: str) -> str:
    """As Grafana sends it, with everything chosen."""
    for variable, value in {"$job": ".*", "$instance": ".*", "$__rate_interval": WINDOW, "$__range": WINDOW}.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


class Prometheus:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def query(self, expression: str) -> list[dict[str, Any]]:
        async with self._session.get(f"{self.url}/api/v1/query", params={"query": expression}) as answer:
            told = await answer.json()
        assert told["status"] == "success", f"{expression}: {told.get('error')}"
        found = told["data"]["result"]
        return found if isinstance(found, list) else [found]

    async def until(self, expression: str) -> None:
        """Wait for data."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                with suppress(aiohttp.ClientError):
                    if await self.query(expression):
                        return
                await asyncio.sleep(0.1)

    async def rules(self) -> dict[str, dict[str, Any]]:
        """By name, once each has been evaluated."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                async with self._session.get(f"{self.url}/api/v1/rules") as answer:
                    (group,) = (await answer.json())["data"]["groups"]
                if all(rule["health"] != "unknown" for rule in group["rules"]):
                    return {rule["name"]: rule for rule in group["rules"]}
                await asyncio.sleep(0.1)


@asynccontextmanager
async def scraping(folder: Path, target: str) -> AsyncIterator[Prometheus]:
    port = free_port()
    folder.mkdir()
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    scrape["scrape_interval"] = "1s"
    scrape["static_configs"] = [{"targets": [target]}]
    config["global"] = {"evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIG / "alerts.yml")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
            stdout=log,
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession() as session:
            yield Prometheus(session, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def watched(tmp_path: Path) -> AsyncIterator[tuple[Whole, Prometheus]]:
    """A sidecar with calls of three subscribers behind it, one backend that refuses, and who scrapes it."""
    llm = ScriptedLLM(Script())
    upstream = await llm.start()
    try:
        async with running_receiver() as (_, receiver):
            whole = Whole(
                tmp_path / "data",
                upstream,
                SIDECAR_SUBSCRIBER="header:x-tenant",
                SIDECAR_BACKENDS="ledger,meter",
                SIDECAR_METER_URL=f"{receiver}/meter",
                SIDECAR_METER_BATCH="1",
                SIDECAR_METRICS_SUBSCRIBERS="2",
            )
            async with whole:
                async with scraping(tmp_path / "prometheus", whole.admin_url.removeprefix("http://")) as prometheus:
                    await prometheus.until("sidecar_admitted_total")
                    async with aiohttp.ClientSession() as session:
                        await session.post(f"{receiver}/_faults", json={"do": "status", "status": 400, "times": 2})
                        for number in range(ROUNDS):
                            await send(session, whole)
                            count = len(SENT) * (number + 1)
                            await prometheus.until(f"sum(sidecar_calls_total) >= {count}")
                            await prometheus.until(f"sidecar_recorded_total >= {count}")
                    await whole.settled()
                    # All of it was scraped, and each counter has a sample before its last.
                    await prometheus.until("sum(sidecar_pending) == 0")
                    await prometheus.until('sum(sidecar_parked_now{backend="meter"}) == 2')
                    yield whole, prometheus
    finally:
        await llm.aclose()


async def send(session: aiohttp.ClientSession, whole: Whole) -> None:
    for call in SENT:
        headers = {"x-tenant": call.subscriber, "authorization": "Bearer of-the-test", "x-api-key": "of-the-test"}
        headers |= {"anthropic-version": "2023-06-01"}
        headers |= {"x-script": call.script} if call.script else {}
        async with session.post(whole.proxy_url + call.path, json=call.body, headers=headers) as answer:
            await answer.read()


async def test_every_expression_gives_data_or_is_known_to_have_none(tmp_path: Path) -> None:
    async with watched(tmp_path) as (_, prometheus):
        for name in DASHBOARDS:
            for panel in dashboard(name):
                for target in panel["targets"]:
                    expression = written_out(target["expr"])
                    found = await prometheus.query(expression)
                    title = f"{name}: {panel['title']}"
                    assert bool(found) is (title not in EMPTY_PANELS), f"{title}: {expression}"
        rules = await prometheus.rules()
        assert {rule["alert"] for rule in alerts()} == set(rules)
        for rule in alerts():
            told = rules[rule["alert"]]
            assert told["health"] == "ok", f"{rule['alert']}: {told.get('lastError')}"
            for series in re.findall(r"\bsidecar_\w+(?:\{[^}]*\})?", rule["expr"]):
                found = await prometheus.query(series)
                assert bool(found) is (series not in EMPTY_SERIES), f"{rule['alert']}: {series}"
        firing = {name for name, told in rules.items() if told["alerts"]}
        assert firing <= FIRES


async def test_subscribers_are_told_apart_up_to_the_number_and_the_others_are_one(tmp_path: Path) -> None:
    async with watched(tmp_path) as (whole, prometheus):
        by = "sum by (subscriber) (sidecar_subscriber_{}_total)"
        calls = {
            row["metric"]["subscriber"]: float(row["value"][1]) for row in await prometheus.query(by.format("calls"))
        }
        assert calls == {"acme": 4 * ROUNDS, "globex": 3 * ROUNDS, "other": 2 * ROUNDS}
        costs = {
            row["metric"]["subscriber"]: float(row["value"][1]) for row in await prometheus.query(by.format("cost_usd"))
        }
        code, out, err = await whole.command("usage", "--by", "subscriber", "--format", "json")
        assert code == 0, err
        known = {row["subscriber"]: float(row["cost_usd"]) for row in json.loads(out) if row["cost_usd"]}
        assert costs["acme"] == pytest.approx(known["acme"])
        assert costs["other"] == pytest.approx(known["initech"])
        routes = await prometheus.query("sum(sidecar_route_cost_usd_total)")
        assert float(routes[0]["value"][1]) == pytest.approx(sum(known.values()))
