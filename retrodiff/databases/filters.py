"""Reads conditions such as ``label == 'dog' and year > 2000``; nothing is evaluated as Python."""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from retrodiff.text import printable

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


MOST = 500
"""Conditions in one filter; pyarrow nests expressions, and what is nested too deep crashes it."""

DEEPEST = 50
"""Levels of parentheses and operators within each other."""

LONGEST = 2**20
"""Characters of a filter; long lists of constants are its only long part."""


def parse_filter(text: str, columns: Sequence[str]) -> tuple[Any, list[str]]:
    """A condition over columns -> pyarrow expression, and the columns that it needs.

    Known: comparisons, ``in``, ``not in``, ``is None``, ``and``, ``or``, ``not`` and parentheses.

    Raises:
        ValueError: something else is in it, an unknown column, or it is too long or nested too
            deep.
    """
    if not isinstance(text, str):
        raise ValueError(f"a filter is a text such as \"label == 'dog'\", not {text!r:.50}")
    if len(text) > LONGEST:
        raise ValueError(
            f"the filter {_short(text)} has {len(text):,} characters, more than {LONGEST:,}: "
            "select the rows by number, database.subset(rows)"
        )
    try:
        with warnings.catch_warnings():  # what Python thinks of an escape sequence is no matter
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"cannot read the filter {_short(text)}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot read the filter {_short(text)}: {error}") from None
    nodes = _nodes(tree, text)
    names = list(dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name)))
    for name in names:
        if name not in columns:
            raise ValueError(
                f"filter {_short(text)}: unknown column {name!r}; columns: {', '.join(columns)}"
            )
    if sum(map(_conditions, nodes)) > MOST:
        raise ValueError(
            f"the filter {_short(text)} makes more than {MOST} comparisons: ask with "
            "`column in [...]`"
        )
    try:
        return _Translator(text).boolean(tree.body), names
    except OverflowError:
        raise ValueError(f"the filter {_short(text)} holds a number of more than 64 bits") from None


def _nodes(tree: ast.AST, text: str) -> list[ast.AST]:
    """All nodes of a syntax tree, refused if it is deeper than what reads it can stand."""
    level, nodes = [tree], list[ast.AST]()
    for _ in range(DEEPEST):
        nodes += level
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return nodes
    raise ValueError(
        f"the filter {_short(text)} is nested more than {DEEPEST} levels deep: join its "
        "conditions without parentheses"
    )


def _conditions(node: ast.AST) -> int:
    """What a node adds to the nesting of the pyarrow expression."""
    if isinstance(node, ast.BoolOp):
        return len(node.values)
    return isinstance(node, ast.Compare | ast.Not) * len(getattr(node, "ops", [node]))


def _short(text: str) -> str:
    return printable(repr(text if len(text) <= 200 else text[:199] + "…"))


class _Translator:
    def __init__(self, text: str):
        self.text = text

    def boolean(self, node: ast.expr) -> Any:
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self.boolean(value) for value in values]
                result = parts[0]
                for part in parts[1:]:
                    result = result & part if isinstance(op, ast.And) else result | part
                return result
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.boolean(operand)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                result = None
                for op, right in zip(ops, rights, strict=True):
                    part = self.comparison(left, op, right)
                    result = part if result is None else result & part
                    left = right
                return result
            case ast.Name():
                return self.value(node)
            case _:
                raise self.refusal(node)

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant):
            raise self.refusal(left)
        one = self.value(left)
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(left, ast.Name) or not isinstance(right, ast.List | ast.Tuple):
                raise self.refusal(right)
            inside = one.isin([self.constant(item) for item in right.elts])
            return ~inside if isinstance(op, ast.NotIn) else inside
        if isinstance(right, ast.Constant) and right.value is None:
            if not isinstance(op, ast.Is | ast.IsNot | ast.Eq | ast.NotEq):
                raise self.refusal(right)
            is_null = one.is_null()
            return ~is_null if isinstance(op, ast.IsNot | ast.NotEq) else is_null
        if type(op) not in _COMPARISONS:
            raise self.refusal(right)
        return _COMPARISONS[type(op)](one, self.value(right))

    def value(self, node: ast.expr) -> Any:
        import pyarrow.compute as pc

        return pc.field(node.id) if isinstance(node, ast.Name) else pc.scalar(self.constant(node))

    def constant(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str() | int() | float() | bool() as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case _:
                raise self.refusal(node)

    def refusal(self, node: ast.expr) -> ValueError:
        return ValueError(
            f"cannot use {ast.unparse(node)!r} in the filter {_short(self.text)}: compare columns "
            "with constants, and join comparisons by and, or, not"
        )
