"""Headless Chromium, driven by its DevTools protocol over a WebSocket: what a page asks for, says and draws.

Protocol: https://chromedevtools.github.io/devtools-protocol/. The browser can reach this machine only (every other name
is made not to exist), and keeps nothing.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
START_LIMIT_S: Final = 45.0  # a busy machine of two cores, and the first start of a fresh profile
ANSWER_LIMIT_S: Final = 45.0
MESSAGE_BYTES_MAX: Final = 64 << 20  # a picture of a long page
KEYS: Final = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}


def chromium() -> str | None:
    """Where it is, or None."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class BrowserError(AssertionError):
    """What the page said went wrong."""


class Tab:
    """One page. What it asked for and what went wrong in it gathers in `requests` and `errors`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.requests: list[str] = []  # addresses, in order
        self.received_bytes = 0  # on the wire, heads not counted
        self.errors: list[str] = []  # of the console, uncaught ones, and what the policy refused
        self._reading = asyncio.create_task(self._read())

    async def begin(self) -> Tab:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")
        return self

    async def send(self, method: str, **parameters: Any) -> Any:
        number = next(self._ids)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
        async with asyncio.timeout(ANSWER_LIMIT_S):
            return await self._waiting[number]

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                waiting = self._waiting.pop(told["id"])
                if not waiting.done():
                    if "error" in told:
                        waiting.set_exception(BrowserError(told["error"]["message"]))
                    else:
                        waiting.set_result(told["result"])
            else:
                self._happened(told["method"], told["params"])

    def _happened(self, method: str, told: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Network.loadingFinished":
            self.received_bytes += int(told["encodedDataLength"])
        elif method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}".strip())

    async def open(self, url: str) -> None:
        found = await self.send("Page.navigate", url=url)
        assert not found.get("errorText"), f"{url}: {found['errorText']}"

    async def eval(self, script: str) -> Any:
        """The value of an expression, awaited where it is a promise; what it throws is raised."""
        found = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise BrowserError(found["exceptionDetails"]["exception"].get("description", script))
        return found["result"].get("value")

    async def until(self, script: str, *, limit_s: float = 30.0) -> Any:
        """Wait until an expression is true; its value."""
        value: Any = None
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    with suppress(BrowserError):  # the page is being loaded
                        if value := await self.eval(script):
                            return value
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.eval("document.body ? document.body.innerText.slice(0, 3000) : ''")
            raise AssertionError(f"never came true: {script}; {self.errors}; the page says:\n{text}") from None

    async def text(self, selector: str) -> str:
        return str(await self.eval(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def key(self, key: str, *, modifiers: int = 0) -> None:
        """Press and let go; `modifiers`: 8 for shift."""
        code = {"windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers, "key": key}
        typed = {"Enter": {"text": "\r"}, " ": {"text": " "}}.get(key, {})
        await self.send("Input.dispatchKeyEvent", type="keyDown" if typed else "rawKeyDown", **code, **typed)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    async def type(self, text: str) -> None:
        await self.send("Input.insertText", text=text)

    async def window(self, width: int, height: int, *, scale: float = 1, dark: bool = False) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self, *, form: str = "png", **parameters: Any) -> bytes:
        found = await self.send("Page.captureScreenshot", format=form, **parameters)
        return base64.b64decode(found["data"])

    async def aclose(self) -> None:
        self._reading.cancel()
        with suppress(asyncio.CancelledError):
            await self._reading
        await self._socket.close()


class Browser:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._tabs: list[Tab] = []

    async def tab(self) -> Tab:
        async with self._session.put(f"{self._url}/json/new?about:blank") as answer:
            target = (await answer.json())["webSocketDebuggerUrl"]
        socket = await self._session.ws_connect(target, max_msg_size=MESSAGE_BYTES_MAX)
        tab = await Tab(socket).begin()
        self._tabs.append(tab)
        return tab

    async def aclose(self) -> None:
        for tab in self._tabs:
            await tab.aclose()


@asynccontextmanager
async def browser(folder: Path, *arguments: str) -> AsyncIterator[Browser]:
    """A fresh one, with its profile in `folder`."""
    path = chromium()
    assert path is not None
    process = await asyncio.create_subprocess_exec(
        path,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
        "--disable-default-apps",
        "--no-proxy-server",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        *arguments,
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = await _port(folder / "DevToolsActivePort", lambda: process.returncode)
        async with aiohttp.ClientSession() as session:
            found = Browser(session, f"http://127.0.0.1:{port}")
            try:
                yield found
            finally:
                await found.aclose()
    finally:
        # All that it has started are in its group: none stays behind.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _port(path: Path, code: Callable[[], int | None]) -> int:
    async with asyncio.timeout(START_LIMIT_S):
        while True:
            assert code() is None, f"the browser ended with {code()}"
            with suppress(OSError, ValueError, IndexError):
                return int(path.read_text().splitlines()[0])
            await asyncio.sleep(0.05)
