"""Commands whose standard streams are closed, full, or read by somebody who has gone; and Ctrl-C before they begin."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

FULL = Path("/dev/full")
NO_ROOM = b"what there is to say cannot be written: No space left on device\n"


def started(
    words: Sequence[str], redirected: str = "", *, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    """A command, with what a shell does to its streams before."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SIDECAR_")}
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-m", "sidecar", *words],
        env={**environ, "SIDECAR_UPSTREAM_URL": "http://127.0.0.1:1"},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )


def with_a_reader_that_has_gone(words: Sequence[str], redirected: str = "") -> subprocess.CompletedProcess[bytes]:
    read, write = os.pipe()
    os.close(read)
    try:
        return started(words, redirected, stdout=write)
    finally:
        os.close(write)


def no_directory(tmp_path: Path) -> list[str]:
    """Words whose answer is no, behind a table."""
    (tmp_path / "file").touch()
    return ["check", "--all", "--data-dir", str(tmp_path / "file")]


def test_a_no_is_not_lost_with_a_reader_that_has_gone(tmp_path: Path) -> None:
    told = with_a_reader_that_has_gone(no_directory(tmp_path))
    assert told.returncode == 2
    assert b"is no directory" in told.stderr
    assert b"Traceback" not in told.stderr
    assert with_a_reader_that_has_gone(no_directory(tmp_path), "2>&1").returncode == 2
    assert with_a_reader_that_has_gone(["prices", "show", "gpt-5-mini"]).returncode == 0


@pytest.mark.parametrize("words", [["prices", "show", "gpt-5-mini"], ["completion", "bash"], ["help"]])
def test_a_closed_output_is_nobody_who_listens(words: list[str]) -> None:
    told = started(words, ">&-")
    assert (told.returncode, told.stderr) == (0, b"")
    assert started(words, ">&- 2>&- <&-").returncode == 0


def test_what_is_closed_leaves_the_exit_code(tmp_path: Path) -> None:
    assert started(no_directory(tmp_path), ">&- 2>&- <&-").returncode == 2
    told = started(["subscriber"], "<&-")
    assert told.returncode != 0
    assert b"Traceback" not in told.stderr


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(
    "words", [["prices", "show", "gpt-5-mini"], ["prices", "show", "gpt-5-mini", "--format", "csv"], ["--version"]]
)
def test_an_output_without_room_is_told_in_one_line(words: list[str]) -> None:
    told = started(words, f">{FULL}")
    assert (told.returncode, told.stderr) == (1, NO_ROOM)


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_of_a_complaint_that_finds_no_room_the_exit_code_stays(tmp_path: Path) -> None:
    assert started(no_directory(tmp_path), f">/dev/null 2>{FULL}").returncode == 2
    assert started(["usage", "--sinec", "7d"], f"2>{FULL}").returncode == 2


@pytest.mark.parametrize("module", ["sidecar.cli", "sidecar.cli.balance", "sidecar.cli.usage"])
def test_an_interrupt_while_the_program_is_still_read_is_no_fault(module: str) -> None:
    """As the installed script starts it: Ctrl-C may come while its modules are imported."""
    interrupted = f"""
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from sidecar.__main__ import main
sys.exit(main())
"""
    told = subprocess.run(
        [sys.executable, "-c", interrupted], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    assert (told.returncode, told.stdout, told.stderr) == (130, b"", b"")


def test_what_is_fed_without_an_end_of_line_is_told_and_not_kept() -> None:
    pytest.importorskip("nats")
    environ = {"SIDECAR_NATS_URL": "nats://127.0.0.1:1", "PATH": os.environ["PATH"]}
    told = subprocess.run(
        ["sh", "-c", f'ulimit -v 4000000 2>/dev/null; exec "{sys.executable}" -m sidecar collect --feed /dev/zero'],
        env={**environ, **{k: v for k, v in os.environ.items() if k == "PYTHONPATH"}},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (told.returncode, told.stdout) == (2, b"")
    assert told.stderr == b"line 1 has more than 1 MiB: expected records, a line each, as `spool export` writes them\n"
