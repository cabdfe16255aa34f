"""The index of what was collected: never ahead of the spool, and honest about what it has forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.backend_fixtures import record

from sidecar.model.record_check import id_ms
from sidecar.spool import Spool, SpoolReader
from sidecar.spool.known_ids import ASIDE_BYTES_MAX, ASIDE_HEAD_BYTES, NAME, Aside, KnownIds, kept_aside
from sidecar.spool.types import Batch
from sidecar.storage.files import StorageError


def dated(ms: int) -> str:
    """An id of that time."""
    text = f"{ms:012x}"
    return f"{text[:8]}-{text[8:]}-7000-8000-000000000000"


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[SpoolReader]:
    with SpoolReader(tmp_path) as one:
        yield one


async def spooled(data_dir: Path, *lines: bytes) -> str:
    async with Spool.open(data_dir) as spool:
        first = spool.next_seq
        spool.tally.admitted += len(lines)
        spool.submit(Batch(first_seq=first, lines=list(lines), admitted=spool.tally.admitted))
    return spool.instance


async def test_it_catches_up_with_the_spool(tmp_path: Path, reader: SpoolReader) -> None:
    records = [record(n) for n in range(1, 6)]
    await spooled(tmp_path, *(one.json for one in records[:3]), b"no record")
    ids = KnownIds(tmp_path, reader)
    asked = [one.id for one in records]
    assert ids.known(asked) == set(asked[:3])
    instance = await spooled(tmp_path, records[3].json)
    ids.close()
    ids = KnownIds(tmp_path, reader)
    assert ids.known(asked) == set(asked[:4])
    ids.remember(instance, 6, [records[4].id], passed=("S", 7))
    assert ids.known(asked) == set(asked)
    assert (ids.passed("S"), ids.passed("T")) == (7, 0)
    assert not ids.too_old(asked[0])
    ids.close()
    (tmp_path / NAME).unlink()
    ids = KnownIds(tmp_path, reader)
    assert ids.known(asked) == set(asked[:4]), "of a new index, what the spool has is known"
    ids.close()


def test_what_is_forgotten_is_too_old_and_nothing_else_is(tmp_path: Path, reader: SpoolReader) -> None:
    ids = KnownIds(tmp_path, reader)
    times = [1000, 2000, 2000 + 1, 3000, 9000]
    ids.remember("i", 5, [dated(ms) for ms in times])
    assert ids.forget(0.5) == 0
    assert ids.forget(2.5) == 3
    assert [ids.too_old(dated(ms)) for ms in (999, 2000, 2001, 2002, 3000)] == [True, True, True, False, False]
    assert ids.known([dated(ms) for ms in times]) == {dated(3000), dated(9000)}
    ids.close()
    ids = KnownIds(tmp_path, reader)
    assert ids.too_old(dated(2001))
    assert not ids.too_old(dated(2002))
    ids.close()
    assert id_ms(dated(2002)) == 2002


def test_what_lies_aside_is_there_once_and_bounded(
    tmp_path: Path, reader: SpoolReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept_aside(tmp_path) == []
    ids = KnownIds(tmp_path, reader)
    one = Aside("S 1 now", "no_record", "no JSON", 1.0, b"hello")
    ids.remember("i", 0, [], [one])
    ids.remember("i", 0, [], [one, Aside("S 2 now", "no_record", "no JSON", 1.0, b"you")])
    assert ids.aside_count == 2
    monkeypatch.setattr("sidecar.spool.known_ids.ASIDE_BYTES_MAX", 100)
    ids.remember("i", 0, [], [Aside("S 3 now", "too_large", "large", 1.0, b"x" * 5000)])
    (_, _, large) = kept_aside(tmp_path)
    assert (len(large.body), large.size_bytes, large.whole) == (ASIDE_HEAD_BYTES, 5000, False)
    ids.taken_back([1])
    assert ids.aside_count == 2
    ids.close()
    assert ASIDE_BYTES_MAX > 1 << 20


def test_another_programs_file_is_refused(tmp_path: Path, reader: SpoolReader) -> None:
    (tmp_path / NAME).write_bytes(b"hello, I am no database at all, and long enough to be looked at" * 20)
    with pytest.raises(StorageError, match="is damaged"):
        KnownIds(tmp_path, reader)
