"""What the import contracts in pyproject.toml (`make lint`) cannot see: what a module touches, and whether it carries
its weight."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sidecar"

# Decide and touch nothing: no clock, no file, no loop, no environment. Time and chance come in as arguments, so a test
# is a table. A name stands for the module or for all of the package.
PURE = (
    "sidecar.backends.answers",
    "sidecar.backends.batching",
    "sidecar.backends.denials",
    "sidecar.delivery.circuit_breaker",
    "sidecar.delivery.dedup_window",
    "sidecar.delivery.limits",
    "sidecar.delivery.parking_log",
    "sidecar.delivery.retry_policy",
    "sidecar.delivery.types",
    "sidecar.gate.answers",
    "sidecar.gate.denials",
    "sidecar.gate.sources.signed_claim",
    "sidecar.gate.admission",
    "sidecar.gate.allowance",
    "sidecar.gate.counters",
    "sidecar.gate.estimate",
    "sidecar.gate.limits",
    "sidecar.gate.owner",
    "sidecar.gate.windows",
    "sidecar.ledger.lanes",
    "sidecar.ledger.questions",
    "sidecar.meters",
    "sidecar.model",
    "sidecar.prices.book",
    "sidecar.prices.compare",
    "sidecar.prices.custom",
    "sidecar.prices.entry",
    "sidecar.prices.facts",
    "sidecar.prices.litellm",
    "sidecar.prices.rates",
    "sidecar.proxy.borders",
    "sidecar.proxy.drains",
    "sidecar.proxy.ending",
    "sidecar.proxy.headers",
    "sidecar.proxy.local_responses",
    "sidecar.proxy.plain_head",
    "sidecar.proxy.plain_requests",
    "sidecar.proxy.plain_responses",
    "sidecar.proxy.redirects",
    "sidecar.proxy.response_parser",
    "sidecar.proxy.route",
    "sidecar.proxy.subscriber",
    "sidecar.spool.frames",
    "sidecar.spool.types",
    "sidecar.usage",
)
# A protocol may say that a method is awaited: there is no code in it that waits.
CONTRACTS = ("sidecar.model.delivery",)
OUTSIDE = {
    "aiohttp", "asyncio", "fcntl", "glob", "http", "io", "mmap", "multiprocessing", "os", "pathlib", "queue",
    "random", "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess",
    "tempfile", "threading", "time", "urllib3", "uvloop",
}  # fmt: skip
CLOCKS = frozenset({"datetime.now", "datetime.utcnow", "datetime.today", "date.today", "open"})
WAITS = (ast.Await, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith)

UNITS_MAX = 16  # packages and modules at the top of sidecar/: what a newcomer takes in at one look

LINES_MIN = 60
VENDORS = "usage/providers/"  # a vendor has a file there, however little it says
# Short files that are whole all the same, each with its reason. `__init__.py` is a package's door and is not counted.
SHORT = {
    "proxy/connecting.py": "both ways of a call import it, and one of them the other",
    "proxy/destinations.py": "pure: which upstream gets a call",
    "__main__.py": "Python wants it",
    "cli/completion.py": "a command has a file",
    "cli/demo.py": "a command has a file",
    "cli/receiver.py": "a command has a file",
    "delivery/dedup_window.py": "pure, with a table test",
    "delivery/limits.py": "every number of delivery with its origin; tests make them small",
    "delivery/parking_log.py": "pure, with a table test",
    "dev/mock_backends/replay.py": "what every stand-in answers to a repeat; used by all vendors",
    "ledger/lanes.py": "pure, and the same for ever: who writes records and who delivers them share it",
    "settings/given_file.py": "the settings, the headers of upstreams and the prices read by it",
    "settings/renewal.py": "pure, with a table test",
    "model/seldom.py": "used by all layers, so it stands under them",
    "proxy/route.py": "one of the two things a record says of a call beside who pays",
    "runtime/admin/answers.py": "what both ports answer with, under both of them",
    "runtime/certificates.py": "`check` asks it too, without the rest of start-up",
    "runtime/faults.py": "`check`, the start and a reload ask it, above the parts that judge",
    "runtime/signals.py": "the one place that takes signals for the loop",
    "runtime/unclaimed.py": "when an answer without a reader is said; with a test of its own",
    "spool/retention.py": "what goes and when is a policy of its own",
    "usage/estimate.py": "the one place that guesses",
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def belongs(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def test_every_name_of_the_pure_is_there() -> None:
    names = {module for module, _ in modules()}
    assert not [name for name in PURE if name not in names], "take the name off PURE, or put the new one there"


@pytest.mark.parametrize(
    ("module", "path"),
    [pytest.param(m, p, id=m) for m, p in modules() if any(belongs(m, name) for name in PURE)],
)
def test_what_decides_touches_nothing_outside(module: str, path: Path) -> None:
    tree = ast.parse(path.read_text())
    outside = {name.split(".")[0] for name in imported(tree)} & OUTSIDE
    assert not outside, f"{module} only decides, and imports {', '.join(sorted(outside))}"
    clocks = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in CLOCKS]
    assert not clocks, f"{module} only decides, and calls {ast.unparse(clocks[0].func)} in line {clocks[0].lineno}"
    if module not in CONTRACTS:
        waits = [node for node in ast.walk(tree) if isinstance(node, WAITS)]
        assert not waits, f"{module} only decides, and awaits in line {waits[0].lineno}"


def test_the_top_of_the_package_is_taken_in_at_one_look() -> None:
    units = [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file() or path.suffix == ".py"]
    assert len(units) - units.count("__init__.py") <= UNITS_MAX, sorted(units)


def hands_on(statement: ast.stmt) -> bool:
    """Whether this statement adds nothing: an import, a text, a second name, a class that only forwards."""
    match statement:
        case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]) | ast.Assign(value=ast.Name() | ast.Attribute()):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return all(hands_on(each) for each in statement.body)
        case ast.ClassDef(bases=[]):
            methods = [each for each in statement.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            own = [each for each in methods if each.name != "__init__"]
            return len(own) > 1 and all(forwards(each) for each in own)
    return False


def forwards(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """One line that calls another object's method with nothing but the method's own arguments."""
    body = [each for each in method.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    if len(body) != 1 or not isinstance(body[0], ast.Expr | ast.Return):
        return False
    call = body[0].value.value if isinstance(body[0].value, ast.Await) else body[0].value
    match call:
        case ast.Call(func=ast.Attribute(value=ast.Attribute(value=ast.Name(id="self")))):
            given = {each.arg for each in (*method.args.args, *method.args.kwonlyargs)}
            passed = [*call.args, *(each.value for each in call.keywords)]
            return all(isinstance(each, ast.Name) and each.id in given for each in passed)
    return False


@pytest.mark.parametrize("path", [pytest.param(p, id=m) for m, p in modules() if p.name != "__init__.py"])
def test_no_file_only_hands_on(path: Path) -> None:
    statements = ast.parse(path.read_text()).body
    assert not all(map(hands_on, statements)), "everything in it is said elsewhere: let its users go there"


def test_a_file_that_only_hands_on_would_be_found() -> None:
    forwarding = "class A:\n def c(self, d):\n  return self._b.c(d)\n async def e(self):\n  await self._b.e()\n"
    assert all(map(hands_on, ast.parse("'''why'''\nfrom a import b\n__all__ = ['b']\nc = b.d\n" + forwarding).body))
    assert not all(map(hands_on, ast.parse(forwarding.replace("c(d)\n", "c(d + 1)\n")).body))


def test_a_short_file_has_a_reason() -> None:
    short = {
        str(path.relative_to(PACKAGE))
        for _, path in modules()
        if path.name != "__init__.py" and len(path.read_text().splitlines()) < LINES_MIN
    }
    short = {name for name in short if not name.startswith(VENDORS)}
    assert short - set(SHORT) == set(), "put it where it is used, or say in SHORT why it stands alone"
    assert set(SHORT) - short == set(), "no longer short, or gone: take it off SHORT"


@pytest.mark.parametrize("path", [pytest.param(p, id=m) for m, p in modules()])
def test_the_formatter_is_only_told_to_leave_tables_alone(path: Path) -> None:
    text = path.read_text()
    skipped = {number for number, line in enumerate(text.splitlines(), 1) if line.endswith("# fmt: skip")}
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {line for each in functions for line in range(each.lineno, (each.end_lineno or 0) + 1)}
    assert not skipped & inside, f"let `ruff format` have lines {sorted(skipped & inside)}"
