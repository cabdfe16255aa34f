"""The page of the admin port, in a real browser: it says what the commands say, draws it, and takes names for texts."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from support.browser import Tab, browser, chromium
from support.lanes import prepare
from support.months import fill
from support.whole import ROOT, Whole, running_receiver

from sidecar.dev.demo import CALLS
from sidecar.dev.mock_llm import Script, ScriptedLLM
from sidecar.runtime.admin.page import POLICY

needs_chromium = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")
pytestmark = pytest.mark.timeout(180)

TOKEN: Final = "a-token-of-the-test"
LIMITS: Final = """
[[limits]]
name = "calls-a-day"
unit = "calls"
amount = 10
window = "day"
subscriber = "*"
action = "shadow"

[subscribers.acme]
name = "Acme Inc."
"""
FIRST_VIEW_BYTES_MAX: Final = 300 << 10
# What a client may call itself. A header's bytes are Latin-1 on the wire; these are what a tenant header may hold.
HOSTILE: Final = (
    "<img src=x onerror=window.hurt=1>",
    '"><script>window.hurt=1</script>',
    "javascript:window.hurt=1",
    "{{7*7}}${window.hurt=1}",
    "=HYPERLINK(1)",
    "x" * 200,
)
RTL: Final = "\u202e\u05d0\u05d1\u05d2 evil\u2066 <b>bold</b>"


@asynccontextmanager
async def shown(
    tmp_path: Path, *, rounds: int = 1, path: str = "", config: str = LIMITS, **settings: str
) -> AsyncIterator[tuple[Whole, Tab]]:
    """A sidecar with some calls behind it, and the page of it, looked at."""
    (tmp_path / "sidecar.toml").write_text(config)
    llm = ScriptedLLM(Script())
    upstream = await llm.start()
    try:
        async with running_receiver() as (_, receiver), browser(tmp_path / "profile") as chrome:
            whole = Whole(
                tmp_path / "data",
                upstream,
                SIDECAR_SUBSCRIBER="header:x-tenant",
                SIDECAR_BACKENDS="ledger,meter",
                SIDECAR_METER_URL=f"{receiver}/meter",
                SIDECAR_METER_BATCH="1",
                SIDECAR_CONFIG=str(tmp_path / "sidecar.toml"),
                **settings,
            )
            async with whole, aiohttp.ClientSession() as session:
                await session.post(f"{receiver}/_faults", json={"do": "status", "status": 400, "times": 2})
                for _ in range(rounds):
                    await send(session, whole)
                if rounds:
                    await whole.settled()
                tab = await chrome.tab()
                await tab.window(1280, 900)
                await tab.open(f"{whole.admin_url}/{path}")
                await looked(tab)
                yield whole, tab
    finally:
        await llm.aclose()


async def send(session: aiohttp.ClientSession, whole: Whole) -> None:
    for call in CALLS:
        await one_call(session, whole, call.subscriber, call.path, call.body, call.script)


async def one_call(
    session: aiohttp.ClientSession,
    whole: Whole,
    tenant: str,
    path: str = CALLS[0].path,
    body: Any = None,
    script: str = "",
) -> None:
    headers = {"x-tenant": tenant, "authorization": "Bearer of-the-test", "x-api-key": "of-the-test"}
    headers |= {"anthropic-version": "2023-06-01", "x-feature": "search"} | ({"x-script": script} if script else {})
    async with session.post(whole.proxy_url + path, json=body or CALLS[0].body, headers=headers) as answer:
        await answer.read()


async def looked(tab: Tab) -> None:
    """Once more asked for everything than now."""
    looks = await tab.eval("Number(document.documentElement?.dataset.looks ?? 0)")
    await tab.until(
        f"Number(document.documentElement.dataset.looks ?? 0) > {looks} && document.readyState === 'complete'"
    )


async def table(tab: Tab, selector: str) -> list[list[str]]:
    """The cells of a table as they are read, head and foot too."""
    script = f"""[...document.querySelectorAll({json.dumps(selector + " tr")})]
        .map((row) => [...row.cells].map((cell) => cell.textContent.trim()))"""
    rows: list[list[str]] = await tab.eval(script)
    return rows


async def told(whole: Whole, *command: str) -> Any:
    code, out, err = await whole.command(*command, "--format", "json")
    assert code == 0, err
    return json.loads(out)


def nothing_wrong(whole: Whole, tab: Tab) -> None:
    assert tab.errors == []
    foreign = [url for url in tab.requests if not url.startswith((whole.admin_url + "/", "about:"))]
    assert foreign == []


def plain(text: str) -> Decimal | None:
    return None if text == "–" else Decimal(text.replace(",", "").lstrip("$"))


@needs_chromium
async def test_its_numbers_are_those_of_the_commands(tmp_path: Path) -> None:
    async with shown(tmp_path, rounds=2) as (whole, tab):
        today = datetime.now(UTC).strftime("%Y-%m-%d")
        by_model = await told(whole, "usage", "--by", "model", "--since", today)
        [total] = await told(whole, "usage", "--by", "", "--since", today)

        # The picture over time, as its table has it: exactly.
        head, *days, foot = await table(tab, "#chart-table")
        costs = {row["model"]: Decimal(row["cost_usd"]) for row in by_model if row["cost_usd"]}
        assert head[1:-1] == sorted(costs, key=lambda model: -costs[model])
        assert [plain(cell) for cell in foot[1:]] == [*sorted(costs.values(), reverse=True), Decimal(total["cost_usd"])]
        assert [plain(cell) for cell in days[-1][1:]] == [plain(cell) for cell in foot[1:]], "all of it was today"
        assert len(days) == 7

        tiles = dict(
            await tab.eval(
                "[...document.querySelectorAll('#tiles > div')].map((one) => [one.querySelector('dt').textContent,"
                "one.querySelector('dd').firstChild.textContent])"
            )
        )
        assert plain(tiles["calls"]) == total["calls"] == 2 * len(CALLS)
        assert plain(tiles["errors"]) == total["errors"]
        assert plain(tiles["tokens"]) == total["total_tokens"]

        _, *top = await table(tab, "#top-list")
        by_subscriber = await told(whole, "usage", "--by", "subscriber", "--since", today)
        expected = sorted(by_subscriber, key=lambda row: -Decimal(row["cost_usd"] or 0))
        assert [row[0] for row in top] == [
            "Acme Inc." if row["subscriber"] == "acme" else row["subscriber"] for row in expected
        ]
        assert [plain(row[4]) for row in top] == [row["calls"] for row in expected]

        balance = await told(whole, "balance")
        rows = await table(tab, "#balance-table")
        assert [plain(cell) for cell in rows[1][1:]] == [balance["admitted"], balance["recorded"], balance["open"], 0]
        assert await tab.eval("document.querySelector('#lanes').hidden"), "it delivers all by itself"
        backends = {row[0]: row[1:] for row in rows[3:]}
        assert backends["meter"][3] == "2 (http_400 2)"
        assert plain(backends["ledger"][1]) == balance["backends"]["ledger"]["delivered"]
        assert "holds" in await tab.text("#balance-says")

        parked = await told(whole, "spool", "parked")
        _, *rows = await table(tab, "#parked-list details")
        assert sorted(row[5] for row in rows) == sorted(one["event_id"] for one in parked)
        assert await tab.text("#parked-list code") == "metering-sidecar spool redrive --backend meter --reason http_400"

        [today_s] = (await whole.get("/times"))["days"]
        *_, times = await table(tab, "#times-table")
        assert plain(times[1]) == today_s["calls"] == len(records := await whole.records())

        limits = (await told(whole, "limits"))["limits"]
        _, *rows = await table(tab, "#limits-list")
        shown_limits = {row[1].removeprefix("subscriber "): (float(row[3]), row[4]) for row in rows}
        assert shown_limits == {
            {"acme": "Acme Inc."}.get(row["scope"]["subscriber"], row["scope"]["subscriber"]): (
                row["percent"],
                f"{row['used']} of {row['amount']}",
            )
            for row in limits
        }

        _, *rows = await table(tab, "#records-list")
        assert [row[1] for row in rows] == [str(one["status"]) for one in reversed(records)]
        assert [plain(row[7]) for row in rows] == [one["usage"]["input_tokens"] for one in reversed(records)]
        nothing_wrong(whole, tab)


@needs_chromium
async def test_lanes_say_who_delivers_them_and_what_waits(tmp_path: Path, postgres_database: str) -> None:
    await prepare(postgres_database, ["meter"])  # by itself a start waits for that for five seconds only
    async with shown(
        tmp_path, SIDECAR_LEDGER_URL=postgres_database, SIDECAR_DELIVER="elected", SIDECAR_INSTANCE="edge-1"
    ) as (whole, tab):
        shows = "[...document.querySelectorAll('#lanes-list tfoot td')].at(-2)?.textContent"
        await tab.until(f"{shows} === '2 (http_400 2)'")
        said = (await told(whole, "balance"))["lanes"]
        _, *rows, foot = await table(tab, "#lanes-list")
        assert [row[:3] for row in rows] == [
            [str(one["lane"]), "edge-1", str(one["recorded"])] for one in said["lanes"]
        ]
        assert foot == ["all", "1 sidecar", str(len(CALLS)), "0", "2 (http_400 2)", "0"]
        assert await tab.text("#lanes-says") == "The balance holds: every record is in exactly one place of its lane."
        # What is parked there is in its own part as well, and the backend among the others.
        await tab.until("document.querySelectorAll('#parked-list details tr').length === 3")
        _, *backends = await table(tab, "#backends")
        assert {row[0]: (row[1], row[4]) for row in backends} == {"ledger": ("up", "0"), "meter": ("up", "2")}
        nothing_wrong(whole, tab)


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_pictures_have_content_wide_and_narrow(tmp_path: Path, dark: bool) -> None:
    async with shown(tmp_path) as (whole, tab):
        for width in (1280, 390):
            await tab.window(width, 900, dark=dark)
            await tab.until(
                f"innerWidth === {width} && document.querySelector('#chart svg').width.baseVal.value < {width}"
            )
            assert await tab.eval("document.documentElement.scrollWidth") <= width, (
                "the page itself never scrolls sideways"
            )
            for picture, part in (
                ("#chart", "rect.s0"),
                ("#errors", "rect.sbad"),
                ("#times", "circle.s0"),
                ("#balance-picture", "rect.c-parked"),
                ("#top-list", ".bar .s0"),
                ("#limits-list", ".bar .c-open, .bar .c-ok, .bar .c-warn"),
            ):
                boxes = await tab.eval(
                    f"[...document.querySelectorAll('{picture} svg')].flatMap((svg) => "
                    f"[...svg.querySelectorAll('{part}')]).map((one) => one.getBoundingClientRect())"
                    ".filter((box) => box.width >= 1 && box.height >= 1).length"
                )
                assert boxes > 0, f"{picture} at {width}"
            ground = await tab.eval("getComputedStyle(document.body).backgroundColor")
            text = await tab.eval("getComputedStyle(document.body).color")
            assert (brightness(ground) < brightness(text)) is dark
            bars = await tab.eval("getComputedStyle(document.querySelector('#chart rect.s0')).fill")
            assert abs(brightness(bars) - brightness(ground)) > 60, "bars stand out"
            assert len(await tab.picture()) > 10_000
        nothing_wrong(whole, tab)


def brightness(color: str) -> float:
    red, green, blue = (int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


@needs_chromium
async def test_what_is_chosen_is_asked_for_and_stands_in_the_address(tmp_path: Path) -> None:
    chosen = "#measure=calls&stack=subscriber&period=1d&top=route"
    async with shown(tmp_path, path=chosen, SIDECAR_DIMENSIONS="feature=x-feature") as (whole, tab):
        head, *hours, foot = await table(tab, "#chart-table")
        assert len(hours) == 24
        assert sorted(head[1:-1]) == ["Acme Inc.", "globex", "initech"]
        assert foot[-1] == str(len(CALLS))
        # Its name in the legend shows that subscriber alone, everywhere.
        await tab.eval(
            "[...document.querySelectorAll('#legend button')].find((one) => one.innerText.includes('globex')).click()"
        )
        await tab.until("document.querySelector('#chart-table tfoot td:last-child').textContent === '3'")
        await tab.until("document.querySelectorAll('#records-list tbody tr').length === 3")
        assert "where=subscriber%3Dglobex" in await tab.eval("location.hash")
        await tab.eval("document.querySelector('#filters button').click()")
        await tab.until(f"document.querySelector('#chart-table tfoot td:last-child').textContent === '{len(CALLS)}'")
        # Of the last calls those that fit a text.
        await tab.eval("document.querySelector('#records-text').focus()")
        await tab.type("embedd")
        await tab.until("document.querySelectorAll('#records-list tbody tr').length === 1")
        assert "1 of the last" in await tab.text("#records-count")
        await tab.until("location.hash.includes('text=embedd')")
        # A dimension is offered as soon as a call has it.
        await tab.eval("document.querySelector('#top-by').value = 'feature'")
        await tab.eval("document.querySelector('#top-by').dispatchEvent(new Event('change'))")
        await tab.until("document.querySelector('#top-list tbody th')?.textContent === 'search'")
        _, [_, _, shown_calls, of_all, _] = await table(tab, "#top-list")
        assert (shown_calls, of_all) == (str(len(CALLS)), "100%")
        # Nonsense in the address is not asked for.
        await tab.eval("location.hash = '#measure=nonsense&period=x&bucket=y&zone=z&n=7&calls=9999999'")
        await looked(tab)
        assert await tab.eval("document.querySelector('#measure').value") == "cost_usd"
        nothing_wrong(whole, tab)


@needs_chromium
async def test_a_hostile_name_is_a_text(tmp_path: Path) -> None:
    config = f"[subscribers.rtl]\nname = {json.dumps(RTL)}\n"
    async with shown(tmp_path, rounds=0, config=config, path="#measure=calls&stack=subscriber") as (whole, tab):
        async with aiohttp.ClientSession() as session:
            for tenant in (*HOSTILE, "rtl"):
                await one_call(session, whole, tenant)
        await whole.settled()
        await looked(tab)
        await tab.until(f"document.querySelectorAll('#top-list tbody tr').length === {len(HOSTILE) + 1}")
        _, *rows = await table(tab, "#top-list")
        names = {row[0] for row in rows}
        assert names == {*HOSTILE, RTL.replace("\u202e", "\ufffd").replace("\u2066", "\ufffd")}
        for place in ("#top-list", "#legend", "#records-list"):
            assert await tab.eval(
                f"[...document.querySelectorAll('{place} bdi')].some((one) => one.textContent.startsWith('<img'))"
            ), f"{place}: kept apart from what stands around it"
        assert await tab.eval("window.hurt ?? null") is None
        assert await tab.eval("document.querySelectorAll('main img, main script, main b b').length") == 0
        await tab.window(390, 900)
        await looked(tab)
        assert await tab.eval("document.documentElement.scrollWidth") <= 390, "200 characters push nothing aside"
        # One of them as a filter: asked for as it is, and shown as a text again.
        await tab.eval(
            "[...document.querySelectorAll('#top-list button')].find((one) => one.innerText.startsWith('<img')).click()"
        )
        await tab.until("document.querySelector('#chart-table tfoot td:last-child')?.textContent === '1'")
        assert HOSTILE[0] in await tab.text("#filters")
        assert await tab.eval("window.hurt ?? null") is None
        nothing_wrong(whole, tab)


@needs_chromium
async def test_it_is_used_by_keys_and_told_to_a_screen_reader(tmp_path: Path) -> None:
    async with shown(tmp_path) as (whole, tab):
        await tab.key("Tab")
        assert await tab.eval("document.activeElement.className") == "skip", "the first stop leads past the head"
        await tab.key("Enter")
        await tab.until("document.activeElement.id === 'usage'")
        await tab.key("Tab")
        assert await tab.eval("document.activeElement.id") == "measure"
        await tab.type("calls")
        await tab.eval("document.querySelector('#chart').focus()")
        await tab.key("End")
        assert "claude" in await tab.text("#chart-readout")
        assert await tab.eval("document.querySelectorAll('#chart .cursor').length") == 1
        await tab.key("ArrowLeft")
        before = await tab.text("#chart-readout")
        await looked(tab)
        assert await tab.text("#chart-readout") == before, "a look leaves the cursor where it is"
        await tab.key("Escape")
        assert await tab.text("#chart-readout") == ""
        # What the browser tells a screen reader: nothing that can be used or looked at is without a name.
        nodes = (await tab.send("Accessibility.getFullAXTree"))["nodes"]
        of_role: dict[str, list[str]] = {}
        for node in nodes:
            if not node.get("ignored"):
                of_role.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        for role in ("button", "combobox", "searchbox", "image", "table", "form", "link"):
            names = of_role.get(role, [])
            assert role == "table" or all(names), f"a {role} without a name"
            assert names, role
        assert any("stacked by model" in each and "$" in each for each in of_role["image"])
        assert any("meter: recorded 8 = delivered 6" in each for each in of_role["image"])
        assert await tab.eval("[...document.querySelectorAll('table')].every((one) => one.caption?.textContent)")
        assert await tab.eval(
            "[...document.querySelectorAll('figure')].every((one) => one.querySelector('details table'))"
        )
        nothing_wrong(whole, tab)


@needs_chromium
async def test_with_a_token_it_asks_for_it(tmp_path: Path) -> None:
    async with shown(tmp_path, SIDECAR_ADMIN_TOKEN=TOKEN) as (whole, tab):
        await tab.until("!document.querySelector('#token-form').hidden")
        assert (
            await tab.eval("document.querySelectorAll('#top-list tr, #records-list tr, #limits-list tr').length") == 0
        )
        assert "holds" in await tab.text("#balance-says"), "what names no customer is shown all the same"
        await tab.until("document.activeElement.id === 'token'")
        await tab.type("not-the-token-of-it")
        await tab.key("Enter")
        await tab.until("document.querySelector('#token-why').textContent.includes('not the token')")
        await tab.eval("document.querySelector('#token').focus()")
        await tab.type(TOKEN)
        await tab.key("Enter")
        await tab.until("document.querySelector('#token-form').hidden")
        await tab.until(f"document.querySelectorAll('#records-list tbody tr').length === {len(CALLS)}")
        assert TOKEN not in await tab.eval("location.href + document.documentElement.outerHTML + document.cookie")
        await tab.send("Page.reload")
        await looked(tab)
        await tab.until(f"document.querySelectorAll('#records-list tbody tr').length === {len(CALLS)}")
        # The browser tells of each 401; of nothing else.
        assert all("401 (Unauthorized)" in error for error in tab.errors), tab.errors
        assert all(url.startswith((whole.admin_url, "about:")) for url in tab.requests)
        async with aiohttp.ClientSession() as session:
            async with session.get(whole.admin_url + "/", headers={"Host": "evil.example"}) as answer:
                assert answer.status == 421, "not under another name"


@needs_chromium
async def test_it_goes_on_by_itself_and_says_when_it_cannot(tmp_path: Path) -> None:
    async with shown(tmp_path, SIDECAR_STOP_DELAY_S="6") as (whole, tab):
        async with aiohttp.ClientSession() as session:
            await one_call(session, whole, "a-new-one")
        await tab.until("document.querySelector('#records-list tbody').innerText.includes('a-new-one')")
        # What has not changed costs a look and no body.
        await whole.settled()
        await looked(tab)
        before = tab.received_bytes
        await looked(tab)
        assert tab.received_bytes - before < 10_000, "nothing is new"
        await tab.eval("document.querySelector('#pause').click()")
        asked = len(tab.requests)
        looks = await tab.eval("document.documentElement.dataset.looks")
        await asyncio.sleep(6)  # longer than a look is apart
        assert (len(tab.requests), await tab.eval("document.documentElement.dataset.looks")) == (asked, looks)
        await tab.eval("document.querySelector('#pause').click()")
        nothing_wrong(whole, tab)
        assert whole.process is not None
        whole.process.send_signal(signal.SIGTERM)
        await tab.until("document.querySelector('#state').innerText.includes('stopping')")
        assert await whole.process.wait() == 0
        await tab.until("document.querySelector('#state').innerText.includes('does not answer')")
        await tab.until("document.querySelector('#fresh').innerText.includes('stale')", limit_s=60)
        assert await tab.eval("document.querySelectorAll('#records-list tbody tr').length") == len(CALLS) + 1
        await whole.start()
        assert [row["calls"] for row in (await whole.get("/times"))["days"]] == [len(CALLS) + 1], "over a restart too"


@needs_chromium
async def test_the_first_view_of_a_month_of_many_is_small(tmp_path: Path) -> None:
    """500 subscribers over 30 days: what is asked for has the sums of the greatest, and not all of them."""
    (tmp_path / "data").mkdir()
    many = [f"subscriber-{number:03}" for number in range(500)]
    rows = fill(
        tmp_path / "data" / "ledger.db", until=datetime.now(UTC), days=30, subscribers=many, models=1, hours=(9,)
    )
    assert rows == 30 * 500
    async with shown(tmp_path, rounds=0, path="#period=30d&stack=subscriber") as (whole, tab):
        assert tab.received_bytes < FIRST_VIEW_BYTES_MAX
        looks = await tab.eval("Number(document.documentElement.dataset.looks)")
        assert tab.requests.count(f"{whole.admin_url}/balance") <= looks + 1, "once for all parts that need it"
        head, *_, foot = await table(tab, "#chart-table")
        assert len(head) == 1 + 7 + 1 + 1, "the greatest, all others, and the sum"
        assert head[-2] == "all others"
        since = (datetime.now(UTC) - timedelta(days=29)).strftime("%Y-%m-%d")
        [total] = await told(whole, "usage", "--by", "", "--since", since)
        assert plain(foot[-1]) == Decimal(total["cost_usd"]) == sum(plain(cell) or 0 for cell in foot[1:-1])
        _, *rows_shown = await table(tab, "#top-list")
        assert rows_shown[-1][0] == "490 others"
        nothing_wrong(whole, tab)


@needs_chromium
async def test_an_empty_sidecar_has_an_empty_page(tmp_path: Path) -> None:
    async with shown(tmp_path, rounds=0, config="") as (_, tab):
        text = await tab.text("main")
        assert "The balance holds" in text
        assert "Nothing is parked" in text
        assert "No call was recorded yet" in text
        assert not [error for error in tab.errors if "404" not in error], "there is no ledger yet"


def test_the_readme_shows_it() -> None:
    for name in ("light", "dark", "narrow"):
        picture = ROOT / "docs" / f"page-{name}.webp"
        assert 10_000 < picture.stat().st_size <= 150_000
        assert f"docs/{picture.name}" in (ROOT / "README.md").read_text()


async def test_its_files_are_sent_strictly_and_once(tmp_path: Path) -> None:
    whole = Whole(tmp_path / "data", "http://127.0.0.1:1")
    async with whole, aiohttp.ClientSession(auto_decompress=False) as session:
        size = 0
        for name in (
            "/",
            "/page/page.js",
            "/page/page.css",
            "/page/charts.js",
            "/page/ask.js",
            "/page/text.js",
            "/page/icon.svg",
        ):
            async with session.get(whole.admin_url + name, headers={"Accept-Encoding": "gzip"}) as answer:
                body = await answer.read()
                assert answer.status == 200, name
                assert answer.headers["Content-Security-Policy"] == POLICY
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Content-Encoding"] == "gzip"
                tag = answer.headers["ETag"]
                size += len(body)
            async with session.get(whole.admin_url + name, headers={"If-None-Match": tag}) as answer:
                assert (answer.status, await answer.read()) == (304, b"")
                assert answer.headers["ETag"] == tag
            async with session.get(whole.admin_url + name, headers={"Accept-Encoding": "identity"}) as answer:
                assert await answer.read() == gzip.decompress(body)
                assert "Content-Encoding" not in answer.headers
        assert size < FIRST_VIEW_BYTES_MAX / 5
        assert POLICY.startswith("default-src 'self';")
        assert "unsafe" not in POLICY
        for name in (
            "/page/",
            "/page/__init__.py",
            "/page/..%2fguard.py",
            "/page/%2e%2e/guard.py",
            "/page/nothing.js",
            "/index.html",
        ):
            async with session.get(whole.admin_url + name) as answer:
                assert answer.status in (403, 404), name
        async with session.post(whole.admin_url + "/") as answer:
            assert answer.status == 405
