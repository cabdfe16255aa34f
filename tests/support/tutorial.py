"""Runs what a tutorial shows, as its reader would type it, and compares what it prints.

The convention, for pages in `docs/tutorials` and for README blocks that are marked so:

- A fenced block ```` ```console ```` is a terminal. A line that begins with `$ ` is typed; the lines below it are what
  it prints, exactly, but that `…` stands for anything on a line, a line that is only `…` for any lines, and blanks that
  line a table up do not count. Nothing below a command means that nobody looks at what it prints.
- A command that ends with ` &` goes on in the background until the page is over. What stands below it is waited for.
- A fenced block with a title (```` ```toml title="sidecar.toml" ````) is a file in the directory where it is typed.
- `export NAME=value` holds for what follows.
- Ports on 127.0.0.1 stand in the page as a reader would have them; here each becomes a free one, the same throughout.
- Where a table fills up a moment after a call, the command is repeated until it prints what is shown, within a limit.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.ports import free_port

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
PORT = re.compile(r"(?<=127\.0\.0\.1:)(\d{4,5})\b|(?<=\"127\.0\.0\.1\", )(\d{4,5})\b|(?<=http\.server )(\d{4,5})\b")
COMMAND_S = 60.0  # one command, on a busy machine
PRINTS_S = 30.0  # until it prints what is shown: records reach the ledger and a backend within a second or two
STEP_S = 0.1


@dataclass(frozen=True, slots=True)
class Step:
    """A file to write (`name`), or a command to type and what it prints."""

    text: str
    name: str | None = None
    prints: tuple[str, ...] = ()


class TutorialError(AssertionError):
    """What is shown is not what happens."""


def steps(page: str) -> Iterator[Step]:
    """In the order of the page."""
    for language, title, body in BLOCK.findall(page):
        if title:
            yield Step(body, title)
        elif language == "console":
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                first, *rest = part.replace("\\\n", "").rstrip("\n").split("\n")
                yield Step(first.strip(), prints=tuple(line.rstrip() for line in rest))


def fits(shown: tuple[str, ...], printed: str) -> bool:
    """Whether what was printed is what is shown."""
    lines = ["…" if line.strip() == "…" else " ".join(line.split()) for line in shown if line.strip()]
    pattern = ""
    for line in lines:
        pattern += r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + r"\n"
    said = "".join(" ".join(line.split()) + "\n" for line in printed.splitlines() if line.strip())
    return re.fullmatch(pattern, said) is not None


class Terminal:
    """A directory, an environment, and what runs in the background. To be closed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "work"
        self.directory.mkdir()
        self._ports: dict[str, str] = {}
        self._held: list[socket.socket] = []
        self._background: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []
        programs = directory / "bin"
        programs.mkdir()
        for name, more in (("metering-sidecar", "-m sidecar "), ("python3", "")):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {more}"$@"\n')
            program.chmod(0o755)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SIDECAR_")}
        self.environ = {
            **kept,
            "PATH": f"{programs}:{kept['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(directory),
            "COLUMNS": "200",
            "SIDECAR_LOG_FORMAT": "text",  # as on a terminal
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def run(self, page: str) -> int:
        """All of it; how many commands that was."""
        count = 0
        for step in steps(page):
            if step.name is not None:
                (self.directory / step.name).write_text(self._here(step.text))
                continue
            count += 1
            if step.text.startswith("export "):
                name, _, value = shlex.split(step.text)[1].partition("=")
                self.environ[name] = value
            elif step.text.endswith(" &"):
                self._start(step)
            else:
                self._type(step)
        return count

    def _type(self, step: Step) -> None:
        until_s = time.monotonic() + PRINTS_S
        while True:
            done = subprocess.run(
                ["bash", "-c", self._here(step.text)],
                cwd=self.directory,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=COMMAND_S,
                check=False,
            )
            printed = self._there(done.stdout.decode())
            if fits(step.prints, printed) if step.prints else done.returncode == 0:
                return
            if time.monotonic() > until_s or _changes(step.text):
                parts = (f"$ {step.text}\nended with {done.returncode} and printed", printed, "shown is", *step.prints)
                raise TutorialError("\n".join((*parts, self._said())))
            time.sleep(STEP_S)

    def _start(self, step: Step) -> None:
        command = "exec " + self._here(step.text.removesuffix(" &"))
        for held in self._held:
            held.close()
        self._held.clear()
        log = self.directory.parent / f"background-{len(self._logs)}.log"
        self._logs.append(log)
        with log.open("wb") as out:
            self._background.append(
                subprocess.Popen(
                    ["bash", "-c", command],
                    cwd=self.directory,
                    env=self.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )
        until_s = time.monotonic() + PRINTS_S
        while not fits(("…", *step.prints, "…"), printed := self._there(log.read_text())):
            if time.monotonic() > until_s or self._background[-1].poll() is not None:
                raise TutorialError(f"$ {step.text}\nprinted\n{printed}\nshown is\n" + "\n".join(step.prints))
            time.sleep(STEP_S)

    def _here(self, text: str) -> str:
        return PORT.sub(lambda found: self._free(found[0]), text)

    def _there(self, text: str) -> str:
        for shown, used in self._ports.items():
            text = text.replace(f":{used}", f":{shown}")
        return text

    def _free(self, shown: str) -> str:
        if shown not in self._ports:
            sock = socket.create_server(("127.0.0.1", free_port()))
            self._held.append(sock)  # until something is started, so that no two are the same
            self._ports[shown] = str(sock.getsockname()[1])
        return self._ports[shown]

    def _said(self) -> str:
        return "\n".join(f"--- {log.name}\n{self._there(log.read_text())}" for log in self._logs)

    def close(self) -> None:
        """End what runs in the background, the last first."""
        for sock in self._held:
            sock.close()
        for process in reversed(self._background):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(COMMAND_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _changes(command: str) -> bool:
    """Whether a repeat would be another call, or find a file that is there already."""
    calls = "curl" in command and "_received" not in command
    return calls or any(word in command for word in ("redrive", "cancel", ">"))
