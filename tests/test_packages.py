"""Wheel and source archive: the same bytes from the same sources, with what a reader of them needs."""

from __future__ import annotations

import email
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from sidecar import __version__

ROOT = Path(__file__).parent.parent
SOURCES = (
    "sidecar",
    "tests",
    "config",
    "docs",
    "requirements",
    "LICENSE",
    "Makefile",
    "pyproject.toml",
    "hatch_build.py",
)
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.pyc", "results", "demo-data")
EPOCH = "1764374400"
spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
assert spec is not None
assert spec.loader is not None
hatch_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hatch_build)


def copied(to: Path) -> Path:
    to.mkdir(parents=True)
    for name in (*SOURCES, *(page.name for page in ROOT.glob("*.md"))):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=LEFT_BEHIND)
        else:
            shutil.copy(source, to / name)
    return to


def built(source: Path, **more: str) -> dict[str, Path]:
    env = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH, **more}
    subprocess.run([sys.executable, "-m", "hatchling", "build"], cwd=source, env=env, capture_output=True, check=True)
    return {path.suffix: path for path in (source / "dist").iterdir()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return built(copied(tmp_path_factory.mktemp("first") / "here"))


def test_the_same_sources_make_the_same_bytes(first: dict[str, Path], tmp_path: Path) -> None:
    """In another directory, at another time, with other permissions and another order of the files on the disk."""
    other = copied(tmp_path / "somewhere" / "else")
    for path in sorted(other.rglob("*"), reverse=True):
        os.utime(path, (time.time() - 1e7, time.time() - 1e7))
        path.chmod(0o700 if path.is_dir() else 0o600)
    again = built(other, TZ="Asia/Kathmandu", LC_ALL="C")
    assert {kind: digest(path) for kind, path in again.items()} == {kind: digest(path) for kind, path in first.items()}


def test_the_source_archive_makes_the_same_wheel(first: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(first[".gz"]) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    assert digest(built(unpacked)[".whl"]) == digest(first[".whl"])


def test_the_wheel_brings_the_pages_along(first: dict[str, Path]) -> None:
    names = zipfile.ZipFile(first[".whl"]).namelist()
    shared = {name.partition(".data/data/")[2] for name in names if ".data/data/" in name}
    assert "share/man/man1/metering-sidecar.1" in shared
    pages = {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(p for p in (ROOT / "config").rglob("*") if p.is_file()),
    }
    assert {f"share/doc/metering-sidecar/{page.relative_to(ROOT)}" for page in pages} <= shared
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name]


def test_no_link_on_a_registrys_page_leads_nowhere(first: dict[str, Path], tmp_path: Path) -> None:
    """The page has no files beside it: a link is absolute there, or it is none."""
    text = (ROOT / "README.md").read_text()
    made = ""
    for pages in ("", "https://git.example.com/x/blob/v1/"):
        made = hatch_build.for_a_registry(text, pages)
        links = re.findall(r"\]\(([^)\s]+)\)", made)
        assert all(link.startswith("https://") for link in links)
        assert "<img" not in made
        assert bool(pages) == any(link.startswith("https://git.example.com/x/blob/v1/docs/") for link in links)
    assert "https://git.example.com/x/blob/v1/README.md#who-pays" in made
    assert "//docs" not in made.replace("https://", "")
    wheel = zipfile.ZipFile(first[".whl"])
    described = email.message_from_bytes(wheel.read(f"metering_sidecar-{__version__}.dist-info/METADATA"))
    assert described["Description-Content-Type"] == "text/markdown"
    body = described.get_payload(decode=True)
    assert isinstance(body, bytes)
    assert body.decode() == hatch_build.for_a_registry(text, "")  # no address is made up


@pytest.mark.parametrize(
    ("link", "without"),
    [
        ("[docs/gate.md](docs/gate.md)", "docs/gate.md"),
        ("[the gate](docs/gate.md#limits)", "the gate (`docs/gate.md#limits`)"),
        ("[Who pays](#who-pays)", "Who pays"),
        ("[elsewhere](https://example.com)", "[elsewhere](https://example.com)"),
    ],
)
def test_a_link_without_an_address_is_words(link: str, without: str) -> None:
    assert hatch_build.for_a_registry(link, "") == without


def test_the_image_is_built_from_what_the_package_is_built_from() -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    taken = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied_in = {
        word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", recipe, re.MULTILINE) for word in line.split()
    }
    assert copied_in == taken
    shared = re.findall(r'^"([^"]+)" = "share/', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for name in shared:
        assert name.split("/")[0] in taken or (name.endswith(".md") and "*.md" in taken), name
    # A base is named by its digest from outside: one that is written down here would miss its security fixes.
    assert re.findall(r"^FROM (\S+)", recipe, re.MULTILINE) == ["${BASE}", "${BASE}"]
    assert "@sha256:" in recipe
    locked = re.findall(r"^([a-z-]+)==", (ROOT / "requirements/run.lock").read_text(), re.MULTILINE)
    gone = re.search(r"pip uninstall --yes (.*) pip ", recipe)
    assert gone is not None
    assert set(gone[1].split()) <= set(locked), "the recipe takes away what is not there"


def test_the_image_has_the_drivers_of_a_fleet_as_they_are_tested() -> None:
    locked = {name: set((ROOT / f"requirements/{name}.lock").read_text().splitlines()) for name in ("fleet", "test")}
    signing = {"nkeys", "pynacl", "cffi", "pycparser"}  # of the client of NATS, for keys and `.creds` files
    found = {line.split("==")[0] for line in locked["fleet"] if "==" in line}
    assert found == {"asyncpg", "nats-py", *signing}
    assert locked["fleet"] <= locked["test"]
    assert "-r requirements/fleet.lock" in (ROOT / "Dockerfile").read_text()
