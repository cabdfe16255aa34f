"""Files and databases: opened one way, written whole or not at all, and refused in words that say what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from sidecar.delivery.database import SCHEMA as DELIVERY
from sidecar.ledger.schema import SCHEMA as LEDGER
from sidecar.model.delivery import Blocked, Retry, Verdict
from sidecar.storage import files, sqlite
from sidecar.storage.files import (
    StorageError,
    Trouble,
    explain,
    replacing,
    try_lock,
    verdict_for,
    write_file,
    write_once,
)
from sidecar.storage.sqlite import Schema, check_pages, open_db, problem_of, transaction

TABLES = """
CREATE TABLE shelf (
  name TEXT NOT NULL -- a semicolon in a comment; is no end
) STRICT;
CREATE INDEX shelf_name ON shelf (name);
"""


class ShelfError(StorageError):
    """What the schema below raises."""


ONE = Schema(name="shelf", version=1, tables=TABLES, error=ShelfError)
TWO = Schema(
    name="shelf",
    version=2,
    tables=TABLES + "CREATE TABLE box (name TEXT) STRICT;\n",
    error=ShelfError,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shelf.db"


def ask(db: sqlite3.Connection, question: str) -> object:
    return db.execute(question).fetchone()[0]


# --- opening a database ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (Trouble.FULL, Retry("disk_full")),
        (Trouble.BUSY, Retry("busy")),
        (Trouble.FAILED, Retry("write_failed")),
        (None, Retry("write_failed")),
        (Trouble.DENIED, Blocked("not_writable")),
        (Trouble.READ_ONLY, Blocked("not_writable")),
        (Trouble.GONE, Blocked("not_writable")),
        (Trouble.DAMAGED, Blocked("broken")),
        (Trouble.NOT_DATABASE, Blocked("broken")),
        (Trouble.NEWER, Blocked("another's")),
        (Trouble.OLDER, Blocked("another's")),
        (Trouble.FOREIGN, Blocked("another's")),
    ],
)
def test_what_is_wrong_with_a_backends_file_is_a_verdict(found: Trouble | None, verdict: Verdict) -> None:
    assert verdict_for(found, damaged="broken", unfit="another's") == verdict


def test_a_new_file_is_durable_private_and_of_the_schemas_version(path: Path) -> None:
    old = os.umask(0)
    try:
        with closing(open_db(path, schema=ONE)) as db:
            with transaction(db):
                db.execute("INSERT INTO shelf VALUES ('a')")
            assert ask(db, "PRAGMA journal_mode") == "wal"
            assert ask(db, "PRAGMA synchronous") == 2
            assert ask(db, "PRAGMA user_version") == 1
            assert ask(db, "PRAGMA busy_timeout") == sqlite.BUSY_S * 1000
            assert {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()} == {0o600}
    finally:
        os.umask(old)
    with closing(open_db(path, schema=ONE)) as again:
        assert ask(again, "SELECT count(*) FROM shelf") == 1


def test_a_reader_cannot_write_and_makes_nothing(path: Path) -> None:
    with pytest.raises(ShelfError, match=r"shelf\.db does not exist yet: it is made") as caught:
        open_db(path, schema=ONE, read_only=True)
    assert caught.value.trouble is Trouble.GONE
    assert not path.exists()
    open_db(path, schema=ONE).close()
    for lasting in (False, True):
        with closing(open_db(path, schema=ONE, read_only=True, lasting=lasting)) as db:
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                db.execute("INSERT INTO shelf VALUES ('a')")
    path.unlink()
    path.touch()
    with pytest.raises(ShelfError, match="holds no shelf yet"):
        open_db(path, schema=ONE, read_only=True)


def test_a_lasting_reader_sees_what_is_written_later(path: Path) -> None:
    open_db(path, schema=ONE).close()
    with (
        closing(open_db(path, schema=ONE, read_only=True, lasting=True)) as reader,
        closing(open_db(path, schema=ONE)) as db,
    ):
        db.execute("INSERT INTO shelf VALUES ('a')")
        assert ask(reader, "SELECT count(*) FROM shelf") == 1


def test_an_older_file_is_refused_and_kept(path: Path) -> None:
    with closing(open_db(path, schema=ONE)) as db:
        db.execute("INSERT INTO shelf VALUES ('a')")
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(ShelfError, match=r"has format 1, .*older release.* let that release deliver") as caught:
            open_db(path, schema=TWO, read_only=read_only)
        assert caught.value.trouble is Trouble.OLDER
    assert path.read_bytes() == before
    assert "older release" in str(problem_of(path, schema=TWO))


def test_tables_that_cannot_all_be_made_leave_an_empty_file(path: Path) -> None:
    bad = Schema(name="shelf", version=1, tables=TABLES + "CREATE TABLE box (a);\nSELECT nothing FROM nowhere;")
    with pytest.raises(StorageError):
        open_db(path, schema=bad)
    with closing(open_db(path, schema=ONE)) as db:
        assert ask(db, "SELECT count(*) FROM sqlite_schema WHERE name = 'box'") == 0
        assert ask(db, "SELECT count(*) FROM shelf") == 0


@pytest.mark.parametrize("schema", [LEDGER, DELIVERY], ids=["ledger.db", "delivery.db"])
def test_what_the_first_releases_wrote_is_refused_by_name(tmp_path: Path, schema: Schema) -> None:
    path = tmp_path / f"{schema.name}.db"
    open_db(path, schema=schema).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 1")
    with pytest.raises(StorageError, match=rf"{schema.name}\.db has format 1.*set SIDECAR_DATA_DIR"):
        open_db(path, schema=schema)


def test_a_newer_file_is_refused_and_kept(path: Path) -> None:
    open_db(path, schema=TWO).close()
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(ShelfError, match=r"has format 2 .* newer version.* reads up to 1: update it") as caught:
            open_db(path, schema=ONE, read_only=read_only)
        assert caught.value.trouble is Trouble.NEWER
    assert path.read_bytes() == before
    assert "newer version" in str(problem_of(path, schema=ONE))


@pytest.mark.parametrize("version", [0, 1])
def test_another_programs_database_is_refused_and_kept(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (a)")
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()
    for read_only in (False, True):
        with pytest.raises(ShelfError, match="another program, and no shelf: move it away") as caught:
            open_db(path, schema=ONE, read_only=read_only)
        assert caught.value.trouble is Trouble.FOREIGN
    with closing(sqlite3.connect(path)) as db:
        assert [name for (name,) in db.execute("SELECT name FROM sqlite_schema")] == ["theirs"]


def test_what_is_no_database_is_damaged_and_kept(path: Path) -> None:
    path.write_bytes(b"no database" * 900)
    for read_only in (False, True):
        with pytest.raises(ShelfError, match=r"is damaged \(file is not a database\): put its copy back"):
            open_db(path, schema=ONE, read_only=read_only)
    assert path.read_bytes() == b"no database" * 900


def test_a_file_in_use_is_waited_for_and_then_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_S", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ShelfError, match="in use by another process") as caught:
            open_db(path, schema=ONE)
        assert caught.value.passes


def test_a_file_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    with pytest.raises(ShelfError, match="its directory is not there"):
        open_db(tmp_path / "none" / "shelf.db", schema=ONE)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(ShelfError, match=f"by user {os.geteuid()} .*give that user the data directory"):
                open_db(tmp_path / "shelf.db", schema=ONE)
        finally:
            tmp_path.chmod(0o700)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_directory_in_the_place_of_a_file_is_named_and_no_fault_of_the_disk(path: Path, read_only: bool) -> None:
    path.mkdir()
    with pytest.raises(ShelfError, match=r"there is a directory in the place of shelf\.db; move it away") as caught:
        open_db(path, schema=ONE, read_only=read_only)
    assert caught.value.trouble is Trouble.DENIED
    assert "a directory in the place of a file" in explain(IsADirectoryError(errno.EISDIR, "is one"), "it")


def test_a_damaged_page_that_no_question_comes_to_is_found(path: Path) -> None:
    with closing(open_db(path, schema=TWO)) as db:
        db.execute("INSERT INTO shelf VALUES ('one')")
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'box'").fetchone()
        size = int(str(ask(db, "PRAGMA page_size")))
    check_pages(path, schema=TWO)
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\x55" * size)
    with closing(open_db(path, schema=TWO, read_only=True)) as db:
        assert ask(db, "SELECT name FROM shelf") == "one"
    with pytest.raises(ShelfError, match=r"shelf\.db is damaged \(.*move it away") as caught:
        check_pages(path, schema=TWO)
    assert caught.value.damaged


def test_a_failed_transaction_leaves_nothing(path: Path) -> None:
    with closing(open_db(path, schema=ONE)) as db:
        with pytest.raises(KeyError), transaction(db):
            db.execute("INSERT INTO shelf VALUES ('a')")
            raise KeyError
        assert not db.in_transaction
        assert ask(db, "SELECT count(*) FROM shelf") == 0


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "note"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"three")
        raise KeyError
    assert path.read_bytes() == b"two"
    assert [one.name for one in tmp_path.iterdir()] == ["note"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_sync_that_fails_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note"
    write_file(path, b"one")

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr(files, "sync_file", fails)
    for attempt in (lambda: write_file(path, b"two"), lambda: write_once(tmp_path / "key", b"k")):
        with pytest.raises(OSError, match="the disk fails"):
            attempt()
    assert path.read_bytes() == b"one"
    assert [one.name for one in tmp_path.iterdir()] == ["note"]


def test_what_is_written_once_stays(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert write_once(path, b"first")
    assert not write_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert [one.name for one in tmp_path.iterdir()] == ["key"]


def test_directories_are_made_for_their_owner(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        files.make_directory(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert {stat.S_IMODE((tmp_path / one).stat().st_mode) for one in ("a", "a/b")} == {0o700}
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        files.make_directory(tmp_path / "file" / "below")
    assert "a file where a directory is needed" in explain(caught.value, "it cannot be made")


def test_a_directory_sync_that_fails_is_said_and_one_that_is_not_offered_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, raises in ((errno.EINVAL, False), (errno.EIO, True)):

        def fsync(fd: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)
        if raises:
            with pytest.raises(OSError, match=os.strerror(number)):
                files.sync_directory(tmp_path)
        else:
            files.sync_directory(tmp_path)


@pytest.mark.parametrize(("number", "raises"), [(errno.ENOTSUP, False), (errno.EIO, True)])
def test_where_a_file_system_of_macos_has_no_full_sync_a_file_is_synced_as_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    synced: list[int] = []

    def full_sync(fd: int, request: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full_sync)
    monkeypatch.setattr(os, "fsync", synced.append)
    if raises:
        with pytest.raises(OSError, match=os.strerror(number)):
            files.sync_file(7)
    else:
        files.sync_file(7)
    assert synced == ([] if raises else [7])


def test_a_lock_is_held_by_one_process_and_gone_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    holder = (
        "import os, sys; from sidecar.storage.files import try_lock\n"
        "assert try_lock(os.open(sys.argv[1], os.O_RDWR)); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", holder, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    fd = os.open(path, os.O_RDWR)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert not try_lock(fd)
        assert not try_lock(fd, shared=True)
        child.kill()
        child.communicate()
        assert try_lock(fd, shared=True)
        assert try_lock(fd)
    finally:
        child.kill()
        child.communicate()
        os.close(fd)


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ENOSPC, "no room is left"),
        (errno.EDQUOT, "no room is left"),
        (errno.EROFS, "mount it for writing"),
        (errno.EACCES, "give that user"),
        (errno.ENOENT, "put it back"),
        (errno.EIO, "look at its disk"),
        (errno.EMFILE, "raise `ulimit -n`"),
    ],
)
def test_each_errno_says_what_to_do(number: int, word: str) -> None:
    said = explain(OSError(number, os.strerror(number)), "/data/lock cannot be opened")
    assert said.startswith("/data/lock cannot be opened")
    assert word in said
