"""`metering-sidecar demo --limits`: a customer runs into its limit, another goes on, and who is at what.

It is the demo's sidecar and scripted upstream with two limits in front. What is shown is checked: a call that was
denied never reached the upstream, and what the limits count is what the ledger's records cost.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from sidecar.dev import demo
from sidecar.dev.mock_llm import Script, ScriptedLLM
from sidecar.ledger import LedgerReader

LIMITS: Final = """\
[[limits]]
name = "monthly-budget"     # of each subscriber
unit = "cost_usd"
amount = "0.003"
window = "month"

[[limits]]
name = "trial"
subscriber = "initech"
unit = "calls"
amount = 2
window = "total"
"""
CALLS: Final = ("acme",) * 6 + ("globex",) * 2 + ("initech",) * 3
_BODY: Final = orjson.dumps({"model": "gpt-5-mini", "messages": [{"role": "user", "content": "How is the sea?"}]})


async def run(
    start: demo.Start,
    printing: demo.Printing,
    show: Callable[[Sequence[dict[str, Any]]], str],
    *,
    say: demo.Say = demo.say_at_once,
    settle_s: float = demo.SETTLE_S,
) -> int:
    """From beginning to end; the exit code. `show`: the table of the command `limits`."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metering-sidecar-demo-")))
        config = folder / "sidecar.toml"
        config.write_text(LIMITS)
        llm = ScriptedLLM(Script())
        upstream_url = await llm.start()
        stack.push_async_callback(llm.aclose)
        environ = demo.environment(upstream_url, folder / "data") | {"SIDECAR_CONFIG": str(config)}
        sidecar = await stack.enter_async_context(start(environ))
        say(f"scripted upstream  {upstream_url}  (nothing leaves this machine)")
        say(f"sidecar            {sidecar.proxy_url}  in front of it, with these limits:")
        say("")
        say(demo.indent(LIMITS))
        say("")
        say("Calls, one after the other:")
        statuses = await _send(sidecar.proxy_url, say)
        say("")
        balance = await demo.settled(sidecar.admin_url, len(CALLS), settle_s)
        async with aiohttp.ClientSession(sidecar.admin_url) as session, session.get("/limits") as response:
            rows: list[dict[str, Any]] = orjson.loads(await response.read())["limits"]
        say("Who is at what (metering-sidecar limits):")
        say(demo.indent(show(rows)))
        say("")
        usage = LedgerReader(folder / "data" / "ledger.db").usage(("subscriber",))
        say("What it cost (metering-sidecar usage --by subscriber):")
        say(demo.indent(printing.usage(usage, ("subscriber",))))
        say("")
        costs = {row.group[0] or "": Decimal(row.cost_usd or 0) for row in usage}
        problems = _wrong(statuses, len(llm.seen), rows, costs)
        if not balance["holds"]:
            problems.append("the balance does not hold")
        for problem in problems:
            say(f"WRONG: {problem}")
        say("Limits, windows and what a denied client gets: docs/gate.md")
    return 1 if problems else 0


async def _send(proxy_url: str, say: demo.Say) -> list[tuple[str, int]]:
    statuses = []
    async with aiohttp.ClientSession(proxy_url) as session:
        for subscriber in CALLS:
            headers = {"x-tenant": subscriber, "Content-Type": "application/json", "Authorization": "Bearer sk-demo"}
            async with session.post("/v1/chat/completions", data=_BODY, headers=headers) as response:
                body = orjson.loads(await response.read())
                said = "answered"
                if response.status != 200:
                    error = body["error"]
                    limit = response.headers["X-Sidecar-Limit"]
                    said = f"{error['code']}: {error['message']}  (X-Sidecar-Limit: {limit})"
                say(f"  {subscriber:<8} {response.status}  {said}")
                statuses.append((subscriber, response.status))
    return statuses


def _wrong(
    statuses: Sequence[tuple[str, int]], answered: int, rows: Sequence[Mapping[str, Any]], costs: Mapping[str, Decimal]
) -> list[str]:
    """Where what was shown does not fit together. `answered`: the calls that the upstream had."""
    problems = []
    passed = sum(status == 200 for _, status in statuses)
    if answered != passed:
        problems.append(f"{passed} calls were let through, the upstream had {answered}")
    used = {row["scope"]["subscriber"]: row for row in rows if row["limit"] == "monthly-budget"}
    for subscriber in dict.fromkeys(CALLS):
        row, cost = used.get(subscriber), costs.get(subscriber, Decimal())
        counted = Decimal(row["used"]) if row is not None else Decimal()
        if counted != cost:
            problems.append(f"{subscriber}: the limit has counted {counted} USD, its calls cost {cost}")
        denied = sum(who == subscriber and status == 402 for who, status in statuses)
        if row is not None and (cost >= Decimal(row["amount"])) != (denied > 0) and subscriber != "initech":
            problems.append(f"{subscriber}: {denied} calls were denied at {cost} of {row['amount']} USD")
    if sum(status == 402 for who, status in statuses if who == "initech") != 1:
        problems.append("initech: the trial's third call was not denied")
    return problems
