"""`check` says what would keep the sidecar from starting, and from delivering."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.backends.file import FileBackend
from sidecar.cli import main
from sidecar.cli.shared import EXIT_FAILED, EXIT_OK, EXIT_USAGE


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDECAR_UPSTREAM_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("SIDECAR_DATA_DIR", str(tmp_path / "data"))


def test_nothing_is_in_the_way_of_a_directory_that_is_not_there_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check"]) == EXIT_OK
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_data_directory_that_is_a_file(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("SIDECAR_DATA_DIR", f"{file}{below}")
    assert main(["check"]) == EXIT_USAGE
    told = capsys.readouterr()
    assert f"SIDECAR_DATA_DIR={file}{below}: {file} is no directory" in told.err
    assert "chmod" not in told.out


def test_a_damaged_state_of_delivery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "delivery.db").write_bytes(b"no database" * 500)
    assert main(["check"]) == EXIT_USAGE
    assert "delivery.db is damaged" in capsys.readouterr().err
    assert (tmp_path / "data" / "delivery.db").read_bytes() == b"no database" * 500


@pytest.mark.parametrize("name", ["LISTEN", "ADMIN_LISTEN"])
def test_a_socket_in_a_directory_that_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"SIDECAR_{name}", f"unix:{tmp_path}/none/a.sock")
    assert main(["check"]) == EXIT_USAGE
    assert (
        f"SIDECAR_{name}=unix:{tmp_path}/none/a.sock: there is no directory {tmp_path}/none" in capsys.readouterr().err
    )


def test_a_file_that_cannot_be_written_is_no_backend_that_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIDECAR_BACKENDS", FileBackend.name)
    for path, why in (
        (tmp_path / "none" / "records", f"there is no directory {tmp_path / 'none'}"),
        (tmp_path, f"{tmp_path} is no file"),
    ):
        monkeypatch.setenv("SIDECAR_FILE_PATH", str(path))
        assert main(["check", "--connect"]) == EXIT_FAILED
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("file ")]
        assert line.split()[1] == "failed"
        assert why in line
    monkeypatch.setenv("SIDECAR_FILE_PATH", str(tmp_path / "records"))
    main(["check", "--connect"])
    assert f"file      reached  {tmp_path / 'records'}" in capsys.readouterr().out
    assert not (tmp_path / "records").exists()
