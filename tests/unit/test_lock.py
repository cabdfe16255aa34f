"""One instance a data directory: who holds it, who may join, and what is said to the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sidecar.cli import main
from sidecar.runtime.instance_lock import (
    LAYOUT,
    DataLock,
    InUseError,
    LockError,
    NewerError,
    Note,
    NotWritableError,
    running,
)
from sidecar.spool import FileLock, Spool
from sidecar.spool.files import make_directory, slot_dir

HOLDER = """
import sys, time
from pathlib import Path
from sidecar.runtime.instance_lock import DataLock
lock = DataLock.take(Path(sys.argv[1]))
lock.announce(admin="http://127.0.0.1:9464", proxy="http://127.0.0.1:8080")
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_instance_is_told_who_has_it(tmp_path: Path) -> None:
    with DataLock.take(tmp_path), pytest.raises(InUseError) as caught:
        DataLock.take(tmp_path)
    assert caught.value.pid == os.getpid()
    assert f"in use by another instance (process {os.getpid()}): stop it, or set SIDECAR_DATA_DIR" in str(caught.value)


def test_what_was_released_can_be_taken_again(tmp_path: Path) -> None:
    DataLock.take(tmp_path).release()
    lock = DataLock.take(tmp_path)
    assert "held" in repr(lock)
    lock.release()
    lock.release()
    assert "released" in repr(lock)


def test_the_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    with DataLock.take(directory):
        assert directory.stat().st_mode & 0o777 == 0o700
        assert (directory / "lock").stat().st_mode & 0o777 == 0o600


def test_a_kill_lets_go_at_once_and_the_note_says_where_the_admin_port_is(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert running(tmp_path) == Note(child.pid, "http://127.0.0.1:9464", "http://127.0.0.1:8080", LAYOUT)
        with pytest.raises(InUseError, match=str(child.pid)):
            DataLock.take(tmp_path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert running(tmp_path) is None
    DataLock.take(tmp_path).release()


def test_workers_share_it_and_a_new_instance_waits_for_the_last(tmp_path: Path) -> None:
    main = DataLock.take(tmp_path)
    with pytest.raises(InUseError):
        DataLock.join(tmp_path)
    main.share()
    worker = DataLock.join(tmp_path)
    main.release()
    assert running(tmp_path) is not None
    with pytest.raises(InUseError):
        DataLock.take(tmp_path)
    leaves = threading.Timer(0.1, worker.release)
    leaves.start()
    DataLock.take(tmp_path, wait_s=30).release()
    leaves.join()


def test_nobody_runs_where_nothing_is(tmp_path: Path) -> None:
    assert running(tmp_path) is None
    assert running(tmp_path / "none") is None
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"pid": "x", "admin": 3, "layout": null}', b"\xff"])
def test_an_odd_note_says_nothing_and_stops_nothing(tmp_path: Path, note: bytes) -> None:
    (tmp_path / "lock").write_bytes(note)
    with DataLock.take(tmp_path) as lock:
        (tmp_path / "lock").write_bytes(note)
        assert running(tmp_path) == Note()
        with pytest.raises(InUseError, match="in use by another instance: stop it"):
            DataLock.take(tmp_path)
        lock.announce(admin="unix:/x")
        assert running(tmp_path) == Note(os.getpid(), "unix:/x")


def test_a_newer_versions_directory_is_left_alone(tmp_path: Path) -> None:
    note = json.dumps({"pid": 1, "admin": None, "layout": LAYOUT + 1})
    (tmp_path / "lock").write_text(note)
    with pytest.raises(NewerError, match=f"made by a newer version \\(layout {LAYOUT + 1}"):
        DataLock.take(tmp_path)
    assert (tmp_path / "lock").read_text() == note


def test_a_file_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotWritableError, match="cannot be used by user"):
        DataLock.take(tmp_path / "file")


def test_a_place_where_nothing_can_be_made_is_named() -> None:
    with pytest.raises(NotWritableError, match="set SIDECAR_DATA_DIR to one it may write"):
        DataLock.take(Path("/proc/sidecar-data"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(NotWritableError, match="SIDECAR_DATA_DIR"):
        DataLock.take(tmp_path)


def test_all_of_them_are_lock_errors() -> None:
    assert issubclass(InUseError, LockError)
    assert issubclass(NewerError, LockError)
    assert issubclass(NotWritableError, LockError)


def test_a_new_slot_that_another_worker_found_first_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers start on an empty directory: one makes a slot, the other looks for a free one before it is locked."""
    names = iter(("00000001", "00000002"))

    def new_instance() -> str:
        name = next(names)
        if name == "00000001":
            make_directory(slot_dir(tmp_path, name))
            found_first.append(FileLock(slot_dir(tmp_path, name) / "lock"))
        return name

    found_first: list[FileLock] = []
    monkeypatch.setattr("sidecar.spool.files.new_instance", new_instance)
    with contextlib.closing(Spool.open(tmp_path)) as spool:
        assert spool.instance == "00000002"
    found_first[0].release()


def test_a_reload_finds_the_instance_in_a_file_that_is_wrong_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose problem it is: the instance says what it does not take, and that it goes on as it was."""
    file = tmp_path / "sidecar.toml"
    monkeypatch.setenv("SIDECAR_CONFIG", str(file))
    file.write_text(f"data_dir = '{tmp_path}/there'\nworkers = 0\n")
    assert main(["reload"]) == 2
    assert f"no instance runs on {tmp_path}/there" in capsys.readouterr().err
    for text in (b"workers = ", b"\xff\xfe", b"workers = 0\n"):
        file.write_bytes(text)
        assert main(["reload"]) == 1
        assert capsys.readouterr().out.startswith("not reloaded, the old settings hold:\n  ")
    file.unlink()
    assert main(["reload"]) == 1
    assert "cannot be read" in capsys.readouterr().out
