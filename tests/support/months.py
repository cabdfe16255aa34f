"""A ledger with weeks of use in it, by names and numbers that are the same each time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Final

from sidecar.ledger import LedgerStore
from sidecar.meters.hourly import Delta, Series, body_of
from sidecar.model.delivery import Delivered

# Provider, model, dollars for a million tokens in and out.
MODELS: Final = (
    ("openai", "gpt-5-mini", 0.25, 2.0),
    ("openai", "gpt-5", 1.25, 10.0),
    ("anthropic", "claude-sonnet-4-6", 3.0, 15.0),
    ("anthropic", "claude-haiku-4-5", 1.0, 5.0),
    ("openai", "text-embedding-3-small", 0.02, 0.0),
    ("google", "gemini-2.5-flash", 0.3, 2.5),
)
ROUTES: Final = {"anthropic": "/v1/messages", "google": "/v1beta/models/{model}:generateContent"}
PEOPLE: Final = ("acme", "globex", "initech", "umbrella", "hooli", "stark", "wayne", "wonka", "tyrell", "cyberdyne")
BATCH: Final = 5_000  # deltas in one transaction


def fill(
    path: Path,
    *,
    until: datetime,
    days: int,
    subscribers: Sequence[str] = PEOPLE,
    models: int = len(MODELS),
    hours: Sequence[int] = range(24),
    seed: int = 1,
) -> int:
    """Sums of these hours of each of the days before `until`, for each subscriber and model; how many rows."""
    store = LedgerStore(path)
    rows, batch, number = 0, list[Delta](), 0
    try:
        for delta in _deltas(until, days, subscribers, models, hours, random.Random(seed)):
            batch.append(delta)
            rows += 1
            if len(batch) == BATCH:
                number += 1
                assert store.apply(f"filled-{number}", body_of(batch)) == Delivered()
                batch = []
        assert store.apply("filled-last", body_of(batch)) == Delivered()
    finally:
        store.close()
    return rows


def _deltas(
    until: datetime, days: int, subscribers: Sequence[str], models: int, hours: Sequence[int], chance: random.Random
) -> Iterator[Delta]:
    end = int(until.timestamp()) // 3600 * 3600
    for day in range(days, 0, -1):
        weekend = datetime.fromtimestamp(end - day * 86_400, until.tzinfo).weekday() >= 5
        for hour in hours:
            for rank, subscriber in enumerate(subscribers):
                for number in range(models):
                    provider, model, dear_in, dear_out = MODELS[number % len(MODELS)]
                    if number >= len(MODELS):
                        model = f"{model}-{number}"
                    calls = max(1, int(chance.gauss(40, 12) / (rank + 1) / (number + 1) * (0.3 if weekend else 1)))
                    tokens = calls * chance.randrange(900, 2_400), calls * chance.randrange(120, 500)
                    cost = Decimal(f"{(tokens[0] * dear_in + tokens[1] * dear_out) / 1e6:.9f}")
                    failed = chance.random() < 0.04
                    delta = Delta(
                        end - day * 86_400 + hour * 3600,
                        Series(subscriber, model, provider, ROUTES.get(provider, "/v1/chat/completions"), "2xx"),
                        tokens={"input_tokens": tokens[0], "output_tokens": tokens[1], "total_tokens": sum(tokens)},
                        cost_usd=cost,
                    )
                    delta.counts.update(
                        records=calls,
                        calls=calls,
                        with_usage=calls,
                        errors=1 if failed else 0,
                        request_bytes=calls * 900,
                        response_bytes=calls * 2_600,
                    )
                    yield delta
