"""Imports only point down, and siblings do not import each other: the floors as one table.

Floor 0 is words, 1 thinking (no await, no files, no clock, no environment), 2 holding (one outside thing a file),
3 running (the loops), 4 the whole. A module belongs to the row with the longest name that fits it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "sidecar": 0,
    "sidecar.exchange": 0,
    "sidecar.record": 0,
    "sidecar.verdict": 0,
    "sidecar.settings": 0,
    "sidecar.balance": 0,
    "sidecar.patterns": 0,
    "sidecar.target": 0,
    "sidecar.proxy.rules": 0,
    "sidecar.delivery.words": 0,
    "sidecar.delivery.limits": 0,
    "sidecar.disk": 0,
    "sidecar.ids": 1,
    "sidecar.proxy.headers": 1,
    "sidecar.usage": 1,
    "sidecar.routes": 1,
    "sidecar.attribution": 1,
    "sidecar.meters": 1,
    "sidecar.delivery.window": 1,
    "sidecar.delivery.retry": 1,
    "sidecar.delivery.pace": 1,
    "sidecar.spool": 2,
    "sidecar.ledger": 2,
    "sidecar.backends": 2,
    "sidecar.proxy.upstream": 2,
    "sidecar.proxy.aiohttp_internals": 2,
    "sidecar.metrics": 2,
    "sidecar.log": 2,
    "sidecar.lock": 2,
    "sidecar.place": 3,
    "sidecar.delivery.state": 2,
    "sidecar.signals": 2,
    "sidecar.sockets": 2,
    "sidecar.certificates": 2,
    "sidecar.proxy": 3,
    "sidecar.recorder": 3,
    "sidecar.unclaimed": 3,
    "sidecar.gate": 3,
    "sidecar.delivery": 3,
    "sidecar.admin": 3,
    "sidecar.receiver": 3,
    "sidecar.scripted_llm": 3,
    "sidecar.app": 4,
    "sidecar.early": 4,
    "sidecar.parts": 4,
    "sidecar.billers": 4,
    "sidecar.billing": 4,
    "sidecar.offline": 4,
    "sidecar.traffic": 4,
    "sidecar.worker": 4,
    "sidecar.wire": 4,
    "sidecar.supervisor": 4,
    "sidecar.demo": 4,
    "sidecar.arrived": 4,
    "sidecar.cli": 4,
    "sidecar.__main__": 4,
}
OUTSIDE = {"os", "io", "time", "random", "secrets", "socket", "sqlite3", "asyncio", "threading", "pathlib", "aiohttp"}
SHARED_WORDS = {"sidecar.usage.RawHeaders"}  # a type alias that says how header fields are handed on
WAITS = (ast.Await, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith)


def part_of(module: str) -> str:
    """The row that a module belongs to; `sidecar` alone is no row for what is new and unnamed."""
    rows = [row for row in FLOORS if row != "sidecar" and (module == row or module.startswith(row + "."))]
    return max(rows, key=len, default="sidecar" if module == "sidecar" else "")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "sidecar").rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def for_types_only(tree: ast.Module) -> set[str]:
    """What stands under `if TYPE_CHECKING:` is a word for the reader, not a dependency."""
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {name for guard in guards for node in guard.body for name in imports(node)}


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_imports_point_down(module: str, path: Path) -> None:
    part = part_of(module)
    assert part, f"{module} has no floor: give it a row in FLOORS"
    tree = ast.parse(path.read_text())
    for name in sorted(set(imports(tree)) - for_types_only(tree) - SHARED_WORDS):
        if not name.startswith("sidecar."):
            continue
        other = part_of(name) or "sidecar"
        if other not in (part, "sidecar"):
            one_room = other.split(".")[1] == part.split(".")[1] or FLOORS[part] in (0, 4)
            down = FLOORS[other] < FLOORS[part] or (FLOORS[other] == FLOORS[part] and one_room)
            assert down, f"{module} (floor {FLOORS[part]}) imports {name} (floor {FLOORS[other]})"


@pytest.mark.parametrize(
    ("module", "path"), [pytest.param(m, p, id=m) for m, p in modules() if FLOORS.get(part_of(m)) == 1]
)
def test_thinking_touches_nothing_outside(module: str, path: Path) -> None:
    tree = ast.parse(path.read_text())
    outside = {name.split(".")[0] for name in imports(tree)} & OUTSIDE
    assert not outside, f"{module} is on floor 1 and imports {', '.join(sorted(outside))}"
    waits = [node for node in ast.walk(tree) if isinstance(node, WAITS)]
    assert not waits, f"{module} is on floor 1 and awaits in line {waits[0].lineno}"
