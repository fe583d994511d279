"""Formulas of numbers and names: arithmetic and a few functions. Nothing else is understood, none is executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def compute(
    formula: str, lookup: Callable[[str], Any], functions: Mapping[str, Callable[..., Any]], text: str = ""
) -> Any:
    """The value of a formula.

    Args:
        lookup: the value of a name, which may be dotted.
        functions: those it may call.
        text: how an error quotes the formula; as it is by default.

    Raises:
        ValueError: it is no formula, or it cannot be computed.
    """
    return _Formula(lookup, functions, text or formula).read(formula)


class _Formula:
    def __init__(
        self, lookup: Callable[[str], Any], functions: Mapping[str, Callable[..., Any]], text: str
    ) -> None:
        self.lookup, self.functions, self.text = lookup, functions, text

    def read(self, formula: str) -> Any:
        try:
            return self.value(ast.parse(formula, mode="eval").body)
        except SyntaxError as fault:
            raise self.refusal() from fault
        except (ArithmeticError, TypeError) as fault:
            raise ValueError(f"{self.text}: {fault}") from fault

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and node.value is not True:
            return float(node.value)  # powers of whole numbers have no end
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](self.value(node.left), self.value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.value(node.operand)
        if isinstance(node, ast.Call) and not node.keywords and ast.unparse(node.func) in self.functions:
            return self.functions[ast.unparse(node.func)](*map(self.value, node.args))
        if isinstance(node, ast.Name | ast.Attribute):
            return self.lookup(ast.unparse(node))
        raise self.refusal()

    def refusal(self) -> ValueError:
        names = ", ".join(self.functions)
        return ValueError(f"{self.text} is no formula: numbers, names, + - * / // **, {names}")
