"""Constraints between searched keys, such as `method.num_prompts * method.length <= 100`, without running any code."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from polyprompt.errors import ConfigError
from tuning.study import Scalar

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_EXPECTED = "numbers, text, config keys, + - * / // %, comparisons, and, or, not and brackets"


class Constraint:
    """A condition on config keys. Raises ConfigError for text that is no such condition."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            raise ConfigError(
                f"search.constraints: {text!r} cannot be read ({error.msg}); expected {_EXPECTED}"
            ) from None
        self.keys = frozenset(_keys(self._tree, text))
        if not self.keys:
            raise ConfigError(f"search.constraints: {text!r} names no config key, so it holds always or never; drop it")

    def holds(self, values: Mapping[str, Scalar]) -> bool:
        """Return whether the condition holds for the values of its keys. One that lacks a key's value holds."""
        if not self.keys <= values.keys():
            return True
        try:
            return bool(_evaluate(self._tree, values))
        except (TypeError, ZeroDivisionError) as error:
            known = ", ".join(f"{key}={values[key]!r}" for key in sorted(self.keys))
            raise ConfigError(f"search.constraints: {self.text!r} cannot be computed for {known}: {error}") from None


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (stem := _dotted(node.value)):
        return f"{stem}.{node.attr}"
    return None


def _keys(node: ast.expr, text: str) -> set[str]:
    """Collect the keys of an expression, and refuse anything that is not on the list."""
    if key := _dotted(node):
        return {key}
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return set()
        case ast.BinOp(left, op, right) if type(op) in _BINARY:
            parts = [left, right]
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            parts = [operand]
        case ast.BoolOp(_, values):
            parts = values
        case ast.Compare(left, ops, comparators) if all(type(op) in _COMPARE for op in ops):
            parts = [left, *comparators]
        case _:
            raise ConfigError(
                f"search.constraints: {text!r} uses {ast.unparse(node)!r}, which is not allowed; expected {_EXPECTED}"
            )
    return set().union(*(_keys(part, text) for part in parts))


def _evaluate(node: ast.expr, values: Mapping[str, Scalar]) -> Any:
    if key := _dotted(node):
        return values[key]
    match node:
        case ast.Constant(value):
            return value
        case ast.BinOp(left, op, right):
            return _BINARY[type(op)](_evaluate(left, values), _evaluate(right, values))
        case ast.UnaryOp(ast.Not(), operand):
            return not _evaluate(operand, values)
        case ast.UnaryOp(_, operand):
            return -_evaluate(operand, values)
        case ast.BoolOp(ast.And(), parts):
            return all(_evaluate(part, values) for part in parts)
        case ast.BoolOp(_, parts):
            return any(_evaluate(part, values) for part in parts)
        case ast.Compare(left, ops, comparators):
            sides = [_evaluate(side, values) for side in [left, *comparators]]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, sides, sides[1:], strict=False))
    raise AssertionError(ast.dump(node))
