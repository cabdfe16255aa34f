"""SIGKILL at every statement sent to the ledger, embedded or shared, and to `delivery.db` while batches are added up;
then a start.

The two are written one after the other, so a death between them leaves the ledger ahead. After the restart every
record is in the sums exactly once, one that could not be added was parked and redriven, and the balance holds.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.ledger_child import RECORDS
from support.postgres_server import PostgresServer
from support.zygote import Zygote

from sidecar.ledger import LedgerReader
from sidecar.ledger.postgres_queries import PostgresReader

POINTS = {"ledger": [*range(1, 60, 5), *range(60, 160, 17)], "statement": [*range(1, 60, 6), *range(60, 200, 23)]}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote("ledger_child.py")
    yield zygote
    zygote.close()


def die_and_go_on(zygote: Zygote, directory: Path, kind: str, points: list[int], url: str | None = None) -> bool:
    """Kill one run after the other at the given points of theirs, then let one finish. False: a run was too short."""
    directory.mkdir()
    died = True
    for point in points:
        code, _ = zygote.run(directory=str(directory), kind=kind, at=point, url=url)
        assert code in (0, -signal.SIGKILL)
        died = died and code == -signal.SIGKILL
    code, result = zygote.run(directory=str(directory), url=url)
    assert code == 0
    assert result is not None
    assert result["delivered"] + result["duplicate"] == RECORDS, result
    assert result["parked"] == {}
    with closing(LedgerReader(directory / "ledger.db") if url is None else PostgresReader(url)) as reader:
        [row] = reader.usage()
        assert row.records == RECORDS, "lost or doubled"
        if isinstance(reader, PostgresReader):
            assert reader.counted() == {"one": (RECORDS, RECORDS)}
    return died


@pytest.mark.parametrize("kind", list(POINTS))
def test_a_kill_between_any_two_steps(zygote: Zygote, tmp_path: Path, kind: str) -> None:
    reached = [die_and_go_on(zygote, tmp_path / str(point), kind, [point]) for point in POINTS[kind]]
    assert sum(reached) > len(reached) // 2, "most fail points lie inside a run"


@pytest.mark.parametrize("kind", list(POINTS))
def test_a_kill_between_any_two_steps_to_a_shared_ledger(
    zygote: Zygote, tmp_path: Path, kind: str, postgres_server: PostgresServer
) -> None:
    points = [[3], [9], [17], [26], [34], [47], [61, 8, 30]]
    reached = [
        die_and_go_on(zygote, tmp_path / str(number), kind, each, postgres_server.database())
        for number, each in enumerate(points)
    ]
    assert sum(reached) > len(reached) // 2, "most fail points lie inside a run"


@pytest.mark.parametrize("kind", list(POINTS))
def test_kill_after_kill(zygote: Zygote, tmp_path: Path, kind: str) -> None:
    for number, step in enumerate([5, 13, 29]):
        die_and_go_on(zygote, tmp_path / str(number), kind, [step + 17 * k for k in range(6)])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", list(POINTS))
def test_a_kill_at_every_statement(zygote: Zygote, tmp_path: Path, kind: str) -> None:
    point = 1
    while die_and_go_on(zygote, tmp_path / str(point), kind, [point]):
        point += 1
    assert point > 50
