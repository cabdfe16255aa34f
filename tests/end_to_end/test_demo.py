"""The demo: ends by itself with the right figures, says when they are wrong, and stays up when asked to."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.whole import ROOT, environment

from sidecar.cli.demo import printing
from sidecar.cli.limits import report
from sidecar.cli.shared import known_backend_settings
from sidecar.dev import demo, demo_limits
from sidecar.dev.mock_backends.contract import KEY, SECRET
from sidecar.runtime import app
from sidecar.settings import load

LIMIT_S = 45.0


async def spawn(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "sidecar", "demo", *arguments),
        env=environment({}),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def start_with(**settings: str) -> Any:
    def start(environ: Mapping[str, str]) -> AbstractAsyncContextManager[Any]:
        return app.running(load({**environ, **settings}, backend_settings=known_backend_settings()))

    return start


async def test_the_command_ends_by_itself_with_table_balance_and_where_to_look() -> None:
    process = await spawn()
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    text = out.decode()
    assert process.returncode == 0, text + err.decode()
    assert err == b""
    for provider in ("openai", "anthropic"):
        calls = [line for line in text.splitlines() if re.match(rf"  \w+ +{provider} ", line)]
        assert any("plain" in line for line in calls)
        assert any("streamed" in line for line in calls)
        assert any(re.search(rf"\b{provider} +\S+ +\d+ +\d", line) for line in calls), "a row of the usage table"
    total = sum(call.tokens.input for call in demo.CALLS if call.tokens)
    assert f"{total:,}" in text
    assert "admitted 8  =  recorded 8  +  open 0  +  lost 0" in text
    assert "Where to look next" in text
    assert "WRONG" not in text


MODES = [(name, None) for name in sorted(demo.STAND_INS)] + [
    *(("revenium", mode) for mode in ("event", "rate", "ingest", "events", "completions")),
    *(("stripe", mode) for mode in ("v2", "stream")),
]


@pytest.mark.parametrize(("backend", "mode"), MODES)
async def test_every_backend_it_knows_gets_the_calls(backend: str, mode: str | None) -> None:
    said: list[str] = []
    assert await demo.run(start_with(), printing(), backend=backend, mode=mode, say=said.append) == 0, "\n".join(said)
    text = "\n".join(said)
    assert re.search(rf"What arrived at {backend}: \d+ \(delivered \d+\)", text)
    assert re.search(r"^  POST /\S+$", text, re.MULTILINE)
    tokens = sum(call.tokens.input for call in demo.CALLS if call.tokens and call.subscriber == "acme")
    assert re.search(rf"^  (cus_)?acme +3 +{tokens:,} ", text, re.MULTILINE), text
    assert KEY not in text
    assert SECRET not in text


async def test_an_unknown_backend_is_said_before_anything_starts() -> None:
    process = await spawn("--backend", "nope")
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert "nope" in err.decode()
    assert "webhook" in err.decode()


async def test_a_mode_belongs_to_a_backend_that_has_some() -> None:
    for arguments in (["--mode", "v2"], ["--backend", "lago", "--mode", "v2"], ["--backend", "stripe", "--mode", "v9"]):
        process = await spawn(*arguments)
        async with asyncio.timeout(LIMIT_S):
            _, err = await process.communicate()
        assert process.returncode == 2, arguments
        assert "MODE" in err.decode() or "--mode" in err.decode()


async def test_it_notices_what_a_backend_was_not_told() -> None:
    said: list[str] = []
    only_calls = start_with(SIDECAR_STRIPE_METERS="api_calls")
    assert await demo.run(only_calls, printing(), backend="stripe", say=said.append) == 1
    assert [line for line in said if line.startswith("WRONG: cus_acme: stripe was told 0 input_tokens instead of")]


async def test_it_notices_when_the_figures_are_wrong() -> None:
    """With `stop` the call whose client hung up is cut upstream, so its tokens are never known."""
    said: list[str] = []
    assert await demo.run(start_with(SIDECAR_ON_DISCONNECT="stop"), printing(), say=said.append) == 1
    assert [line for line in said if line.startswith("WRONG: initech: the upstream reported")]


async def test_it_notices_a_backend_that_refuses() -> None:
    said: list[str] = []
    wrong_secret = start_with(SIDECAR_WEBHOOK_SECRET="another-secret-than-the-receiver-has")
    assert await demo.run(wrong_secret, printing(), backend="webhook", say=said.append, settle_s=2.0) == 1
    assert "WRONG: not settled in time: webhook" in said
    assert "WRONG: /webhook was blocked by the receiver" in said


async def test_keep_stays_up_until_it_is_told_to_stop() -> None:
    process = await spawn("--keep")
    assert process.stdout is not None
    said = b""
    try:
        async with asyncio.timeout(LIMIT_S):
            while b"Content-Type: application/json" not in said:
                said += await process.stdout.readline()
            proxy = re.search(r"curl (http://\S+)/v1/chat/completions", said.decode())
            data_dir = re.search(r"SIDECAR_DATA_DIR=(\S+)", said.decode())
            assert proxy is not None
            assert data_dir is not None
            body = {"model": "gpt-5-mini", "messages": []}
            headers = {"Authorization": "Bearer x", "x-tenant": "you"}
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{proxy[1]}/v1/chat/completions", json=body, headers=headers) as answer,
            ):
                assert answer.status == 200
            process.send_signal(signal.SIGINT)
            rest, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    assert "the demo's data goes with it" in rest.decode()
    assert not Path(data_dir[1]).exists()


async def test_limits_show_a_customer_that_runs_into_one_and_who_is_at_what() -> None:
    process = await spawn("--limits")
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    text = out.decode()
    assert process.returncode == 0, text + err.decode()
    acme = re.findall(r"^  acme +(\d{3}) ", text, re.MULTILINE)
    assert acme[: acme.index("402")] == ["200"] * acme.index("402")
    assert set(acme[acme.index("402") :]) == {"402"}
    assert "insufficient_quota: The limit monthly-budget is used up." in text
    assert re.search(r"monthly-budget +subscriber acme +0\.00\d+ +0 +0\.003 +1\d\d\.\d", text), (
        "the table of the limits"
    )
    assert re.search(r"trial +subscriber initech +2 +0 +2 +100\.0", text)


async def test_limits_that_do_not_hold_are_said_and_end_with_one() -> None:
    said: list[str] = []
    start = start_with(SIDECAR_GATE_DRY_RUN="true")
    assert await demo_limits.run(start, printing(), report, say=said.append) == 1
    assert any("acme: 0 calls were denied" in line for line in said)
    assert any("the trial's third call was not denied" in line for line in said)


async def test_limits_go_with_nothing_else() -> None:
    process = await spawn("--limits", "--keep")
    async with asyncio.timeout(LIMIT_S):
        _, err = await process.communicate()
    assert process.returncode == 2
    assert b"--limits shows limits alone" in err
