"""What the log says of a fault: where it was and of which class, never what a client or an upstream sent."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import sqlite3
import sys
from collections.abc import Callable
from typing import Any

import pytest

from sidecar.backends import backend_settings
from sidecar.delivery.elected import _reason
from sidecar.model.exchange import UNREAD, UsageState
from sidecar.runtime import factory
from sidecar.runtime.logging import JsonLines, SeldomFaults, TextLines, set_up
from sidecar.settings import LogFormat, SettingsError, load
from sidecar.storage.files import StorageError, said_by

SECRET = "sk-of-a-customer"


def traced(error: BaseException) -> str:
    try:
        raise error
    except BaseException:
        record = logging.LogRecord("sidecar.x", logging.ERROR, "", 0, "it died", (), sys.exc_info())
    assert JsonLines().format(record)
    return TextLines().format(record)


def caused() -> Exception:
    try:
        int(SECRET)
    except ValueError as error:
        try:
            raise KeyError(SECRET) from error
        except KeyError as raised:
            return raised
    raise AssertionError


def while_handled() -> Exception:
    try:
        int(SECRET)
    except ValueError:
        try:
            raise LookupError(SECRET)
        except LookupError as raised:
            return raised
    raise AssertionError


def in_a_circle() -> Exception:
    first, second = ValueError(SECRET), ValueError(SECRET)
    first.__cause__, second.__cause__ = second, first
    return first


@pytest.mark.parametrize(
    ("make", "classes"),
    [
        (lambda: ValueError(f"invalid literal: {SECRET}"), ["ValueError"]),
        (lambda: UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET), ["UnicodeDecodeError"]),
        (caused, ["ValueError", "KeyError"]),
        (while_handled, ["ValueError", "LookupError"]),
        (in_a_circle, ["ValueError"]),
        (lambda: ExceptionGroup(SECRET, [TypeError(SECRET), caused()]), ["ExceptionGroup", "TypeError", "KeyError"]),
    ],
)
def test_a_traceback_has_the_classes_and_no_text(make: Callable[[], Exception], classes: list[str]) -> None:
    told = traced(make())
    assert SECRET not in told
    assert "in traced" in told
    for name in classes:
        assert f"\n{name}" in told


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (sqlite3.OperationalError("database is locked"), "sqlite3.OperationalError: database is locked"),
        (SettingsError(["SIDECAR_X is no name"]), "SIDECAR_X is no name"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_what_the_system_and_we_ourselves_say_is_told(error: Exception, said: str) -> None:
    assert said in traced(error).splitlines()[-1]


def test_in_a_line_of_log_an_error_is_its_text_or_its_class() -> None:
    assert said_by(StorageError("no room")) == "no room"
    assert said_by(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
    assert said_by(StorageError("")) == "StorageError"
    assert said_by(ValueError(SECRET)) == "ValueError"
    assert _reason(ExceptionGroup(SECRET, [ExceptionGroup(SECRET, [KeyError(SECRET)])])) == "KeyError"


class Faults:
    """A log as a process has it, at times of ours."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._out = io.StringIO()
        self._handler = logging.StreamHandler(self._out)
        self._handler.setFormatter(JsonLines())
        self._handler.addFilter(SeldomFaults(lambda: self.now_s))

    def tell(self, message: str, error: Exception | None = None, **facts: object) -> None:
        caught = None
        try:
            if error is not None:
                raise error
        except Exception:
            caught = sys.exc_info()
        record = logging.LogRecord("sidecar.x", logging.ERROR, "", 0, message, (), caught)
        if facts:
            record.facts = facts
        self._handler.handle(record)

    @property
    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._out.getvalue().splitlines()]


def test_a_fault_that_all_calls_meet_is_told_in_full_and_then_counted() -> None:
    faults = Faults()
    for _ in range(1000):
        faults.tell("a reader failed", KeyError(SECRET))
        faults.tell("a price failed", KeyError(SECRET))
        faults.tell("a reader failed", ValueError(SECRET))
    assert [(row["message"], row["error"].splitlines()[-1]) for row in faults.told] == [
        ("a reader failed", "KeyError"),
        ("a price failed", "KeyError"),
        ("a reader failed", "ValueError"),
    ]
    faults.now_s = 60.0
    for _ in range(3):
        faults.tell("a reader failed", KeyError(SECRET))
    assert [row["times"] for row in faults.told[3:]] == [1000]
    assert "in tell" in faults.told[3]["error"]


def test_faults_of_other_things_and_of_what_an_operator_asked_for_are_all_told() -> None:
    faults = Faults()
    for _ in range(3):
        faults.tell("a lane rests", KeyError(SECRET), lane=4)
        faults.tell("a lane rests", KeyError(SECRET), lane=7)
        faults.tell("cancel failed", KeyError(SECRET), uid=0, asked={"ids": ["r1"]})
        faults.tell("no room")
    told = [(row["message"], row.get("lane")) for row in faults.told]
    assert told.count(("a lane rests", 4)) == told.count(("a lane rests", 7)) == 1
    assert told.count(("cancel failed", None)) == told.count(("no room", None)) == 3


def test_the_log_of_a_process_is_bounded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    set_up("INFO", LogFormat.TEXT)
    for _ in range(50):
        try:
            raise KeyError(SECRET)
        except KeyError:
            logging.getLogger("sidecar.x").exception("a reader failed")
    assert capsys.readouterr().err.count("Traceback") == 1


class Broken(asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        raise ValueError(data.decode())


def callback(text: str) -> None:
    raise KeyError(text)


async def task(text: str) -> None:
    raise LookupError(text)


async def trouble(told: Callable[[], str]) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Broken, "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(SECRET.encode())
    loop.call_soon(callback, SECRET)
    running = asyncio.create_task(task(SECRET))
    await asyncio.wait([running])
    del running
    async with asyncio.timeout(30):
        while not all(name in told() for name in ("ValueError", "KeyError", "LookupError")):
            gc.collect()
            await asyncio.sleep(0.01)
    writer.close()
    server.close()


@pytest.mark.parametrize("uvloop", ["used", "missing"])
def test_what_the_event_loop_catches_is_told_without_what_was_in_it(
    uvloop: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if uvloop == "missing":
        monkeypatch.setitem(sys.modules, "uvloop", None)

    def told() -> str:
        return "\n".join(map(TextLines().format, caplog.records))

    with asyncio.Runner(loop_factory=factory.loop_factory()) as runner:
        runner.run(trouble(told))
        assert type(runner.get_loop()).__module__.startswith("uvloop") is (uvloop == "used")
    assert SECRET not in told()
    for place in ("in data_received", "in callback", "in task"):
        assert place in told()


def test_a_fault_in_a_usage_reader_is_told_with_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A count and `absent` alone say that something is wrong, and nobody where."""
    kinds: list[str] = []
    taps = factory.usage_taps(
        load({"SIDECAR_UPSTREAM_URL": "http://127.0.0.1:1"}, backend_settings=backend_settings()), kinds.append
    )

    def broken(*_: object) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr("sidecar.usage.response_reader.ResponseReader._finish", broken)
    request = taps.request("POST", "/v1/chat/completions", ())
    assert request is not None
    response = taps.response(request, 200, ((b"Content-Type", b"application/json"),))
    assert response is not None
    response.feed(b"{}")
    usage = response.finish(True)
    assert usage is not None
    assert (usage.usage_state, usage.reason) == (UsageState.ABSENT, UNREAD)
    assert kinds == ["reader_failed"]
    (record,) = caplog.records
    text = TextLines().format(record)
    assert "in broken" in text
    assert SECRET not in text
