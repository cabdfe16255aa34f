"""Delivery under chance: any backend, any faults, stops at any moment, redrives and forgetting in between.

Whatever happened, at the end every record has one place, the rows say what the counters say, nothing was billed twice
where the backend recognises repeats or the answer was never lost, and nothing that was taken counts as undelivered.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.delivery_fixtures import World, until
from support.fake_backend import FakeBackend, faults

from sidecar.model.delivery import Abilities, Atomicity, Dedup

WORDS = ["retry:http_503", "retry:http_429:0.001", "retry:dns", "lose_after", "lose_before", "raise", "block:forbidden"]


def some_abilities(chance: random.Random) -> Abilities:
    batch = chance.random() < 0.6
    dedup = chance.choice(list(Dedup))
    atomicity = Atomicity.SINGLE
    if batch:
        kinds = [Atomicity.ALL_OR_NOTHING, Atomicity.PER_ITEM, Atomicity.PREFIX]
        atomicity = chance.choice(kinds if dedup is Dedup.EVENT_ID else kinds[:1])
    return Abilities(
        events_max=chance.choice([3, 10, 50]) if batch else 1,
        atomicity=atomicity,
        dedup=dedup,
        dedup_window_s=None if dedup is Dedup.NONE else chance.choice([None, 86_400.0]),
        concurrency=chance.choice([1, 3, 8]),
        one_per_subject=chance.random() < 0.3,
        knows_duplicates=chance.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(24))
async def test_chance(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    world = World(tmp_path, seed=seed)
    world.begin("fake")
    abilities = some_abilities(chance)
    names = chance.choice([("",), ("",), ("a", "b"), ("a", "b", "c")])
    backend = FakeBackend(
        abilities,
        events_of=lambda r: names,
        subject_of=lambda r: str(int(r.id[:8]) % 5) if abilities.events_max == 1 else "",
        behaviour=faults(seed, chance.choice([0.0, 0.1, 0.4]), WORDS),
        latency_s=chance.choice([0.0, 0.001]),
    )
    ids: list[str] = []
    for run in range(4):
        backend.flavour = str(run)
        async with world.deliver(backend) as delivery:
            for _ in range(chance.randrange(4)):
                instance = chance.choice(["one", "two"])
                fresh = world.spool.add(chance.randrange(1, 40), instance, group=chance.randrange(1, 20))
                ids += fresh
                backend.poison |= {id_ for id_ in fresh if chance.random() < 0.05}
                delivery.wake()
            offers = len(backend.offers) + chance.randrange(1, 30)
            await until(lambda n=offers, d=delivery: len(backend.offers) >= n or pending(world, d) == 0)  # type: ignore[misc]
            if chance.random() < 0.5:
                backend.poison -= {id_ for id_ in backend.poison if chance.random() < 0.5}
                await delivery.redrive()
            if chance.random() < 0.5:
                await delivery.forget({"one": chance.randrange(world.spool.last_seq("one") + 1)})
            world.balance(delivery)
    backend.behaviour, backend.poison = None, set()
    async with world.deliver(backend) as delivery:
        delivery.wake()
        await until(lambda: pending(world, delivery) == 0)
        await delivery.redrive()
        await until(lambda: pending(world, delivery) == 0)
        totals = world.balance(delivery)["fake"]
        parked = delivery.parked(limit=10_000)
        assert all(row.maybe_taken for row in parked)
        assert set(totals.parked) <= {"unknown", "partly_taken", "http_400"}
        assert totals.delivered + totals.duplicate + sum(totals.parked.values()) == len(ids)
        await delivery.forget(world.spool.upto())
        assert world.balance(delivery)["fake"] == totals
    undecided = {row.event_id for row in parked}
    events = {f"{id_}:{name}" if name else id_ for id_ in ids for name in names}
    assert events - set(backend.taken) <= undecided, "lost"
    assert set(backend.taken) <= events
    assert set(backend.taken.values()) <= {1}, "billed twice"
    if abilities.dedup is not Dedup.NONE:
        assert not undecided
    same: dict[str, bytes] = {}
    assert all(same.setdefault(offer.key, offer.body) == offer.body for offer in backend.offers)


def pending(world: World, delivery: object) -> int:
    totals = delivery.totals(world.spool.upto())  # type: ignore[attr-defined]
    return int(totals["fake"].pending)
