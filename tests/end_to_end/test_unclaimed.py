"""What nobody knows, as an operator meets it: the metric, the log, `usage`, and a pin that can match nothing."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
from support.rawhttp import RawUpstream, answering, reply
from support.whole import Whole

BODY = b'{"answer":"x","usage":{"words":7}}'
KIND = 'sidecar_usage_anomalies_total{kind="answer_unclaimed"}'


async def test_an_answer_that_speaks_of_usage_and_is_nobodys_is_seen_in_all_places(tmp_path: Path) -> None:
    answer = reply(BODY, fields=b"Content-Type: application/json\r\n")
    async with RawUpstream(answering(answer)) as upstream:
        whole = Whole(
            tmp_path / "data", upstream.url, SIDECAR_ROUTES="/own/{secret}", SIDECAR_PROVIDERS="/v1/%6dine=openai"
        )
        async with whole, aiohttp.ClientSession() as session:
            assert f"{KIND} 0.0" in await whole.text("/metrics")
            for number in range(3):
                async with session.post(f"{whole.proxy_url}/own/s3cret{number}", json={}) as got:
                    assert await got.read() == BODY
            await whole.settled()
            assert f"{KIND} 3.0" in await whole.text("/metrics")
            code, out, _ = await whole.command("usage")
            assert code == 0
            assert out.splitlines()[-1].startswith("note: since this sidecar started 3 responses speak of usage")
            code, out, _ = await whole.command("usage", "--format", "json")
            assert code == 0
            assert json.loads(out)
            records = await whole.records()
            assert [record["usage"] for record in records] == [None] * 3
            assert await whole.stop() == 0
        code, out, _ = await whole.command("usage")  # and where none is running, sums alone
        assert code == 0
        assert "note:" not in out
        code, out, _ = await whole.command("check")
        assert "note: SIDECAR_PROVIDERS: /v1/%6dine can match nothing" in out
    lines = [json.loads(line) for line in whole.log.read_text().splitlines() if line.startswith("{")]
    told = [line for line in lines if line.get("kind") == "answer_unclaimed"]
    # Each process that reads usage says it once: that of the first call, and that of the plain ones after it.
    assert 1 <= len(told) == len({line["role"] for line in told})
    said = told[0]
    assert (said["level"], said["route"], said["host"]) == ("WARNING", "/own/{secret}", "127.0.0.1")
    assert "s3cret" not in whole.log.read_text()
    assert any("/v1/%6dine can match nothing" in line["message"] for line in lines)
