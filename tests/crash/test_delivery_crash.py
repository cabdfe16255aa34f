"""SIGKILL at every line between persist, seal, send, verdict and retire; then a start, and the same assertions.

The fail points are the statements sent to `delivery.db` (so also every point inside a transaction) and both sides of an
offer. After the restart everything is delivered once; what a backend without de-duplication had in its hands is
parked; no key was ever sent with two different bodies, although every run encodes differently.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.delivery_child import MODES, RECORDS
from support.fake_backend import FakeBackend
from support.zygote import Zygote

# Spread over a whole run of about 400 statements and 60 offers; `make crash` takes every one.
STATEMENTS = [*range(1, 60, 4), *range(60, 400, 23)]
OFFERS = [1, 2, 3, 5, 9, 14, 22, 31, 44]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


def die_and_go_on(zygote: Zygote, directory: Path, mode: str, kind: str, points: list[int]) -> bool:
    """Kill one run after the other at the given points of theirs, then let one finish. False: a run was too short."""
    directory.mkdir()
    died = True
    for run, point in enumerate(points):
        code, _ = zygote.run(directory=str(directory), mode=mode, run=run, kind=kind, at=point)
        died = died and code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
    code, result = zygote.run(directory=str(directory), mode=mode, run=len(points))
    assert code == 0
    assert result is not None
    check(directory, mode, result, kills=len(points))
    return died


def check(directory: Path, mode: str, result: dict[str, Any], kills: int) -> None:
    backend = FakeBackend(MODES[mode], path=directory / "backend.ndjson")
    assert result["total"] == RECORDS
    assert set(backend.taken.values()) <= {1}, "billed twice"
    bodies: dict[str, set[bytes]] = {}
    for offer in backend.offers:
        bodies.setdefault(offer.key, set()).add(offer.body)
    assert all(len(found) == 1 for found in bodies.values()), "a retry was not the same request"
    if mode == "none":
        assert len(result["unknown"]) <= kills * MODES[mode].concurrency
        assert result["delivered"] + sum(result["parked"].values()) == RECORDS
        assert set(result["parked"]) <= {"unknown"}
        missing = {offer.events[0].event_id for offer in backend.offers} - set(backend.taken)
        assert missing <= set(result["unknown"]), "lost"
    else:
        assert result["delivered"] == RECORDS
        assert len(backend.taken) == RECORDS * (2 if mode == "events" else 1)
    attempts = Counter(offer.key for offer in backend.offers)
    assert max(attempts.values()) < 40


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("kind", ["statement", "before", "after"])
def test_a_kill_between_any_two_steps(zygote: Zygote, tmp_path: Path, mode: str, kind: str) -> None:
    points = STATEMENTS if kind == "statement" else OFFERS
    reached = [die_and_go_on(zygote, tmp_path / str(point), mode, kind, [point]) for point in points]
    assert sum(reached) > len(points) // 2, "most fail points lie inside a run"


@pytest.mark.parametrize("mode", list(MODES))
def test_kill_after_kill(zygote: Zygote, tmp_path: Path, mode: str) -> None:
    for number, step in enumerate([7, 19, 38]):
        die_and_go_on(zygote, tmp_path / str(number), mode, "statement", [step + 31 * k for k in range(6)])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", list(MODES))
def test_a_kill_at_every_statement(zygote: Zygote, tmp_path: Path, mode: str) -> None:
    point = 1
    while die_and_go_on(zygote, tmp_path / str(point), mode, "statement", [point]):
        point += 1
    assert point > 100
