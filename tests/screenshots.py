"""Take the pictures of the page that the README shows: a sidecar with a month of use, looked at in a real browser.

Run by `make screenshots`, which needs Chromium. The numbers are the same each time, the times of the last calls not.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import aiohttp
from support.browser import Tab, browser, chromium
from support.months import PEOPLE, fill
from support.whole import Whole, running_receiver

from sidecar.dev.demo import CALLS
from sidecar.dev.mock_llm import Script, ScriptedLLM
from sidecar.runtime import times
from sidecar.runtime.metrics import DAY_S, DayTimes

TODAY: Final = int(datetime.now(UTC).timestamp()) // DAY_S
DOCS: Final = Path(__file__).parent.parent / "docs"
BYTES_MAX: Final = 150_000
# Name, width, height, dark, scale, which part is scrolled to, what is chosen.
PICTURES: Final = (
    ("page-light", 1280, 1330, False, 1.0, "", "#period=30d"),
    ("page-dark", 1280, 1040, True, 1.0, "#balance", "#period=30d&stack=subscriber"),
    ("page-narrow", 400, 1040, False, 1.0, "", "#period=7d&measure=total_tokens"),
)
CONFIG: Final = """
[[limits]]
name = "calls-a-day"
unit = "calls"
amount = 25
window = "day"
subscriber = "*"
action = "shadow"

[[limits]]
name = "money-a-month"
unit = "cost_usd"
amount = "0.75"
window = "month"
subscriber = "*"
action = "shadow"
"""


async def take(folder: Path) -> None:
    (folder / "sidecar.toml").write_text(
        CONFIG + "".join(f'[subscribers.{one}]\nname = "{one.title()} Inc."\n' for one in PEOPLE)
    )
    (folder / "data").mkdir()
    fill(folder / "data" / "ledger.db", until=datetime.now(UTC), days=30, hours=range(7, 20, 3))
    times.store(folder / "data" / times.NAME, {day: took(day) for day in range(TODAY - 30, TODAY)})
    llm = ScriptedLLM(Script())
    upstream = await llm.start()
    async with running_receiver() as (_, receiver), browser(folder / "profile") as chrome:
        whole = Whole(
            folder / "data",
            upstream,
            SIDECAR_SUBSCRIBER="header:x-tenant",
            SIDECAR_BACKENDS="ledger,meter",
            SIDECAR_METER_URL=f"{receiver}/meter",
            SIDECAR_METER_BATCH="1",
            SIDECAR_CONFIG=str(folder / "sidecar.toml"),
        )
        async with whole, aiohttp.ClientSession() as session:
            await session.post(f"{receiver}/_faults", json={"do": "status", "status": 400, "times": 5})
            for _ in range(6):
                for call in CALLS:
                    headers = {"x-tenant": call.subscriber, "authorization": "Bearer x", "x-api-key": "x"}
                    headers |= {"anthropic-version": "2023-06-01"} | ({"x-script": call.script} if call.script else {})
                    async with session.post(whole.proxy_url + call.path, json=call.body, headers=headers) as answer:
                        await answer.read()
            await whole.settled()
            tab = await chrome.tab()
            for name, width, height, dark, scale, place, chosen in PICTURES:
                await tab.window(width, height, scale=scale, dark=dark)
                await tab.open("about:blank")
                await tab.open(f"{whole.admin_url}/{chosen}")
                await tab.until("Number(document.documentElement.dataset.looks ?? 0) > 0")
                if place:
                    await tab.eval(f"document.querySelector('{place}').scrollIntoView()")
                await keep(tab, DOCS / f"{name}.webp")
    await llm.aclose()


def took(day: int) -> DayTimes:
    """A day of calls that stream, slower on some days."""
    found, chance = DayTimes(), random.Random(day)
    slow = chance.uniform(0.8, 1.4)
    for _ in range(400):
        first_s = slow * chance.lognormvariate(-1.0, 0.5)
        found.first_byte.observe(first_s)
        found.whole.observe(first_s + slow * chance.lognormvariate(0.6, 0.6))
    return found


async def keep(tab: Tab, path: Path) -> None:
    picture = await tab.picture(form="webp", quality=80)
    assert len(picture) <= BYTES_MAX, f"{path.name} has {len(picture):,} bytes"
    path.write_bytes(picture)
    print(f"{path.name}: {len(picture):,} bytes")


if __name__ == "__main__":
    if chromium() is None:
        raise SystemExit("chromium is not installed (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(take(Path(scratch)))
