"""Stripe's late complaints: events that were answered with 200 and then not billed.

They come as events of Stripe's own, `v1.billing.meter.error_report_triggered` and
`v1.billing.meter.no_meter_found`, and name samples only: how many more there are is a number. Reading is
lenient, since the list of codes is open and the documents show two shapes. What is named can be parked and
redriven; what is only counted is an alarm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

TYPES: Final = frozenset({"v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found"})
DOCUMENT_BYTES_MAX: Final = 1024 * 1024  # a report has a few samples of a dozen codes


class ReportError(ValueError):
    """The document is no report; the text says why."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """One event that was not billed, by the identifier that it was sent with."""

    event_id: str
    code: str

    @property
    def record_id(self) -> str:
        """`<record id>:<meter>` without the meter."""
        return self.event_id.rpartition(":")[0] or self.event_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one report says. `counts`: code -> how many events, named or not."""

    meter: str | None
    error_count: int
    counts: Mapping[str, int]
    complaints: tuple[Complaint, ...]

    @property
    def unnamed(self) -> int:
        """Events that the report counts and does not name."""
        return max(self.error_count - len(self.complaints), 0)


def read_report(document: bytes) -> Report:
    """Read one event, or the `data` of one. Raises `ReportError`."""
    if len(document) > DOCUMENT_BYTES_MAX:
        raise ReportError(f"is larger than {DOCUMENT_BYTES_MAX} bytes")
    try:
        said = orjson.loads(document)
    except orjson.JSONDecodeError:
        raise ReportError("is no JSON") from None
    if not isinstance(said, dict):
        raise ReportError("is no JSON object")
    kind = said.get("type")
    if kind is not None and kind not in TYPES:
        raise ReportError(
            "is an event of another type: expected v1.billing.meter.error_report_triggered or …no_meter_found"
        )
    data = said.get("data", said)
    reason = data.get("reason") if isinstance(data, dict) else None
    if not isinstance(reason, dict):
        raise ReportError("has no reason in it: fetch the whole event, a thin one has only its id")
    return _report(said, reason)


def _report(said: Mapping[str, Any], reason: Mapping[str, Any]) -> Report:
    counts: dict[str, int] = {}
    complaints: dict[str, Complaint] = {}
    for group in _objects(reason.get("error_types")):
        code = group.get("code")
        code = code if isinstance(code, str) and code.isascii() and code.isprintable() else "unknown"
        counts[code] = counts.get(code, 0) + _whole(group.get("error_count"))
        for sample in _objects(group.get("sample_errors")):
            event_id = _identifier(sample.get("request"))
            if event_id is not None:
                complaints.setdefault(event_id, Complaint(event_id, code))
    related = said.get("related_object")
    meter = related.get("id") if isinstance(related, dict) else None
    return Report(
        meter=meter if isinstance(meter, str) else None,
        error_count=_whole(reason.get("error_count")) or sum(counts.values()),
        counts=counts,
        complaints=tuple(complaints.values()),
    )


def _identifier(request: object) -> str | None:
    """The event's identifier; one documented example has an idempotency key in its place."""
    if not isinstance(request, dict):
        return None
    for name in ("identifier", "idempotency_key"):
        value = request.get(name)
        if isinstance(value, str) and value:
            return value
    return None


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _whole(value: object) -> int:
    return value if type(value) is int and value > 0 else 0
