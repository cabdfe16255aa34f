"""`serve` as it is typed: the address of the API, where to listen, and what its log looks like to a person and to a
program."""

from __future__ import annotations

import errno
import json
import logging
import os
import pty
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from support.whole import START_LIMIT_S, STOP_LIMIT_S, environment

from sidecar.cli import main
from sidecar.cli.serve import environ
from sidecar.runtime.logging import JsonLines, TextLines
from sidecar.settings import LogFormat

ROOT = Path(__file__).parent.parent.parent
UPSTREAM = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SIDECAR_"):
            monkeypatch.delenv(name)


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    (line,) = capsys.readouterr().err.splitlines()
    found: dict[str, object] = json.loads(line)
    assert found["level"] == "ERROR"
    assert found["at"]
    return found


def test_another_api_than_the_variable_names_is_not_guessed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIDECAR_UPSTREAM_URL", "https://user:pass@api.example.com")
    assert main(["serve", "https://api.example.org"]) == 2
    text = str(told(capsys)["message"])
    assert "was told https://api.example.org, and SIDECAR_UPSTREAM_URL is https://…@api.example.com" in text
    assert "pass" not in text


@pytest.mark.parametrize(
    ("typed", "scheme"), [("api.openai.com", "https"), ("localhost:8000", "http"), ("127.0.0.1:9/v1", "http")]
)
def test_an_address_without_its_scheme_is_told_with_one(
    typed: str, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", typed]) == 2
    assert told(capsys)["message"] == f"{typed!r} is no URL; did you mean {scheme}://{typed}?"


@pytest.mark.parametrize("typed", ["u:secret@h.example", "u:secret@127.0.0.1:9", "h.example/?k=secret"])
def test_a_password_in_an_address_without_its_scheme_is_not_said(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", typed]) == 2
    said = str(told(capsys)["message"])
    assert "is no URL; did you mean http" in said
    assert "secret" not in said


def test_too_few_files_say_what_to_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_more(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files", "place.draft")

    monkeypatch.setattr("sidecar.runtime.app.run", no_more)
    assert main(["serve", UPSTREAM, "--data-dir", str(tmp_path)]) == 1
    assert str(told(capsys)["message"]).endswith("Too many open files: 'place.draft'; raise `ulimit -n`")


def test_what_is_typed_goes_before_what_is_set() -> None:
    from sidecar.cli import parser

    arguments = parser().parse_args(["serve", UPSTREAM, "--listen", "127.0.0.1:7000"])
    given = {"SIDECAR_UPSTREAM_URL": UPSTREAM + "/", "SIDECAR_LISTEN": "0.0.0.0:8080", "SIDECAR_STOP_S": "3"}
    assert environ(arguments, given) == {
        "SIDECAR_UPSTREAM_URL": UPSTREAM,
        "SIDECAR_LISTEN": "127.0.0.1:7000",
        "SIDECAR_STOP_S": "3",
    }
    assert environ(parser().parse_args(["serve"]), given) == given


def test_settings_that_are_wrong_are_one_line_for_a_program_and_a_list_for_a_person(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIDECAR_STOP_S", "soon")
    assert main(["serve"]) == 2
    line = told(capsys)
    assert line["message"] == "the configuration has 2 problems"
    problems = line["problems"]
    assert isinstance(problems, list)
    assert [one.partition("=")[0].partition(" ")[0] for one in problems] == ["SIDECAR_STOP_S", "SIDECAR_UPSTREAM_URL"]
    monkeypatch.setenv("SIDECAR_LOG_FORMAT", "text")
    assert main(["serve"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("the configuration has 2 problems:\n  SIDECAR_STOP_S='soon': ")


def test_the_format_may_stand_in_the_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sidecar.toml"
    file.write_text('log_format = "text"\n')
    monkeypatch.setenv("SIDECAR_CONFIG", str(file))
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.startswith("the configuration has 1 problem:\n  SIDECAR_UPSTREAM_URL is not set")
    file.write_text('log_format = "xml"\n')
    assert main(["serve", UPSTREAM]) == 2
    problems = told(capsys)["problems"]
    assert isinstance(problems, list)
    (problem,) = problems
    assert problem.startswith("SIDECAR_LOG_FORMAT='xml'")
    assert "one of json, text" in problem


@pytest.mark.parametrize("form", list(LogFormat))
def test_a_port_in_use_is_one_clear_line_in_either_format(
    form: LogFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        typed = ["serve", UPSTREAM, "--listen", address, "--data-dir", str(tmp_path / "d")]
        done = subprocess.run(
            [sys.executable, "-m", "sidecar", *typed],
            env=environment({"SIDECAR_LOG_FORMAT": form, "SIDECAR_LOG_LEVEL": "error"}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_LIMIT_S,
        )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    text = json.loads(line)["message"] if form is LogFormat.JSON else line
    assert text.startswith(address)
    assert "SIDECAR_LISTEN" in text


def test_a_data_directory_that_is_a_file_is_a_wrong_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data"
    file.touch()
    assert main(["serve", UPSTREAM, "--listen", "127.0.0.1:0", "--data-dir", str(file)]) == 2
    assert "there is a file where a directory is needed" in str(told(capsys)["message"])


@pytest.mark.parametrize("name", ["delivery.db", "ledger.db"])
def test_a_data_directory_of_a_newer_version_is_a_wrong_setting(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(tmp_path / name)) as db:
        db.execute("PRAGMA user_version = 9999")
    assert main(["serve", UPSTREAM, "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path)]) == 2
    assert f"{name} has format 9999 and was written by a newer version" in capsys.readouterr().err


def test_a_terminal_gets_text_and_a_pipe_gets_json(tmp_path: Path) -> None:
    """Both of one start: what the supervisor says, and what the processes say that it forks."""
    for name in ("terminal", "pipe"):
        ours, theirs = pty.openpty() if name == "terminal" else os.pipe()
        command = [sys.executable, "-m", "sidecar", "serve", UPSTREAM, "--listen", "127.0.0.1:0"]
        more = {"SIDECAR_ADMIN_LISTEN": "127.0.0.1:0", "SIDECAR_DATA_DIR": str(tmp_path / name)}
        process = subprocess.Popen(command, env=environment(more), cwd=ROOT, stderr=theirs, stdin=subprocess.DEVNULL)
        os.close(theirs)
        said = ""
        try:
            until_s = time.monotonic() + START_LIMIT_S
            while "ready" not in said and time.monotonic() < until_s:
                said += os.read(ours, 65536).decode()
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_LIMIT_S) == 0
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            os.close(ours)
        (line,) = [line for line in said.splitlines() if "ready" in line]
        if name == "terminal":
            assert " INFO    supervisor: ready  proxy=http://127.0.0.1:" in line
        else:
            found = json.loads(line)
            assert (found["message"], found["role"]) == ("ready", "supervisor")
            assert found["proxy"].startswith("http://127.0.0.1:")
            assert found["page"] == found["admin"] + "/"


def test_a_line_of_text_is_one_line_whatever_is_in_it() -> None:
    """Names come from clients: a line end in one would make a line that we did not write, and marks of direction would
    turn it around on the screen."""
    record = logging.LogRecord("sidecar.x", logging.WARNING, "", 0, "no price for %s", ("a\nERROR all is lost",), None)
    asked = {"backend": "webhook", "as": "a\nb"}
    record.facts = {
        "model": "gpt\u202e5",
        "calls": 3,
        "said": 'a "b" c',
        "none": None,
        "asked": asked,
        "parked": {"ledger": 2},
    }
    line = TextLines(role="metering").format(record)
    assert len(line.splitlines()) == 1
    assert "\u202e" not in line
    assert line[23:].startswith("Z WARNING metering: no price for a\\nERROR all is lost  model=")
    assert 'calls=3 said="a \\"b\\" c" none=None backend=webhook as="a\\\\nb" parked.ledger=2' in line
    assert json.loads(JsonLines(role="metering").format(record))["message"] == "no price for a\nERROR all is lost"


def test_a_traceback_follows_its_line_of_text() -> None:
    try:
        raise OSError("why")
    except OSError:
        record = logging.LogRecord("sidecar.x", logging.ERROR, "", 0, "it died", (), sys.exc_info())
    first, *rest = TextLines().format(record).splitlines()
    assert first.endswith("ERROR   sidecar: it died")
    assert rest[-1] == "OSError: why"


def test_check_shows_what_is_defined_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sidecar.toml"
    meters = "".join(f'[[meters]]\nname = "meter_{n:02}"\naggregation = {{type = "COUNT"}}\n' for n in range(23))
    file.write_text(
        f'upstream_url = "{UPSTREAM}"\nbackends = ["ledger"]\n[subscribers.acme]\nstripe = "cus_1"\n'
        '[subscribers.globex]\nstripe = "cus_2"\n[dimensions]\nfeature = "x-feature"\n'
        '[[limits]]\nname = "acme-monthly"\nsubscriber = "acme"\nunit = "calls"\namount = "500"\nwindow = "month"\n'
        '[[prices]]\nprovider = "openai"\nmodel = "gpt-5*"\ninput = "1"\n'
        f'[[prices]]\nmeter = "meter_01"\nunit = "0.1"\n{meters}'
    )
    monkeypatch.setenv("SIDECAR_CONFIG", str(file))
    monkeypatch.setenv("SIDECAR_DATA_DIR", str(tmp_path / "data"))
    assert main(["check", "--format", "json"]) == 0
    report = capsys.readouterr()
    shown = {line["setting"]: line["value"] for line in json.loads(report.out)["settings"]}
    assert shown["[subscribers]"] == "acme, globex"
    assert shown["[[limits]]"] == "acme-monthly"
    assert shown["[[prices]]"] == "gpt-5*, meter meter_01"
    assert shown["[[meters]]"] == ", ".join(f"meter_{n:02}" for n in range(20)) + " and 3 more"
    assert shown["SIDECAR_DIMENSIONS"] == "feature=x-feature"
    assert "cus_1" not in report.out
