"""Log lines on standard error: one JSON object each for machines, one line of text for who looks at a terminal.

ERROR: an operator must act. WARNING: odd but recovered. INFO: starts and stops. DEBUG: a batch.
Callers pass facts as `extra={"facts": {...}}`; no header value, query value, body or secret is a fact. What an
exception says may be any of these (`invalid literal for int(): …`), so a traceback ends with its class, and with its
text only where that is the system's, SQLite's or our own. A fault that every call meets is told in full once a minute.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, TypeAlias

import orjson

from sidecar.model.seldom import Seldom
from sidecar.settings import LogFormat
from sidecar.storage.files import said_by

ROOT: Final = "sidecar"
ASKED: Final = "asked"  # the fact that has what an operator wanted, field by field
# What may stand in a line of text: a name that a client chose could otherwise make lines of its own, or turn the
# direction of what follows.
_HARMLESS: Final = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]*")
_PLAIN: Final = re.compile(r"[^\s\"'=\\]+")  # needs no quotes as a fact's value
_CALLBACK: Final = "Exception in callback"  # what follows it is the callback, with its arguments

log = logging.getLogger(__name__)
_Caught: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class _Lines(logging.Formatter):
    def formatException(self, ei: _Caught) -> str:  # noqa: N802 - the name is logging's
        return "" if ei[1] is None else _traced(ei[1])


def _traced(error: BaseException, known: frozenset[int] = frozenset()) -> str:
    """The traceback of an exception, behind those of what it came of, and before those of what it holds."""
    known |= {id(error)}
    text = ""
    came_of = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if came_of is not None and id(came_of) not in known:
        text = f"{_traced(came_of, known)}\n\n{'Caused' if error.__cause__ else 'While this was handled'}:\n\n"
    frames = "".join(traceback.format_tb(error.__traceback__))
    text += f"Traceback (most recent call last):\n{frames}{_said(error)}"
    if isinstance(error, BaseExceptionGroup):
        for held in error.exceptions:
            if id(held) not in known:
                text += f"\n\nIt holds:\n\n{_traced(held, known)}"
    return text


def _said(error: BaseException) -> str:
    kind, said = type(error), said_by(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return name if said == kind.__name__ else f"{name}: {said}"


def tell_fault(loop: AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """The event loop's exception handler. Its own shows the callback's arguments and the exception's text, in which
    there may be what a client sent."""
    error = context.get("exception")
    what = str(context.get("message", "")).partition("\n")[0]
    if what.startswith(_CALLBACK):
        what = _CALLBACK
    log.error("%s", what or "a fault in the event loop", exc_info=error if isinstance(error, BaseException) else None)


class SeldomFaults(logging.Filter):
    """Lets a traceback through the first time, and then at most once a minute with how often it was (`times`, this one
    included): thousands of calls a second may meet the same fault. What an operator asked for is told each time."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock_s = clock_s
        self._seldom = Seldom()

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        facts = getattr(record, "facts", None) or {}
        if error is None or ASKED in facts:
            return True
        times = self._seldom.due(f"{record.getMessage()} {facts} {_place(error)}", self._clock_s())
        if times is not None and times > 1:
            record.facts = {**facts, "times": times}
        return times is not None


def _place(error: BaseException) -> tuple[str, str, int]:
    """What tells a fault from others: its class, and the line that it comes from."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return type(error).__qualname__, at.tb_frame.f_code.co_filename if at else "", at.tb_lineno if at else 0


class JsonLines(_Lines):
    """`{"at", "level", "logger", "message", …who, …facts, "error"}`."""

    def __init__(self, **who: object) -> None:
        """`who`: which of several processes says it; on each of its lines."""
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._who,
        }
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict):
            row.update(facts)
        if record.exc_info:
            row["error"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(row, default=str, option=orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # a name from outside that is no UTF-8, or a number of more than 64 bits
            row["at"] = f"{datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None).isoformat()}Z"
            return json.dumps(row, default=str, separators=(",", ":"))


class TextLines(_Lines):
    """`2026-11-29 01:50:16.123Z WARNING metering: message  fact=value …`, and a traceback below its line."""

    def __init__(self, **who: object) -> None:
        super().__init__()
        self._who = " ".join(str(value) for value in who.values()) or ROOT

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        line = f"{at}Z {record.levelname:<7} {self._who}: {_harmless(record.getMessage())}"
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict) and facts:
            line += "  " + " ".join(f"{name}={_value(value)}" for name, value in _flat(facts))
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _flat(facts: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """What was asked for by its own names, as it was typed; any other mapping with its name before each."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            before = "" if name == ASKED else f"{name}."
            yield from ((f"{before}{inner}", one) for inner, one in value.items())
        else:
            yield name, value


def _harmless(text: str) -> str:
    return text if _HARMLESS.fullmatch(text) else text.encode("unicode_escape").decode("ascii")


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) and _HARMLESS.fullmatch(text) else orjson.dumps(_harmless(text)).decode()


def chosen(form: LogFormat | None) -> LogFormat:
    """The format that was set; else text where a person looks on, JSON where something collects."""
    return form or (LogFormat.TEXT if sys.stderr is not None and sys.stderr.isatty() else LogFormat.JSON)


def set_up(level: str, form: LogFormat | None = None, **who: object) -> None:
    """Send the sidecar's and aiohttp's lines to standard error. Called by a command, and once more by each process that
    it starts, which says `who` it is."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((JsonLines if chosen(form) is LogFormat.JSON else TextLines)(**who))
    handler.addFilter(SeldomFaults())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(ROOT).setLevel(level)
    # The parser's messages quote the bytes they trip over, secrets included.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
