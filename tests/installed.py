"""The wheel and the source archive, installed into empty environments of every Python that is here, run the demo; and
on each but our own the tests of what an event loop does with sockets and processes, which is another matter in each.

`python tests/installed.py` (`make installs`). Packages come at the locked versions, from wherever pip gets them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.11", "3.12", "3.13")
LIMIT_S = 300.0
TESTS_LIMIT_S = 900.0
TESTS = ("tests/unit/test_seam_frames.py", "tests/end_to_end/test_reload.py", "tests/end_to_end/test_workers.py")
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


def main() -> int:
    """The exit code: 0 where every demo ended with its usage table, and no test failed."""
    with tempfile.TemporaryDirectory(prefix="installed-") as name:
        scratch = Path(name)
        call(scratch, sys.executable, "-m", "hatchling", "build", "-d", str(scratch / "dist"), cwd=ROOT)
        [wheel] = (scratch / "dist").glob("*.whl")
        [archive] = (scratch / "dist").glob("*.tar.gz")
        found = list(pythons())
        if not found:
            print(f"no Python of {', '.join(VERSIONS)} with venv was found")
            return 1
        for number, (version, python) in enumerate(found):
            # The archive makes the same wheel (tests/test_packages.py): once is enough for that it installs.
            for what in (wheel, archive)[: 2 if number == 0 else 1]:
                began_s = time.monotonic()
                try_out(scratch / f"{version}-{what.suffix[1:]}", python, what)
                print(f"Python {version}: {what.name} runs the demo ({time.monotonic() - began_s:.0f} s)", flush=True)
            if version != ".".join(map(str, sys.version_info[:2])):
                began_s = time.monotonic()
                said = run_tests(scratch / f"{version}-whl")
                print(f"Python {version}: {said} ({time.monotonic() - began_s:.0f} s)", flush=True)
    return 0


def pythons() -> Iterator[tuple[str, str]]:
    """A Python of each version, tried by using it: on the path, or where pyenv keeps those that are not."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in VERSIONS:
        places = sorted(kept.glob(f"{version}.*/bin/python{version}"), reverse=True)
        for candidate in (f"python{version}", *map(str, places)):
            try:
                done = subprocess.run([candidate, "-c", "import ensurepip, venv"], capture_output=True, check=False)
            except OSError:
                continue
            if done.returncode == 0:
                yield version, candidate
                break
        else:
            print(f"Python {version} is not here: left out")


def try_out(place: Path, python: str, package: Path) -> None:
    """An environment with nothing in it but what the lock has and the package; an empty directory to run in."""
    call(place.parent, python, "-m", "venv", str(place))
    own = str(place / "bin" / "python")
    lock = ROOT / "requirements" / "run.lock"
    call(place, own, *PIP, "install", "--no-deps", "--require-hashes", "-r", str(lock))
    call(place, own, *PIP, "install", "--no-deps", "--no-index", "--no-build-isolation", str(package))
    (empty := place / "empty").mkdir()
    program = str(place / "bin" / "metering-sidecar")
    table = call(empty, program, "demo")
    if "total" not in table:
        raise SystemExit(f"{program} demo printed no usage table:\n{table}")
    pages = place / "share" / "doc" / "metering-sidecar"
    if str(pages) not in call(empty, program, "--help").replace("\n", ""):
        raise SystemExit(f"--help does not say that its pages are in {pages}")
    if not (place / "share" / "man" / "man1" / "metering-sidecar.1").exists():
        raise SystemExit("the man page is not installed")


def run_tests(place: Path) -> str:
    """Those of `TESTS`, with the sources that are here; what pytest said at the end."""
    own = str(place / "bin" / "python")
    lock = ROOT / "requirements" / "test.lock"
    call(place, own, *PIP, "install", "--no-deps", "--require-hashes", "-r", str(lock))
    call(place, own, *PIP, "install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", str(ROOT))
    said = call(place, own, "-m", "pytest", "-q", "-n", "2", *TESTS, cwd=ROOT, limit_s=TESTS_LIMIT_S)
    return said.splitlines()[-1]


def call(scratch: Path, *command: str, cwd: Path | None = None, limit_s: float = LIMIT_S) -> str:
    """What it printed; ends the program where it failed. No variable of ours and no clone is in its way."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SIDECAR_", "PYTHON")) and k != "COLUMNS"}
    env = {**kept, "COLUMNS": "500"}
    done = subprocess.run(
        command, cwd=cwd or scratch, env=env, capture_output=True, text=True, check=False, timeout=limit_s
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
