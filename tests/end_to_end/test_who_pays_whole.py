"""Who pays in the whole sidecar: the default, the upstream's base, and what an operator is shown of it."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import pytest
from support.rawhttp import RawUpstream, answering, reply
from support.whole import Whole
from yarl import URL


async def get(url: str, target: str, **headers: str) -> int:
    async with aiohttp.ClientSession() as session:
        async with session.get(URL(url + target, encoded=True), headers=headers) as answer:
            await answer.read()
            return answer.status


def samples(text: str) -> dict[str, float]:
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in text.splitlines())
        if not name.startswith("#")
    }


async def test_a_made_up_credential_is_counted_and_said_and_changes_nobody(tmp_path: Path) -> None:
    async with RawUpstream(answering(reply())) as upstream, Whole(tmp_path / "data", upstream.url) as whole:
        assert await get(whole.proxy_url, "/x", Authorization="Bearer REAL") == 200
        for number in range(3):
            made_up = {"x-api-key": f"made-up-{number}"}
            assert await get(whole.proxy_url, "/x", Authorization="bearer  REAL", **made_up) == 200
        await whole.settled()
        seen = samples(await whole.text("/metrics"))
        records = await whole.records()
    assert len({record["subscriber"]["id"] for record in records}) == 1
    assert seen['sidecar_attribution_anomalies_total{kind="credentials_conflict"}'] == 3
    assert seen["sidecar_ledger_bytes"] > 0
    assert seen["sidecar_spool_bytes"] > 0
    log = whole.log.read_text()
    (line,) = [json.loads(line) for line in log.splitlines() if "more than one credential" in line]
    assert line["level"] == "WARNING"
    assert "REAL" not in log
    assert "made-up" not in log


@pytest.mark.parametrize("target", ["/t/acme/x", "/./t/acme/x", "//t/%61cme/x", "/v/../../api/t/acme/x"])
async def test_the_base_of_the_upstream_is_no_part_of_the_path(tmp_path: Path, target: str) -> None:
    settings = {"SIDECAR_SUBSCRIBER": "path:2", "SIDECAR_ROUTES": "/t/{tenant}/x"}
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream:
        async with Whole(tmp_path / "data", f"{upstream.url}/api", **settings) as whole:
            await get(whole.proxy_url, target)
            (record,) = await whole.records()
    assert (record["subscriber"]["id"], record["route"]) == ("acme", "/t/{tenant}/x")
    assert seen[0].startswith(f"GET /api{target} ".encode())


async def test_an_upstream_that_is_down_is_said_with_its_reason(tmp_path: Path) -> None:
    async with Whole(tmp_path / "data", "http://127.0.0.1:1") as whole:
        assert await get(whole.proxy_url, "/x") == 502
        (record,) = await whole.records()
        seen = samples(await whole.text("/metrics"))
    assert (record["outcome"], record["error"]) == ("unreachable", "no connection to the upstream (refused)")
    assert seen['sidecar_upstream_failures_total{reason="refused"}'] == 1
    (line,) = [json.loads(line) for line in whole.log.read_text().splitlines() if "gives no response" in line]
    assert (line["level"], line["reason"], line["upstream"]) == ("WARNING", "refused", "http://127.0.0.1:1")
