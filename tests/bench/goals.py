"""The goals beside the figures of one run: `make bench` ends with this table. Pure: raw figures in, lines out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

ENVOY, LITELLM = "Envoy", "LiteLLM"
BUFFERED, COMMITTED, TWO, DOWN = (
    "sidecar buffered",
    "sidecar committed",
    "sidecar buffered ×2",
    "sidecar committed, one down",
)
CHAT, UNIQUE, ALONE = "chat", "chat, unique heads", "chat, 1 connection"
DELIVERY_CPU_S_MIN = 0.5

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """`found` gives the figure, or None where this run has no such. Met when it is at most (or at least) `bound`."""

    id: str
    what: str
    bound: float
    unit: str
    found: Callable[[Raw], float | None]
    at_least: bool = False

    def line(self, raw: Raw) -> str:
        figure = self.found(raw)
        sign = "≥" if self.at_least else "≤"
        if figure is None:
            said = "not measured"
        else:
            met = figure >= self.bound if self.at_least else figure <= self.bound
            said = f"{figure:>10,.2f} {self.unit:<4}{'met' if met else 'MISSED'}"
        return f"{self.id:<4}{self.what:<58}{sign} {self.bound:>8,g} {self.unit:<4} {said}"


def _middle(rows: Iterable[Mapping[str, Any]], key: str, **where: object) -> float | None:
    values = [row[key] for row in rows if all(row.get(name) == value for name, value in where.items())]
    return median(values) if values else None


def _ratio(
    part: str, key: str, one: Mapping[str, object], other: Mapping[str, object]
) -> Callable[[Raw], float | None]:
    """The middle of the figures of `one` by that of `other`, both of the same part of the run."""

    def found(raw: Raw) -> float | None:
        rows: Sequence[Mapping[str, Any]] = raw.get(part) or ()
        above, below = _middle(rows, key, **one), _middle(rows, key, **other)
        return above / below if above is not None and below else None

    return found


def _figure(part: str, key: str) -> Callable[[Raw], float | None]:
    return lambda raw: (raw.get(part) or {}).get(key)


def _delivered(case: str) -> Callable[[Raw], float | None]:
    return lambda raw: _middle(_enough(raw.get("delivery") or ()), "records_per_cpu_s", case=case)


def _three_by_one(raw: Raw) -> float | None:
    rows = _enough(raw.get("delivery") or ())
    three, one = _middle(rows, "us", case="three at once"), _middle(rows, "us", case="meter")
    return three / one if three is not None and one else None


def _enough(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows with so much work that what a start costs, which is taken off and never the same, is small beside it."""
    return [row for row in rows if row["cpu_s"] >= DELIVERY_CPU_S_MIN]


def _call(peer: str, case: str, other: str = ENVOY) -> Callable[[Raw], float | None]:
    return _ratio("unary", "us", {"peer": peer, "case": case}, {"peer": other, "case": case})


def _apart(peer: str, kind: str) -> Callable[[Raw], float | None]:
    return _ratio("apart", "us", {"peer": peer, "kind": kind}, {"peer": ENVOY, "kind": kind})


def _added(peer: str, share: float, other: str = ENVOY) -> Callable[[Raw], float | None]:
    return _ratio("latency", "added_ms", {"peer": peer, "share": share}, {"peer": other, "share": share})


GOALS = (
    Goal("P1", "CPU of a call, buffered, by Envoy's plain hop", 1.0, "×", _call(BUFFERED, CHAT)),
    Goal("P1", "the same, committed", 1.5, "×", _call(COMMITTED, CHAT)),
    Goal("P1", "buffered, every head different", 1.0, "×", _call(BUFFERED, UNIQUE)),
    Goal("P1", "committed, every head different", 1.5, "×", _call(COMMITTED, UNIQUE)),
    Goal("P2", "CPU of a streamed chunk, buffered, by Envoy's", 1.0, "×",
         _ratio("streams", "us", {"peer": BUFFERED}, {"peer": ENVOY})),
    Goal("P3", "CPU of a call, LiteLLM by buffered", 100, "×", _call(LITELLM, CHAT, BUFFERED), at_least=True),
    Goal("P3", "CPU of a chunk, LiteLLM by buffered", 60, "×",
         _ratio("streams", "us", {"peer": LITELLM}, {"peer": BUFFERED}), at_least=True),
    Goal("P4", "p50 added at 1,000 calls/s, buffered, by Envoy's", 1.0, "×", _added(BUFFERED, 0.5)),
    Goal("P4", "p99 added, buffered, by Envoy's", 2.0, "×", _added(BUFFERED, 0.99)),
    Goal("P4", "p50 added, committed, by Envoy's", 3.0, "×", _added(COMMITTED, 0.5)),
    Goal("P5", "memory of an open stream (PSS, all processes)", 25, "KiB", _figure("open", "kib_each")),
    Goal("P5", "memory before load (PSS, all processes)", 110, "MiB", _figure("open", "before_mib")),
    Goal("P7", "records a CPU second to a batch backend", 20_000, "/s", _delivered("meter"), at_least=True),
    Goal("P7", "requests a CPU second where each record is one", 3_000, "/s", _delivered("revenium"), at_least=True),
    Goal("P7", "CPU of three backends at once by one", 1.3, "×", _three_by_one),
    Goal("P8", "p50 added with a backend down by none down", 1.1, "×", _added(DOWN, 0.5, COMMITTED)),
    Goal("P9", "CPU of a call, two workers by one", 1.1, "×", _call(TWO, CHAT, BUFFERED)),
)  # fmt: skip

# Told without a goal.
REPORTED = (
    Goal("–", "one connection, buffered, by Envoy's", 0, "×", _call(BUFFERED, ALONE)),
    Goal("–", "one connection, committed, by Envoy's", 0, "×", _call(COMMITTED, ALONE)),
    *(
        Goal("–", f"head and body apart, {said}, {name}", 0, "×", _apart(peer, kind))
        for kind, said in (("sized", "sized"), ("chunked", "in chunks"), ("gzip", "in chunks and compressed"))
        for name, peer in (("buffered", BUFFERED), ("committed", COMMITTED))
    ),
)


def text(raw: Raw) -> str:
    lines = ["goals"]
    lines += [goal.line(raw) for goal in GOALS]
    lines.append("P6  tests/bench/spool.py and `make soak`; the rest of P8 `make soak`")
    for goal in REPORTED:
        figure = goal.found(raw)
        lines.append(
            f"{goal.id:<4}{goal.what:<58}  {'':>13} " + ("not measured" if figure is None else f"{figure:>10,.2f} ×")
        )
    return "\n".join(lines)
