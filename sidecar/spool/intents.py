"""An intent: what was known of a call that is still open, and the record it becomes after a crash.

The line is the record as it would be if nothing more were heard of the call. Settled, it is a record with outcome
`unknown` under the admitted id: no status, no usage, no duration, because nobody saw how it ended.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from sidecar.model.exchange import Exchange, Outcome
from sidecar.model.record import encode

_UNSEEN: Final[dict[str, Any]] = {
    "first_byte_ms": None,
    "duration_ms": None,
    "status": None,
    "outcome": Outcome.UNKNOWN,
    "response_headers": [],
    "request_bytes": 0,
    "response_bytes": 0,
    "usage": None,
    "error": None,
}


def encode_intent(exchange: Exchange, *, instance: str) -> bytes:
    """The intent's line: compact JSON, no line end. It has no number yet."""
    return encode(exchange, seq=0, instance=instance)


def intent_id(line: bytes) -> str:
    """Whose intent this is. Raises `ValueError` when the line is none."""
    try:
        return str(orjson.loads(line)["id"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an intent: {type(error).__name__} on {error}") from None


def settle(line: bytes, *, seq: int, instance: str) -> bytes:
    """The record of a call that was found open."""
    row: dict[str, Any] = orjson.loads(line)
    return orjson.dumps(row | _UNSEEN | {"seq": seq, "instance": instance})
