"""What a step of a lane sends to its database: few messages, and every value as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from support.delivery_fixtures import START_S, hold
from support.statements import before_statements

from sidecar.delivery.lane_database import WRITTEN_MAX, Deposed, Held, LaneDatabase
from sidecar.delivery.retry_policy import Decision
from sidecar.delivery.rows import Member, NewRequest, Sealing, Settlement, StateBusy, StateError, Turn
from sidecar.delivery.store import DeliveryStore
from sidecar.delivery.types import Fate, Tries
from sidecar.model.delivery import Event, Sealed
from sidecar.storage.postgres import Postgres, call

HELD = Held(lane=3, holder="tester", epoch=1)
TEXTS = [
    "", "plain", "it's", "back\\slash", "\\'", "a'; DROP TABLE meta; --", "?", "$1 ?", "\n\r\t", "\\x41", "E'x'", "😀",
    "日本語", "%s {}", "\\", "'" * 7, "x" * (WRITTEN_MAX + 1),
]  # fmt: skip
BLOBS = [b"", b"plain", bytes(range(256)), b"'\\x", b"?" * (WRITTEN_MAX + 1)]
FLOATS = [0.0, -0.0, 0.1, 1e300, -5e-324, 1795251600.123456, math.inf]


@pytest.fixture
def lane(postgres_database: str) -> Iterator[LaneDatabase]:
    database = Postgres(postgres_database, name="test")
    found = LaneDatabase(database, HELD)
    call(hold(database, HELD))
    yield found
    call(database.close())


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    before_statements(said.append, monkeypatch.setattr)
    return said


@pytest.mark.parametrize("conforming", ["on", "off"])
def test_values_arrive_as_they_are(lane: LaneDatabase, conforming: str) -> None:
    with lane.writing() as connection:
        connection.execute("CREATE TABLE kept(id integer, t text, b bytea, f double precision, n bigint)")
        connection.execute(f"SET LOCAL standard_conforming_strings TO {conforming}")
        wanted: list[tuple[Any, ...]] = []
        for number, text in enumerate(TEXTS):
            blob, value = BLOBS[number % len(BLOBS)], FLOATS[number % len(FLOATS)]
            wanted.append((number, text, blob, value, -number))
        wanted.append((-1, None, None, None, 2**63 - 1))
        connection.executemany("INSERT INTO kept VALUES(?, ?, ?, ?, ?)", wanted)
    with lane.looking() as connection:
        found = connection.execute("SELECT id, t, b, f, n FROM kept").fetchall()
    assert sorted(map(tuple, found)) == sorted(wanted)


def test_what_no_text_can_hold_is_refused_and_nothing_of_the_step_stays(lane: LaneDatabase) -> None:
    with pytest.raises(StateError), lane.writing() as connection:
        connection.execute("INSERT INTO meta VALUES('kept', ?)", (1.0,))
        connection.execute("INSERT INTO backend(name, since_s) VALUES(?, 1)", ("a\0'); DROP TABLE meta; --",))
    with lane.looking() as connection:
        assert connection.execute("SELECT name FROM meta").fetchall() == []


def test_statements_keep_their_order_and_are_counted_when_that_is_asked(lane: LaneDatabase) -> None:
    with lane.writing() as connection:
        connection.execute("INSERT INTO meta VALUES('a', 1)")
        assert connection.execute("UPDATE meta SET value = value + 1 WHERE name = ?", ("a",)).rowcount == 1
        assert connection.execute("UPDATE meta SET value = 7 WHERE name = ?", ("b",)).rowcount == 0
        connection.execute("UPDATE meta SET value = value * 10")
        assert connection.execute("SELECT value FROM meta").fetchone()[0] == 20.0
        early = connection.execute("DELETE FROM meta")
        connection.execute("INSERT INTO meta VALUES('c', 3)")
        with pytest.raises(AssertionError, match="asked for after"):
            _ = early.rowcount
    with lane.looking() as connection:
        assert [tuple(row) for row in connection.execute("SELECT name, value FROM meta")] == [("c", 3.0)]


def test_an_error_in_what_waited_undoes_the_step(lane: LaneDatabase) -> None:
    with pytest.raises(StateError, match="lane 3"), lane.writing() as connection:
        connection.execute("INSERT INTO meta VALUES('a', 1)")
        connection.execute("INSERT INTO meta VALUES('a', 2)")
    with lane.looking() as connection:
        assert connection.execute("SELECT name FROM meta").fetchall() == []


def test_who_was_deposed_sends_nothing_but_the_question(lane: LaneDatabase, messages: list[str]) -> None:
    with pytest.raises(Deposed), LaneDatabase(lane._database, Held(3, "tester", 0)).writing():
        raise AssertionError("not its lane")
    assert [one.split()[0] for one in messages[-3:]] == ["BEGIN;", "SELECT", "ROLLBACK;"]


def request(seq: int) -> NewRequest:
    sealed = Sealed(key=f"key-{seq}", events=(Event(f"r{seq}", f"r{seq}"),), body=b"{}")
    return NewRequest(sealed=sealed, members=(Member(seq, f"r{seq}", f"r{seq}"),), lines=(b"{}",), oldest_s=START_S)


def test_a_step_takes_as_many_messages_for_fifty_requests_as_for_one(lane: LaneDatabase, messages: list[str]) -> None:
    store = DeliveryStore(lane)
    cursor = store.start_cursor("fake", "lane-03").id
    ids: Sequence[int] = ()
    settled: list[Settlement] = []
    counts = []
    for first, last in ((1, 1), (2, 51), (52, 101)):
        settled = [
            Settlement(request=one, decision=Decision(open=False, fates=(Fate.DELIVERED,), tries=Tries(1)), history=())
            for one in store.open_requests("fake")
        ]
        sealing = Sealing(
            cursor=cursor,
            from_seq=first - 1,
            to_seq=last,
            requests=[request(seq) for seq in range(first, last + 1)],
            at_once=set(range(last - first + 1)),
        )
        messages.clear()
        done = store.commit(Turn(now_s=START_S, settled=settled, sealing=sealing))
        counts.append(len(messages))
        assert len(done.sealed) == last - first + 1
        ids = done.sealed
    assert counts[1:] == [counts[0]] * 2, counts
    assert counts[0] <= 7
    assert [one.members[0].seq for one in store.open_requests("fake")] == list(range(52, 102))
    assert [one.id for one in store.open_requests("fake")] == ids
    with pytest.raises(StateBusy, match="settled before"):
        store.commit(Turn(now_s=START_S, settled=settled))
    with pytest.raises(StateBusy, match="a cursor is not at 5"):
        store.commit(Turn(now_s=START_S, sealing=Sealing(cursor=cursor, from_seq=5, to_seq=6)))
    store.close()
