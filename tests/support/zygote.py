"""The process that forks children which kill themselves: one order a line, one answer a line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson

TESTS = Path(__file__).parent.parent


class Zygote:
    """The process that forks the children."""

    def __init__(self, child: str = "delivery_child.py") -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "support" / child)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=TESTS.parent,
            env={"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "PATH": "/usr/bin:/bin"},
        )

    def run(self, **order: Any) -> tuple[int, dict[str, Any] | None]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(orjson.dumps(order) + b"\n")
        self._process.stdin.flush()
        answer = orjson.loads(self._process.stdout.readline())
        return answer["code"], answer["result"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(10) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()
