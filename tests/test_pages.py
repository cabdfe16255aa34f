"""What is written for contributors is true: links lead somewhere, files that are named exist, commands run in CI."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:sidecar|tests|docs|config|requirements)(?:/[\w.-]+)+/?|[A-Z]+\.md|pyproject\.toml|\.ci/run)`")
DRAWN = re.compile(r"(?<![\w./-])(?:sidecar|tests)(?:/\w+)+(?:\.py|/(?!\S))")  # in figures and code, without quotes
FENCE = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)

# Named in pages and not there yet: to go with the work that brings them.
PENDING: set[str] = set()
MADE = {"tests/bench/results/"}  # by the commands that write them
# What CI runs by itself, and what takes too long for each change and is run before a release.
IN_CI = {"lint", "test", "system", "installs"}
BEFORE_A_RELEASE = {"crash", "fuzz", "bench", "soak"}
WHILE_WORKING = {"format", "readme", "man", "manifests", "lock", "screenshots"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The places of a page that a link may lead to, in the form that forges make of headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "")).strip().lower().replace(" ", "-") for head in heads}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if re.match(r"https?://", link):
            continue
        name, _, place = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not place or place in anchors(target), f"{page.name} links to {link}: no such heading"


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    missing = {name for name in {*NAMED.findall(text), *DRAWN.findall(text)} if not (ROOT / name).exists()}
    assert not missing - PENDING - MADE


def test_what_is_pending_is_not_there_yet() -> None:
    assert not [name for name in PENDING if (ROOT / name).exists()], "take it off PENDING"


@pages
def test_a_page_names_nothing_of_a_machine(page: Path) -> None:
    """A path of somebody's own disk, or of a place beside the repository, is nothing that a reader has."""
    assert not re.findall(r"(?<![\w.])(?:/home/\w|/Users/|~/)", page.read_text())


def commands(page: str) -> list[list[str]]:
    blocks = FENCE.findall((ROOT / page).read_text())
    return [words for block in blocks for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/releasing.md"])
def test_every_command_is_a_target_of_make(page: str) -> None:
    found = commands(page)
    assert found
    for words in found:
        assert words[0] == "make", words
        assert words[1] in targets(), words


def test_what_has_to_pass_is_what_ci_runs() -> None:
    in_ci = set(re.findall(r"^make ([a-z]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert in_ci == IN_CI
    first, *_ = FENCE.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert {line.split()[1] for line in first.splitlines()} == in_ci
    named = {words[1] for words in commands("CONTRIBUTING.md")}
    assert named == IN_CI | WHILE_WORKING | BEFORE_A_RELEASE, "a command that nobody runs does not stay true"
    assert {words[1] for words in commands("docs/releasing.md")} == IN_CI | BEFORE_A_RELEASE


def test_what_make_test_leaves_out_make_system_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (servers,) = re.findall(r"^SERVERS := (.*)$", makefile, re.MULTILINE)
    (alone,) = re.findall(r"^ALONE := (.*)$", makefile, re.MULTILINE)
    marked = "pytest.mark." + "server"
    files = [path for path in (ROOT / "tests").glob("*/test_*.py") if marked in path.read_text()]
    assert servers.split() == [str(path.relative_to(ROOT)) for path in sorted(files)]
    assert all((ROOT / path).is_file() for path in alone.split())


def test_hooks_call_tools_that_make_calls_and_fetch_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [each["repo"] for each in config["repos"]] == ["local"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in config["repos"][0]["hooks"]:
        tool, *arguments = shlex.split(hook["entry"])
        command = " ".join([Path(tool).name, *(word for word in arguments if word != "--force-exclude")])
        assert f"$(BIN)/{command}" in makefile, f"`make lint` does not run {command}"


def test_each_word_has_one_meaning() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = rows[2:]  # behind the head of the table
    assert len(words) == len(set(words)) > 40
    assert words == sorted(words), "the glossary is in the order of the alphabet"


def test_decisions_are_numbered_and_tell_the_same_things() -> None:
    found = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in found] == list(range(1, len(found) + 1))
    for page in found:
        text = page.read_text()
        assert text.startswith(f"# {int(page.name[:4])}. ")
        for part in ("**Context.**", "**Decision.**", "**Consequences.**"):
            assert part in text, f"{page.name} lacks {part}"
