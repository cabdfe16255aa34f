"""Every tutorial runs, command for command, and prints what it says that it prints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.tutorial import Terminal, TutorialError, fits, steps

ROOT = Path(__file__).parent.parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@needs_curl
@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_says(page: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    try:
        assert terminal.run(page.read_text()) >= 5
    finally:
        terminal.close()


@needs_curl
@pytest.mark.timeout(240)
def test_a_newcomer_bills_an_own_field_from_the_readme_alone(tmp_path: Path) -> None:
    """Nothing but what the README has on it: its files, its commands, and what it says that they print."""
    readme = (ROOT / "README.md").read_text()
    terminal = Terminal(tmp_path)
    try:
        assert terminal.run(readme) >= 7
    finally:
        terminal.close()
    assert any('"value":"40"' in line for step in steps(readme) for line in step.prints)


def test_what_is_printed_is_compared_with_what_is_shown() -> None:
    shown = ("subscriber  calls", "acme        …", "…", "total       3")
    assert fits(shown, "subscriber calls\nacme 2\nglobex 1\ntotal 3\n")
    assert fits(shown, "subscriber   calls\n\nacme 2\ntotal   3\n")
    assert not fits(shown, "subscriber calls\nacme 2\nglobex 1\ntotal 4\n")
    assert not fits(shown, "subscriber calls\nglobex 1\ntotal 3\n")
    assert not fits(shown, "subscriber calls\nacme 2\ntotal 3\nand more\n")


def test_a_page_is_read_into_files_and_commands(tmp_path: Path) -> None:
    page = (
        '```toml title="a.toml"\nx = 1\n```\n\n```console\n$ cat a.toml\nx = 1\n$ true\n```\n\n```sh\nmake demo\n```\n'
    )
    assert [(step.name, step.text, step.prints) for step in steps(page)] == [
        ("a.toml", "x = 1\n", ()),
        (None, "cat a.toml", ("x = 1",)),
        (None, "true", ()),
    ]
    terminal = Terminal(tmp_path)
    assert terminal.run(page) == 2
    terminal.close()


@pytest.mark.parametrize("body", ["$ echo > x; echo no\nyes", "$ false > x", "$ sleep 60 &\nready"])
def test_a_page_that_is_wrong_is_told(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.tutorial.PRINTS_S", 0.5)
    terminal = Terminal(tmp_path)
    try:
        with pytest.raises(TutorialError, match="printed"):
            terminal.run(f"```console\n{body}\n```\n")
    finally:
        terminal.close()
