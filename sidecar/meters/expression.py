"""Expressions over properties, in CEL (the Common Expression Language), through the `cel-python` library.

The library is an extra and is loaded only when a meter uses an expression. An expression is compiled once
and tried at the start on sample values, so that a misspelt name or an operation between two types that CEL
does not mix (`input_tokens * 1.5`; write `double(input_tokens) * 1.5`) is a fault of the configuration, not
a silent absence of events. On a record, whatever cannot be computed gives None: no value, no event.

Its regular expressions run in RE2, so none of them can be made to run for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import import_module
from typing import Any, Final

from sidecar.meters.hourly import read_amount
from sidecar.meters.properties import DIMENSION, FLAGS, TEXTS, WHOLE, Value, is_property, value_of
from sidecar.model.record import Record

EXPRESSION_CHARS_MAX: Final = 1000  # far above what a price needs; parsing is not linear


class ExpressionError(ValueError):
    """The expression cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression. Two are equal when their texts are."""

    text: str
    names: tuple[str, ...] = field(compare=False)  # the properties it reads
    _program: Any = field(compare=False, repr=False)
    _library: Any = field(compare=False, repr=False)

    def value(self, record: Record) -> int | Decimal | None:
        """The quantity, or None where something it needs is not known or cannot be computed."""
        found = {name: value_of(record, name) for name in self.names}
        return self._evaluate({name: value for name, value in found.items() if value is not None})

    def _evaluate(self, values: dict[str, Value]) -> int | Decimal | None:
        wrapped = {name: _wrap(self._library.celtypes, value) for name, value in values.items()}
        try:
            result = self._program.evaluate(wrapped)
        except (self._library.CELEvalError, ArithmeticError, TypeError, ValueError):
            return None
        return _unwrap(self._library.celtypes, result)


def compile_expression(text: str) -> Expression:
    """Raises `ExpressionError` for what cannot be parsed, reads unknown names, or gives no number."""
    if len(text) > EXPRESSION_CHARS_MAX:
        raise ExpressionError(f"is longer than {EXPRESSION_CHARS_MAX} characters")
    try:
        celpy: Any = import_module("celpy")
        token: type = import_module("lark").Token
    except ImportError:
        raise ExpressionError("needs the CEL library: pip install 'metering-sidecar[cel]'") from None
    environment = celpy.Environment(runner_class=celpy.InterpretedRunner)
    try:
        tree = environment.compile(text)
    except celpy.CELParseError as error:
        raise ExpressionError(f"cannot be read near line {error.line}, column {error.column}") from None
    names = sorted(_names(tree, token))
    unknown = [name for name in names if not is_property(name)]
    if unknown:
        raise ExpressionError(f"reads {', '.join(unknown)}, which no record has")
    expression = Expression(text, tuple(names), environment.program(tree), celpy)
    if expression._evaluate({name: _sample(name) for name in names}) is None:
        raise ExpressionError("gives no number (CEL does not mix whole and decimal numbers: use double(…) or int(…))")
    return expression


def _names(tree: Any, token: type) -> set[str]:
    """The free names: identifiers that are neither functions, fields nor the variables of a macro."""
    bound: set[str] = set()
    for call in tree.find_data("member_dot_arg"):
        macro, arguments = str(call.children[1]), call.children[2:]
        if macro in ("map", "filter", "all", "exists", "exists_one", "reduce") and arguments:
            first = next(iter(arguments[0].find_data("ident")), None)
            if first is not None:
                bound.add(str(first.children[0]))
    found = {str(node.children[0]) for node in tree.find_data("ident") if isinstance(node.children[0], token)}
    return found - bound


def _sample(name: str) -> Value:
    if name in TEXTS or name.startswith(DIMENSION):
        return "7"
    if name in FLAGS:
        return True
    return 7 if name in WHOLE else Decimal(7)


def _wrap(types: Any, value: Value) -> Any:
    if isinstance(value, bool):
        return types.BoolType(value)
    if isinstance(value, int):
        return types.IntType(value)
    return types.DoubleType(value) if isinstance(value, Decimal) else types.StringType(value)


def _unwrap(types: Any, result: Any) -> int | Decimal | None:
    # The library's arithmetic gives its own numbers for some operations and Python's for others.
    if isinstance(result, (bool, types.BoolType)):
        return None
    if isinstance(result, int):
        return int(result)
    if isinstance(result, float) and math.isfinite(result):
        return read_amount(float(result))
    return None
