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
    "sidecar.model.exchange": 0,
    "sidecar.model.record": 0,
    "sidecar.model.delivery": 0,
    "sidecar.settings": 0,
    "sidecar.model.balance": 0,
    "sidecar.model.path_pattern": 0,
    "sidecar.model": 0,
    "sidecar.proxy.config": 0,
    "sidecar.delivery.types": 0,
    "sidecar.delivery.limits": 0,
    "sidecar.storage": 0,
    "sidecar.model.record_id": 1,
    "sidecar.proxy.headers": 1,
    "sidecar.usage": 1,
    "sidecar.proxy.route": 1,
    "sidecar.proxy.subscriber": 1,
    "sidecar.meters": 1,
    "sidecar.delivery.dedup_window": 1,
    "sidecar.delivery.retry_policy": 1,
    "sidecar.delivery.circuit_breaker": 1,
    "sidecar.spool": 2,
    "sidecar.ledger": 2,
    "sidecar.backends": 2,
    "sidecar.proxy.upstream": 2,
    "sidecar.proxy.aiohttp_compat": 2,
    "sidecar.runtime.metrics": 2,
    "sidecar.runtime.logging": 2,
    "sidecar.runtime.instance_lock": 2,
    "sidecar.runtime.directory_identity": 3,
    "sidecar.delivery.state": 2,
    "sidecar.runtime.signals": 2,
    "sidecar.storage.sockets": 2,
    "sidecar.runtime.certificates": 2,
    "sidecar.proxy": 3,
    "sidecar.spool.recorder": 3,
    "sidecar.runtime.unclaimed": 3,
    "sidecar.gate": 3,
    "sidecar.delivery": 3,
    "sidecar.runtime.admin": 3,
    "sidecar.dev.mock_backends": 3,
    "sidecar.dev.mock_llm": 3,
    "sidecar.runtime.app": 4,
    "sidecar.runtime.early": 4,
    "sidecar.runtime.factory": 4,
    "sidecar.runtime.backend_factory": 4,
    "sidecar.runtime.billing": 4,
    "sidecar.runtime.offline": 4,
    "sidecar.runtime.intake": 4,
    "sidecar.runtime.intake_worker": 4,
    "sidecar.runtime.ipc": 4,
    "sidecar.runtime.supervisor": 4,
    "sidecar.runtime": 4,
    "sidecar.dev": 4,
    "sidecar.dev.demo": 4,
    "sidecar.dev.summary": 4,
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
