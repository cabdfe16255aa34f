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


class JsonLines(logging.Formatter):
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
        return orjson.dumps(row, default=str, option=orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS).decode()


def set_up(level: str, **who: object) -> None:
    """Send the sidecar's and aiohttp's lines to standard error. Called by a command, and once more by each process that
    it starts, which says `who` it is."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(**who))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(ROOT).setLevel(level)
    # The parser's messages quote the bytes they trip over, secrets included.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
