"""What an operator wants to be corrected, done by whoever has the state: here, or the holders of lanes.

What is asked of lanes is a row for each in the database that they share; a lane's holder finds it there, does it, and
writes what came of it (`elected`). Whoever asked adds the answers up. What must always hold: it is done while somebody
waits for it, or has been told that it is done later. So a row is good for as long as its `at` says: that of a lane that
nobody holds is dated ahead when whoever asked has stopped waiting, and its holder takes it away when it is done; any
other one is nothing any more when its time has passed. Done twice, it finds nothing the second time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from operator import itemgetter
from typing import Any, Final

import orjson

from sidecar.delivery import corrections
from sidecar.delivery.redrive import EACH_MAX
from sidecar.delivery.service import Delivery
from sidecar.ledger.lanes import LANES, named
from sidecar.model.delivery import Backend
from sidecar.storage.postgres import Connection, Postgres

Wish = Mapping[str, Any]
"""`do`, which is one of `redrive`, `retry`, `cancel` and `complain`, and the arguments of that; `by`: who asks."""

WAIT_S: Final = 30.0  # for the holders
LOOK_S: Final = 0.25  # how soon an answer is seen
STAYS: Final = timedelta(days=7)  # for the next holder of a lane that has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What came of it. `answers`: of the lanes whose holder has done it, in the order of the lanes."""

    answers: Sequence[Any] = ()
    later: Collection[int] = ()  # lanes that nobody holds: it is done there as soon as somebody does
    undone: Collection[int] = ()  # lanes that nobody holds, and it is not to wait
    silent: Mapping[str, Sequence[int]] = field(default_factory=dict)  # whose holder, by name, has not answered
    errors: Sequence[str] = ()  # why it could not be done, or the lanes not be asked

    @property
    def said(self) -> dict[str, Any]:
        """Of the lanes where it is not done, for JSON and for people; empty where it is done on all."""
        texts = list(dict.fromkeys(self.errors))
        texts += [
            f"{holder}, which delivers {named(lanes)}, has not answered within {WAIT_S:.0f} s: run it again"
            for holder, lanes in self.silent.items()
        ]
        if self.later:
            texts.append(
                f"no running sidecar delivers {named(self.later)}: it is done there as soon as one does, "
                f"within {STAYS.days} days"
            )
        if self.undone:
            texts.append(
                f"no running sidecar delivers {named(self.undone)}: nothing is done there, run it again when one does"
            )
        if not texts:
            return {}
        silent = sorted([*self.undone, *(lane for lanes in self.silent.values() for lane in lanes)])
        return {"later": sorted(self.later), "undone": silent, "errors": list(self.errors), "texts": texts}


async def ask(
    database: Postgres, wish: Wish, lanes: Collection[int] = range(LANES), *, limit_s: float = WAIT_S
) -> Asked:
    """Have something done on these lanes by whoever holds them. Waits for that, but not for sidecars where none runs.
    Raises `PostgresError`."""
    loop = asyncio.get_running_loop()
    text, ends_s = orjson.dumps(wish).decode(), loop.time() + limit_s
    if not lanes:
        return Asked()
    async with database.transaction() as db:
        await db.execute(
            # What nobody waits for any more, and what is asked for anew.
            "DELETE FROM metering.lane_wishes WHERE at < clock_timestamp() - $1::interval"
            " OR (answer IS NULL AND at > clock_timestamp() AND wish = $2 AND lane = ANY($3))",
            timedelta(seconds=2 * WAIT_S),
            text,
            list(lanes),
        )
        rows = await db.fetch(
            "INSERT INTO metering.lane_wishes (lane, wish) SELECT lane, $1 FROM unnest($2::smallint[]) AS t (lane)"
            " RETURNING id",
            text,
            sorted(lanes),
        )
    ids = [int(row[0]) for row in rows]
    while True:
        await asyncio.sleep(LOOK_S)
        async with database.transaction(read_only=True) as db:
            waits = await db.fetch(
                "SELECT expires > clock_timestamp() FROM metering.lane_wishes JOIN metering.lane_leases USING (lane)"
                " WHERE id = ANY($1) AND answer IS NULL",
                ids,
            )
            anybody = await db.fetchval(
                "SELECT EXISTS (SELECT FROM metering.lane_members WHERE expires > clock_timestamp())"
            )
        if not waits or loop.time() > ends_s or not (anybody or any(held for (held,) in waits)):
            break
    async with database.transaction() as db:
        return await _ended(db, ids, stays=_stays(wish))


def _stays(wish: Wish) -> bool:
    """Whether it may be done days later. Not what accepts doubles: by then somebody may have looked what was taken, and
    done twice after a death it would send what was sent. Nor what ends waits, which end with whoever waits."""
    return wish["do"] != "retry" and not wish.get("resend_unknown")


async def _ended(db: Connection, ids: Sequence[int], *, stays: bool) -> Asked:
    """Stop waiting: what is answered, and what is left to a later holder. The rest is taken back."""
    later: list[Any] = []
    if stays:
        later = await db.fetch(
            "UPDATE metering.lane_wishes AS one SET at = clock_timestamp() + $2 FROM metering.lane_leases AS lease"
            " WHERE one.id = ANY($1) AND answer IS NULL AND lease.lane = one.lane"
            " AND (lease.holder IS NULL OR lease.expires < clock_timestamp()) RETURNING one.id, one.lane",
            list(ids),
            STAYS,
        )
    kept = [int(id_) for id_, _ in later]
    rows = await db.fetch(
        "DELETE FROM metering.lane_wishes AS one USING metering.lane_leases AS lease"
        " WHERE one.id = ANY($1) AND one.id <> ALL($2) AND lease.lane = one.lane"
        " RETURNING one.lane, answer, CASE WHEN lease.expires > clock_timestamp() THEN lease.holder END",
        list(ids),
        kept,
    )
    answers, errors = [], []
    undone: list[int] = []
    silent: dict[str, list[int]] = {}
    for lane, answer, holder in sorted(rows, key=itemgetter(0)):
        if answer is None:
            lanes = undone if holder is None else silent.setdefault(holder.partition("/")[0], [])
            lanes.append(int(lane))
            continue
        told = orjson.loads(answer)
        if isinstance(told, dict) and "error" in told:
            errors.append(f"{named([lane])}: its holder could not do it: {told['error']}")
        else:
            answers.append(told)
    lanes = sorted(int(lane) for _, lane in later)
    return Asked(answers=answers, later=lanes, undone=undone, silent=silent, errors=errors)


async def asked_of(db: Connection, lanes: Collection[int]) -> list[tuple[int, int, str]]:
    """What is to be done on these lanes, oldest first: the id, the lane, and the text of what it is."""
    rows = await db.fetch(
        "SELECT id, lane, wish FROM metering.lane_wishes"
        " WHERE lane = ANY($1) AND answer IS NULL AND at > clock_timestamp() - $2::interval ORDER BY id",
        list(lanes),
        timedelta(seconds=WAIT_S),
    )
    return [(int(id_), int(lane), str(wish)) for id_, lane, wish in rows]


async def answer(db: Connection, id_: int, told: Any) -> None:
    """Say what came of it. The first answer stays: what was read just before it is done once more, and finds nothing.
    Where nobody waits for it any more, it is merely over."""
    await db.execute("DELETE FROM metering.lane_wishes WHERE id = $1 AND at > clock_timestamp()", id_)
    await db.execute(
        "UPDATE metering.lane_wishes SET answer = $2 WHERE id = $1 AND answer IS NULL", id_, orjson.dumps(told).decode()
    )


async def grant(wish: Wish, delivery: Delivery, backends: Mapping[str, Backend]) -> Any:
    """Do it to one delivery. The answer is what JSON can hold. Raises `KeyError` for what is no wish."""
    match wish:
        case {"do": "redrive"}:
            choice = {name: value for name, value in wish.items() if name not in ("do", "by")}
            return (await delivery.offer_again(**choice)).to_dict()
        case {"do": "retry", "backend": backend}:
            ended = delivery.end_waits(backend)
            return asdict(ended) | {"any": ended.any}
        case {"do": "cancel", "one": one, "backend": backend}:
            return [asdict(each) for each in await corrections.cancel(one, delivery, backends, backend=backend)]
        case {"do": "complain", "backend": backend, "named": named}:
            names = [corrections.Named(*one) for one in named]
            return [asdict(each) for each in await corrections.complain(backend, names, delivery, backends)]
    raise KeyError(wish.get("do"))


def has_changed(told: Any) -> bool:
    """Whether anything came of it, by an answer of `grant`."""
    if isinstance(told, Mapping):
        return bool(told.get("redriven") or told.get("any"))
    return any(row["done"] for row in told)


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
        "not_found": [{"id": one, "known": next((ids[one] for ids in missing if ids[one]), "")} for one in nowhere],
    }


def retried(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same of ended waits: the worst state, the longest wait."""
    order = ("up", "paused", "down", "blocked")
    return {
        "was": max((answer["was"] for answer in answers), key=order.index, default="up"),
        "paused_s": max((answer["paused_s"] for answer in answers), default=0.0),
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
