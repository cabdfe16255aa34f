"""Meters of every kind, and sums in a form that can be compared."""

from __future__ import annotations

from typing import Any

from sidecar.meters.buckets import BatchSums, BucketDelta
from sidecar.meters.definition import DEFAULT_METERS, read_meters

METERS = (
    *DEFAULT_METERS,
    *read_meters(
        [
            {"name": "by_model", "aggregation": {"type": "SUM", "field": "total_tokens"},
             "filters": [{"key": "model", "values": ["gpt-5-mini"]}]},
            {"name": "bytes", "aggregation": {"type": "SUM", "field": "response_bytes"}},
            {"name": "models", "aggregation": {"type": "UNIQUE_COUNT", "field": "model"}},
            {"name": "cost", "aggregation": {"type": "SUM", "field": "cost_usd"}},
            {"name": "longest", "aggregation": {
                "type": "MAX", "field": "output_tokens", "group_by": "model", "bucket_size": "HOUR"}},
            {"name": "stopped", "aggregation": {"type": "COUNT"},
             "filters": [{"key": "finish_reason", "values": ["stop"]}]},
            {"name": "priced", "aggregation": {
                "type": "SUM", "expression": "double(input_tokens) * 0.1 + double(output_tokens) * 0.7"}},
            {"name": "size", "aggregation": {
                "type": "SUM", "expression": "dimension_team == '50%' ? request_bytes : -response_bytes"}},
            {"name": "cached", "aggregation": {"type": "SUM", "expression": "input_tokens - cache_read_input_tokens"}},
            {"name": "part", "aggregation": {"type": "SUM", "expression": "output_tokens / input_tokens"}},
            {"name": "time", "aggregation": {"type": "SUM", "expression": "duration_ms + double(input_tokens)"}},
            {"name": "top", "aggregation": {"type": "MAX", "expression": "input_tokens + output_tokens"}},
            {"name": "nothing", "aggregation": {"type": "COUNT"}, "filters": [{"key": "model", "values": ["x"]}]},
        ]
    ),
)  # fmt: skip


def plainly(sums: BatchSums) -> tuple[dict[Any, Any], dict[Any, Any]]:
    hours = {
        (delta.hour, delta.series): (delta.counts, delta.tokens, delta.cost_usd, delta.units) for delta in sums.hourly
    }
    return hours, {delta.key: value_of(delta) for delta in sums.buckets}


def value_of(delta: BucketDelta) -> Any:
    return delta.value, delta.at_us, delta.record_id, sorted(delta.hashes)
