"""What a person is told who asks a command what it does, or mistypes it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import man_page
import pytest

from sidecar.cli import COMMANDS, completion, main, parser
from sidecar.cli import help as help_command
from sidecar.cli.help import NAME, PAGES, guessed, walk

ROOT = Path(__file__).parent.parent.parent
ALL = dict(walk(parser()))


@pytest.mark.parametrize("path", ALL)
def test_every_command_has_examples_and_a_page_to_read(path: str) -> None:
    assert path in PAGES, f"`{path}` needs a row in PAGES (sidecar/cli/help.py): examples, and the page to read on"
    shown = PAGES[path]
    text = ALL[path].format_help()
    for example in shown.examples:
        assert f"  {NAME} {example}\n" in text
    assert f"read on: {shown.page}" in text
    name, _, place = shown.page.partition("#")
    heads = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(), re.MULTILINE)
    assert not place or place in {head.lower().replace(" ", "-") for head in heads}, shown.page


@pytest.mark.parametrize("example", sorted({one for shown in PAGES.values() for one in shown.examples}))
def test_every_example_can_be_typed(example: str) -> None:
    words = shlex.split(example.partition(" > ")[0])
    assert parser().parse_args(words).run is COMMANDS[words[0]].run


@pytest.mark.parametrize("path", ALL)
def test_what_a_command_is_given_with_its_arguments_has_no_name_of_theirs(path: str) -> None:
    """A default set for the whole command wins over the argument's own: `--top` would be the parser."""
    given = ALL[path]._defaults
    assert not given.keys() & {action.dest for action in ALL[path]._actions}


def test_no_page_is_kept_of_a_command_that_is_gone() -> None:
    assert PAGES.keys() <= ALL.keys()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["serv"], "serve"), (["recrods"], "records"), (["Usage"], "usage"), (["spool", "redriv"], "redrive"),
        (["usage", "--format", "jsn"], "json"), (["completion", "bsh"], "bash"),
    ],
)  # fmt: skip
def test_a_mistyped_word_is_told_with_the_near_one(
    typed: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed)
    assert ended.value.code == 2
    assert f"; did you mean {meant}? (choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["serve", "--lisen", "x"], "--listen"), (["usage", "--frobnicate", "x"], None), (["version"], "--version"),
        (["spool", "redrive", "--bakend", "x"], "--backend"), (["usage", "--bakend", "x"], None),
    ],
)  # fmt: skip
def test_a_mistyped_option_is_told_with_the_near_one_of_its_command(
    typed: list[str], meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert ("did you mean" not in said) if meant is None else (f"; did you mean {meant}?" in said)


@pytest.mark.parametrize("typed", [["spool", "redrive", "--bakend", "x"], ["usage", "more"], ["serve", "a", "b"]])
def test_what_a_command_does_not_take_is_told_with_its_own_usage(
    typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed)
    assert ended.value.code == 2
    command = " ".join(word for word in typed[:2] if word in ("spool", "redrive", "usage", "serve"))
    assert capsys.readouterr().err.startswith(f"usage: {NAME} {command} [-h]")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("https://api.openai.com", "https://api.openai.com"), ("localhost:3000", "http://localhost:3000"),
        ("unix:/run/api.sock", "unix:/run/api.sock"), ("api.openai.com/v1", "https://api.openai.com/v1"),
        ("[::1]:3000", "http://[::1]:3000"), ("127.0.0.9:80", "http://127.0.0.9:80"),
    ],
)  # fmt: skip
def test_an_address_in_the_place_of_a_command_is_one_to_serve(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([typed])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"{typed!r} is no command; did you mean `serve {meant}`?\n")


def test_a_word_that_is_like_none_is_told_without_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sidecar.toml"])
    said = capsys.readouterr().err
    assert "did you mean" not in said
    assert "'serve'" in said or "serve, demo" in said


def test_a_guess_is_made_of_either_way_in_which_pythons_print_choices() -> None:
    for choices in ("'serve', 'demo'", "serve, demo"):
        found = guessed(f"argument COMMAND: invalid choice: 'serv' (choose from {choices})")
        assert found == f"argument COMMAND: invalid choice: 'serv'; did you mean serve? (choose from {choices})"
    assert guessed("expected one argument") == "expected one argument"


def test_help_is_what_the_option_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["usage"], ["spool", "redrive"]):
        assert main(["help", *words]) == 0
        said = capsys.readouterr().out
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serv"], "metering-sidecar has no command 'serv'; did you mean serve?"),
        (["spool", "zzz"], "metering-sidecar spool has no command 'zzz'; it has status, verify"),
        (["usage", "more"], "metering-sidecar usage has no command 'more'"),
    ],
)
def test_help_of_what_is_not_there_says_what_is(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["help", *words]) == 2
    assert capsys.readouterr().err.startswith(told)


def test_the_pages_are_found_in_the_clone_and_beside_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert help_command.whereabouts() == f"in {ROOT}"
    monkeypatch.setattr(help_command, "__file__", str(tmp_path / "lib/sidecar/cli/help.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert help_command.whereabouts() == "of the source"
    pages = tmp_path / help_command.SHARED_PAGES
    (pages / "docs").mkdir(parents=True)
    (pages / "README.md").touch()
    assert help_command.whereabouts() == f"in {pages}"


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_knows_every_command_and_option(shell: str) -> None:
    text = completion.script(parser(), shell)
    for path, command in ALL.items():
        assert all(word in text for word in path.split())
        if shell != "tcsh":  # whose scripts have no words below the second
            options = [option for action in command._actions for option in action.option_strings]
            assert all(option in text for option in options)


def test_bash_completes_what_was_begun(tmp_path: Path) -> None:
    """The script is given to bash itself, and its function is called as a Tab does."""
    file = tmp_path / "completion"
    file.write_text(completion.script(parser(), "bash"))
    (tmp_path / "some-directory").mkdir()

    def bash(commands: str) -> str:
        run = ["bash", "-c", f"source {file}; {commands}"]
        return subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    function = re.search(r"-F (\S+)", bash(f"complete -p {NAME}"))
    assert function is not None

    def completed(*words: str) -> list[str]:
        line = " ".join(shlex.quote(word) for word in (NAME, *words))
        call = f"{function[1]} {NAME} {shlex.quote(words[-1])} x"
        return bash(f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; {call}; printf "%s\\n" "${{COMPREPLY[@]}}"').split()

    assert completed("sp") == ["spool"]
    assert completed("spool", "re") == ["redrive", "retry"]
    assert "--connect" in completed("check", "--c")
    assert completed("usage", "--format", "") == ["table", "json", "csv", "ndjson"]
    assert any("some-directory" in word for word in completed("serve", "--data-dir", "some"))


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="each Python's argparse breaks the usage lines otherwise")
def test_the_man_page_is_what_the_parser_says() -> None:
    assert man_page.PAGE.read_text() == man_page.written(), "run `make man`"


def test_the_man_page_has_what_each_command_says_below_its_options() -> None:
    page = " ".join(man_page.PAGE.read_text().replace("\\", "").split())
    said = {path: (each.epilog or "").partition("examples:\n")[0] for path, each in walk(parser())}
    assert [path for path, own in said.items() if " ".join(own.split()) not in page] == []
    assert sum("exit codes: " in own for own in said.values()) > 5


def test_the_parser_is_light() -> None:
    """`--help` and completion load no proxy, no backend and no metrics."""
    heavy = ("aiohttp", "uvloop", "prometheus_client", "shtab")
    code = f"import sys; from sidecar.cli import parser; parser(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
