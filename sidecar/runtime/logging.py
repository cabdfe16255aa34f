"""Log lines: one JSON object each, on standard error.

ERROR: an operator must act. WARNING: odd but recovered. INFO: starts and stops. DEBUG: a batch.
Callers pass facts as `extra={"facts": {...}}`; no header value, query value, body or secret is a fact.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Final

import orjson

ROOT: Final = "sidecar"
SELDOM_S: Final = 60.0  # between two lines about the same thing that happens again and again
SUBJECTS_MAX: Final = 100  # things that are told apart; with more of them all begin anew


class Seldom:
    """When a line is due about something that happens on many calls: the first time, then at most once a minute."""

    def __init__(self, every_s: float = SELDOM_S) -> None:
        self._every_s = every_s
        self._subjects: dict[str, tuple[float, int]] = {}  # when the next line is due, and how often since the last

    def due(self, subject: str, now_s: float) -> int | None:
        """How often it happened since the last line, this time included; None: no line now."""
        due_s, count = self._subjects.get(subject, (now_s, 0))
        count += 1
        if now_s < due_s:
            self._subjects[subject] = (due_s, count)
            return None
        if len(self._subjects) >= SUBJECTS_MAX:
            self._subjects.clear()
        self._subjects[subject] = (now_s + self._every_s, 0)
        return count


class JsonLines(logging.Formatter):
    """`{"at", "level", "logger", "message", …facts, "error"}`."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict):
            row.update(facts)
        if record.exc_info:
            row["error"] = self.formatException(record.exc_info)
        return orjson.dumps(row, default=str, option=orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS).decode()


def set_up(level: str) -> None:
    """Send the sidecar's and aiohttp's lines to standard error. Called once, by a command."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(ROOT).setLevel(level)
    # The parser's messages quote the bytes they trip over, secrets included.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
