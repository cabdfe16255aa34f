"""Expressions over properties, in CEL (the Common Expression Language), through a library in Rust.

An expression is compiled once and tried at the start on sample values, so that a misspelt name or an operation between
two types that CEL does not mix (`input_tokens * 1.5`; write `double(input_tokens) * 1.5`) is a fault of the
configuration, not a silent absence of events. On a record, what needs a property that the record does not know gives
None: no value, no event. What cannot be computed although everything is known (a division by zero) is a `Failure`.

The library bounds the depth of an expression and nothing else, so what could run for long is refused here: see the
limits below. Decimals are computed in binary floating point, as CEL has it; `exact` says which decimal is billed.

The package brings a command line along that loads 400 modules when the package is imported: its extension module is
loaded by itself instead.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from itertools import pairwise
from typing import Any, Final

from sidecar.meters.hourly import read_amount
from sidecar.meters.properties import DIMENSION, FLAGS, TEXTS, WHOLE, Value, Vocabulary, reader_of
from sidecar.model.record import Record

log = logging.getLogger(__name__)

EXPRESSION_CHARS_MAX: Final = 1000  # far above what a price needs; parsing is not linear
# One macro (map, filter, all, exists, exists_one) runs over a list that is written down, so at most 500 steps. A second
# one inside would multiply that, and two in a row can double a text as often as they stand there.
MACROS_MAX: Final = 1
# The library compiles a regular expression each time: 50 µs, and 0.5 ms for each class such as `\w`, times the counts.
MATCHES_MAX: Final = 4
PATTERN_COST_MAX: Final = 20
PLACES: Final = Decimal(1).scaleb(-24)  # behind the point, as in every amount
WHOLE_MAX: Final = 2**53  # up to here a double holds every whole number

_PLAIN_MIN: Final = 1e-9  # from here on 15 digits end before the 24th place
_PLAIN_MAX: Final = 1e15  # up to here they are all of a whole number
_BEYOND: Final = "a number is beyond 64 bits"  # the library would make a double of it

MACROS: Final = frozenset({"map", "filter", "all", "exists", "exists_one"})
FUNCTIONS: Final = (
    "size", "contains", "startsWith", "endsWith", "matches", "int", "uint", "double", "string", "bytes", "dyn", "type",
    "timestamp", "duration", "getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear",
    "getHours", "getMinutes", "getSeconds", "getMilliseconds",
)  # fmt: skip
_MISSING: Final = (
    "needs the CEL library, which is not installed: pip install common-expression-language. It has wheels for Linux "
    "with glibc and for macOS; elsewhere (Alpine, musl) it is built with Rust"
)
_OUTSIDE: Final = "it names what there is not"
_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
_TOKEN: Final = re.compile(
    r"""(?P<space>\s+|//[^\n]*)
    |(?P<text>(?:[rR][bB]?|[bB][rR]?)?(?:'''.*?'''|\"\"\".*?\"\"\"|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"))
    |(?P<name>[A-Za-z_]\w*)|(?P<number>[0-9][\w.]*)|(?P<sign>.)""",
    re.VERBOSE | re.DOTALL,
)
_UNDEFINED: Final = re.compile(r"Undefined variable or function: '(\w+)'")
_COUNTED: Final = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_SAMPLES_MAX: Final = 40


class ExpressionError(ValueError):
    """The expression cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an expression gives no number for a record that knows all it reads."""

    reason: str


Result = int | Decimal | Failure | None


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression. Two are equal when their texts are."""

    text: str
    names: tuple[str, ...] = field(compare=False)  # the properties it reads
    _execute: Callable[[Mapping[str, Any]], Any] = field(compare=False, repr=False)
    _readers: tuple[tuple[str, Callable[[Record], Value]], ...] = field(compare=False, repr=False)
    _told: set[str] = field(default_factory=set, compare=False, repr=False)
    failed: Callable[[], None] | None = field(default=None, compare=False, repr=False)  # told of each value lacking

    def value(self, record: Record) -> int | Decimal | None:
        """The quantity, or None where something it needs is not known or cannot be computed; the latter is logged,
        once for each reason."""
        return self._told_of(self.result(record), record.id)

    def values(self, rows: Iterable[Mapping[str, Any]]) -> list[int | Decimal]:
        """The quantities of several records, as `of` takes them, in any order and without those that have none.

        What `of` and `exact` do, for many at once: a plain double is written and read as a decimal by the batch.
        """
        execute, plain, found = self._execute, list[float](), list[int | Decimal]()
        for row in rows:
            for value in row.values():
                if type(value) is int and not _INT64_MIN <= value <= _INT64_MAX:
                    result: Result = Failure(_BEYOND)
                    break
            else:
                try:
                    number = execute(row)
                except BaseException as error:  # noqa: BLE001 - `_failed` raises what is none of ours
                    result = self._failed(error)
                else:
                    if type(number) is float and _PLAIN_MIN <= number < _PLAIN_MAX:
                        plain.append(number)
                        continue
                    result = _taken(number)
            if (told := self._told_of(result, None)) is not None:
                found.append(told)
        found += map(Decimal, ("%.15g " * len(plain) % tuple(plain)).split())
        return found

    def _told_of(self, found: Result, record_id: str | None) -> int | Decimal | None:
        if not isinstance(found, Failure):
            return found
        if self.failed is not None:
            self.failed()
        if found.reason not in self._told:
            self._told.add(found.reason)
            log.warning(
                "an expression gives no number for some records, and nothing is added for them: %s",
                found.reason,
                extra={"expression": self.text, "record": record_id},
            )
        return None

    def result(self, record: Record) -> Result:
        """The same with the reason why it cannot be computed."""
        values: dict[str, Any] = {}
        for name, read in self._readers:
            value = read(record)
            if value is not None:
                values[name] = float(value) if type(value) is Decimal else value
        return self.of(values)

    def of(self, values: Mapping[str, Any]) -> Result:
        """Of property values, as CEL has them: no decimals, and nothing where a value is not known."""
        for value in values.values():
            if type(value) is int and not _INT64_MIN <= value <= _INT64_MAX:
                return Failure(_BEYOND)
        try:
            found = self._execute(values)
        except BaseException as error:  # noqa: BLE001 - `_failed` raises what is none of ours
            return self._failed(error)
        return _taken(found)

    def _failed(self, error: BaseException) -> Failure | None:
        """What is no fault of an expression, or inside the library, is raised again."""
        if type(error).__name__ == "PanicException":  # of the library: no reason to stop
            return Failure("the CEL library failed")
        if not isinstance(error, (ArithmeticError, TypeError, ValueError, LookupError, RuntimeError)):
            raise error
        undefined = _UNDEFINED.match(str(error))
        if undefined is not None and undefined[1] in self.names:
            return None
        return Failure(_reason(error))


def _taken(found: object) -> Result:
    """What the library gave, as it is billed."""
    if type(found) is int:
        return found
    if type(found) is float:
        amount = exact(found)
        return Failure(f"{found:g} is no amount") if amount is None else amount
    return Failure(f"it gives {_kind_of(found)}, no number")


def exact(value: float) -> Decimal | None:
    """The decimal that a double is billed as: whole numbers as they are, all others with 15 significant digits, which
    is what any double keeps of a decimal (so 0.1 + 0.2 is 0.3), and at most 24 behind the point. None: no amount."""
    if not math.isfinite(value):
        return None
    if value.is_integer() and -WHOLE_MAX <= value <= WHOLE_MAX:
        return Decimal(int(value))
    amount = Decimal(f"{value:.15g}")
    if _PLAIN_MIN <= abs(value) < WHOLE_MAX:
        return amount
    if amount.as_tuple().exponent < -24:  # type: ignore[operator]  # it is finite
        amount = amount.quantize(PLACES, rounding=ROUND_HALF_EVEN)
    return read_amount(amount.normalize())


def compile_expression(text: str, vocabulary: Vocabulary | None = None) -> Expression:
    """Raises `ExpressionError` for what cannot be parsed, reads unknown names, could run for long, or gives no number.

    `vocabulary`: the properties that there are; without one, every name that could be a dimension's or a unit's is.
    """
    if len(text) > EXPRESSION_CHARS_MAX:
        raise ExpressionError(f"is longer than {EXPRESSION_CHARS_MAX} characters")
    library = _library()
    try:
        program = library.compile(text)
    except ValueError as error:
        raise ExpressionError(f"cannot be read{_place(str(error))}") from None
    known = vocabulary or Vocabulary()
    tokens = [match for match in _TOKEN.finditer(text) if match.lastgroup != "space"]
    bound = _bounded(tokens)
    names = tuple(name for name in program.variables() if name not in bound or known.knows(name))
    for name in names:
        if not known.knows(name):
            raise ExpressionError(f"reads {name}, which no record has{known.suggestion(_whole_name(name, tokens))}")
    for name in program.functions():
        if name[0].isalpha() and name not in FUNCTIONS:
            raise ExpressionError(f"uses {name}(), which is no function; there are {', '.join(FUNCTIONS[:8])} and more")
    expression = Expression(text, names, program.execute, tuple((name, reader_of(name)) for name in names))
    _try(expression, tokens)
    return expression


def _whole_name(name: str, tokens: Sequence[re.Match[str]]) -> str:
    """With the member that is asked of it: `units.rows` for `units`."""
    for at, token in enumerate(tokens[:-2]):
        if token[0] == name and tokens[at + 1][0] in (".", "["):
            return f"{name}.{tokens[at + 2][0]}"
    return name


def _bounded(tokens: Sequence[re.Match[str]]) -> set[str]:
    """The names that macros give to the elements; raises `ExpressionError` where the expression could run for long."""
    bound: set[str] = set()
    macros = matches = 0
    for at, (before, token) in enumerate(pairwise(tokens), 1):
        called = at + 1 < len(tokens) and tokens[at + 1][0] == "("
        if called and before[0] == "." and token[0] in MACROS:
            macros += 1
            if at + 2 < len(tokens):
                bound.add(tokens[at + 2][0])
        elif called and token[0] == "matches":
            matches += 1
            _check_pattern(tokens[at + 2 : at + 4] if before[0] == "." else ())
    if tokens and tokens[0][0] == "matches":
        _check_pattern(())
    if macros > MACROS_MAX:
        raise ExpressionError(
            f"has {macros} of {', '.join(sorted(MACROS))}: at most {MACROS_MAX}, so that it stays quick"
        )
    if matches > MATCHES_MAX or (matches and macros):
        raise ExpressionError(
            f"has too many matches(): at most {MATCHES_MAX}, and none beside a macro such as exists()"
        )
    return bound


def _check_pattern(arguments: Sequence[re.Match[str]]) -> None:
    if len(arguments) < 2 or arguments[0].lastgroup != "text" or arguments[1][0] != ")":
        raise ExpressionError("has a pattern that is not written down: write it as model.matches('^gpt-5.*')")
    pattern = arguments[0][0]
    counts = math.prod(max(int(low), int(high or low), 1) for low, high in _COUNTED.findall(pattern))
    if (pattern.count("\\") + pattern.count(".") + pattern.count("[") + 1) * counts > PATTERN_COST_MAX:
        raise ExpressionError(
            f"has a pattern that costs too much on every call, {pattern[:100]}: at most {PATTERN_COST_MAX} classes, "
            "times the counts in { }; startsWith(), endsWith() and contains() cost a hundredth"
        )


def _try(expression: Expression, tokens: Sequence[re.Match[str]]) -> None:
    """Raises `ExpressionError` unless it gives a number for some sample, and nothing else but a number for any."""
    numbers = 0
    for values in _samples(expression.names, tokens):
        found = expression.of(values)
        if isinstance(found, (int, Decimal)):
            numbers += 1
        elif found is None or found.reason == _OUTSIDE:
            raise ExpressionError("names an element of a list outside of its macro, or something that is no property")
        elif "number" in found.reason or "types" in found.reason or "pattern" in found.reason:
            raise ExpressionError(
                f"gives no number ({found.reason}; CEL does not mix whole and decimal numbers: use double(…) or int(…))"
            )
    if not numbers:
        raise ExpressionError("gives no number for any of the samples it was tried with")


def _samples(names: Sequence[str], tokens: Sequence[re.Match[str]]) -> Iterator[dict[str, Any]]:
    """Values of the right types: some numbers, and the texts that the expression speaks of."""
    texts = [token[0].strip("'\"") for token in tokens if token.lastgroup == "text"]
    for number, flag in ((7, True), (7, False), (0, True), (1, False), (200, True), (10**6, False)):
        yield {name: _sample(name, number, "7", flag) for name in names}
    for text in dict.fromkeys(texts[:_SAMPLES_MAX]):
        yield {name: _sample(name, 7, text, True) for name in names}


def _sample(name: str, number: int, text: str, flag: bool) -> object:
    if name in TEXTS or name.startswith(DIMENSION):
        return text
    if name in FLAGS:
        return flag
    return number if name in WHOLE else float(number)


def _kind_of(found: object) -> str:
    if isinstance(found, bool):
        return "true or false"
    return {str: "a text", type(None): "null", list: "a list", dict: "a map"}.get(type(found), type(found).__name__)


def _reason(error: Exception) -> str:
    """In few words, of a known set: they are logged and stored."""
    text = str(error)
    if isinstance(error, ZeroDivisionError):
        return "division by zero"
    if isinstance(error, OverflowError):
        return "overflow: beyond 64 bits"
    if isinstance(error, LookupError):
        return "a list or a map has no such element"
    if "not a valid regex" in text:
        return "a pattern is no regular expression"
    if "parse error" in text or "Parsing Error" in text or "premature end" in text:
        return "a text does not say what it is turned into"
    if isinstance(error, UnicodeError):
        return "a text is no Unicode"
    if "Undefined variable or function" in text:
        return _OUTSIDE
    if isinstance(error, TypeError):
        return "the types do not go together"
    return f"it failed ({type(error).__name__})"


def _place(said: str) -> str:
    found = re.search(r"<input>:(\d+):(\d+): ?([^\n]*)", said)
    if found is None:
        return ""
    column = "" if found[2] == "0" and found[1] == "0" else f" near line {found[1]}, column {found[2]}"
    return f"{column}: {found[3][:100]}" if found[3] else column


@cache
def _library() -> Any:
    """The extension module of the package `cel`, without the package's own imports."""
    name = "cel.cel"
    if name in sys.modules:
        return sys.modules[name]
    package = find_spec("cel")
    spec = PathFinder.find_spec(name, None if package is None else package.submodule_search_locations)
    if package is None or spec is None or spec.loader is None:
        raise ExpressionError(_MISSING)
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ExpressionError(f"cannot load the CEL library: {error}") from None
    if not hasattr(module, "compile"):
        raise ExpressionError(_MISSING)
    sys.modules[name] = module
    return module
