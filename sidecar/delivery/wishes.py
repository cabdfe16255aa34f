"""What an operator wants to be corrected, done by whoever has the state: here, or the holders of lanes.

A wish to all lanes is a row for each in the database that they share; a lane's holder finds it there, does it, and
writes what came of it (`elected`). Whoever asked adds the answers up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sidecar.delivery import corrections
from sidecar.delivery.redrive import EACH_MAX
from sidecar.delivery.service import Delivery
from sidecar.model.delivery import Backend

Wish = Mapping[str, Any]
"""`do`, which is one of `redrive`, `retry`, `cancel` and `complain`, and the arguments of that."""


async def grant(wish: Wish, delivery: Delivery, backends: Mapping[str, Backend]) -> Any:
    """Do it to one delivery. The answer is what JSON can hold. Raises `KeyError` for what is no wish."""
    match wish:
        case {"do": "redrive"}:
            return (
                await delivery.offer_again(**{name: value for name, value in wish.items() if name != "do"})
            ).to_dict()
        case {"do": "retry", "backend": backend}:
            ended = delivery.end_waits(backend)
            return asdict(ended) | {"any": ended.any}
        case {"do": "cancel", "one": one, "backend": backend}:
            return [asdict(each) for each in await corrections.cancel(one, delivery, backends, backend=backend)]
        case {"do": "complain", "backend": backend, "named": named}:
            names = [corrections.Named(*one) for one in named]
            return [asdict(each) for each in await corrections.complain(backend, names, delivery, backends)]
    raise KeyError(wish.get("do"))


def redriven(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What became of a redrive in several places, as of one: an id is not found where none of them has it."""
    counts: Counter[tuple[str, str]] = Counter()
    for answer in answers:
        for row in answer["counts"]:
            counts[(row["became"], row["reason"])] += row["events"]
    missing = [{row["id"]: row["known"] for row in answer["not_found"]} for answer in answers]
    nowhere = [one for one in (missing[0] if missing else ()) if all(one in ids for ids in missing)]
    return {
        "redriven": sum(answer["redriven"] for answer in answers),
        "unskipped": sum(answer["unskipped"] for answer in answers),
        "counts": [{"became": became, "reason": reason, "events": n} for (became, reason), n in counts.items()],
        "each": [row for answer in answers for row in answer["each"]][:EACH_MAX],
        "not_found": [
            {"id": one, "known": next((ids[one] for ids in missing if ids[one]), "")} for one in nowhere
        ],
    }  # fmt: skip


def retried(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same of ended waits: the worst state, the longest wait."""
    order = ("up", "paused", "down", "blocked")
    return {
        "was": max((answer["was"] for answer in answers), key=order.index),
        "paused_s": max(answer["paused_s"] for answer in answers),
        "requests": sum(answer["requests"] for answer in answers),
        "any": any(answer["any"] for answer in answers),
    }


def outcomes(answers: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The same of events that were taken back or complained about: what one place knows nothing of, another may."""
    if len(answers) == 1:
        return [dict(row) for row in answers[0]]  # each that was named, also one that was named twice
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for answer in answers for row in answer):
        key = (row["backend"], row["event_id"])
        if key not in found or (row["done"] and not found[key]["done"]):
            found[key] = dict(row)
    return [found[key] for key in sorted(found)]
