"""``--where``: which cells, by an expression over obs columns. Parsed and walked, never evaluated as code.

Known: names of columns (in backticks if they are no Python names), numbers, texts, lists;
``== != < <= > >=``, ``in``, ``not in``; ``and or not``, ``& | ~``; ``+ - * /`` between numbers. No calls,
attributes or indexing.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from streamx.errors import UsageError

Column = Callable[[str], pd.Series]

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def rows_where(expression: str, column: Column, columns: Sequence[str], n_obs: int) -> np.ndarray:
    """Rows for which an expression holds, bool (n_obs,). A missing value makes a comparison false.

    Parameters
    ----------
    expression
        Such as ``study in ['pbmc3k', 'donorA'] and n_umi > 500``.
    column
        Reads a column by name; only those that the expression names are read.
    columns
        Names of the columns.

    Raises
    ------
    UsageError
        If the expression can't be understood, names no column or compares what can't be compared.
    """
    quoted: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        name = f"_quoted_{len(quoted)}"
        quoted[name] = match.group(1)
        return name

    text = re.sub(r"`([^`]+)`", replace, expression.strip())
    try:
        tree = ast.parse(text, mode="eval").body
        walker = _Walker(column, columns, quoted, n_obs)
        mask = walker.truth(tree)
    except (SyntaxError, _Unclear, TypeError, ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UsageError(
            f"can't be understood: {reason}",
            where=f"--where {expression!r}",
            fix="write it like \"study in ['a', 'b'] and n_umi > 500\"; columns are " + ", ".join(columns),
        ) from None
    return mask


class _Unclear(Exception):
    pass


class _Walker:
    def __init__(self, column: Column, columns: Sequence[str], quoted: dict[str, str], n_obs: int) -> None:
        self.column, self.columns, self.quoted, self.n_obs = column, set(columns), quoted, n_obs

    def truth(self, node: ast.expr) -> np.ndarray:
        """A node that says yes or no for every cell."""
        if isinstance(node, ast.BoolOp):
            parts = [self.truth(value) for value in node.values]
            return (np.logical_and if isinstance(node.op, ast.And) else np.logical_or).reduce(parts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            left, right = self.truth(node.left), self.truth(node.right)
            return left & right if isinstance(node.op, ast.BitAnd) else left | right
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert)):
            return ~self.truth(node.operand)
        if isinstance(node, ast.Compare):
            return self.comparison(node)
        value = self.value(node)
        if isinstance(value, pd.Series) and pd.api.types.is_bool_dtype(value.dtype):
            return value.fillna(False).to_numpy(dtype=bool)
        raise _Unclear(f"{ast.unparse(node)!r} is neither true nor false for a cell")

    def comparison(self, node: ast.Compare) -> np.ndarray:
        """``a < b <= c``: all of them."""
        result = np.ones(self.n_obs, dtype=bool)
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            result &= self.one_comparison(left, op, right)
            left = right
        return result

    def one_comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> np.ndarray:
        a = self.value(left)
        if isinstance(op, (ast.In, ast.NotIn)):
            items = self.items(right)
            if not isinstance(a, pd.Series):
                raise _Unclear(f"{ast.unparse(left)!r} is no column")
            found = _comparable(a, items[0] if items else None).isin(items).to_numpy(dtype=bool)
            return ~found if isinstance(op, ast.NotIn) else found
        if type(op) not in _COMPARE:
            raise _Unclear(f"{type(op).__name__} is not known")
        b = self.value(right)
        if not isinstance(a, pd.Series) and not isinstance(b, pd.Series):
            raise _Unclear(f"{ast.unparse(left)!r} and {ast.unparse(right)!r} are both constants")
        x = _comparable(a, b) if isinstance(a, pd.Series) else a
        y = _comparable(b, a) if isinstance(b, pd.Series) else b
        absent = np.zeros(self.n_obs, dtype=bool)
        for side in (x, y):
            if isinstance(side, pd.Series):
                absent |= side.isna().to_numpy()
        result = _COMPARE[type(op)](x, y)
        return np.where(absent, False, pd.Series(result).fillna(False).to_numpy(dtype=bool))

    def value(self, node: ast.expr) -> Any:
        """A column, a constant, or arithmetic over them."""
        if isinstance(node, ast.Name):
            name = self.quoted.get(node.id, node.id)
            if name not in self.columns:
                raise _Unclear(f"no obs column {name!r}")
            return self.column(name).reset_index(drop=True)
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool)):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.number(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](self.number(node.left), self.number(node.right))
        raise _Unclear(f"{ast.unparse(node)!r} is not allowed")

    def number(self, node: ast.expr) -> Any:
        value = self.value(node)
        numeric = (
            pd.api.types.is_numeric_dtype(value.dtype)
            if isinstance(value, pd.Series)
            else isinstance(value, (int, float))
        )
        if not numeric:
            raise _Unclear(f"{ast.unparse(node)!r} is no number")
        return value

    def items(self, node: ast.expr) -> list[Any]:
        if not isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            raise _Unclear(f"{ast.unparse(node)!r} is no list")
        values = [self.value(element) for element in node.elts]
        if any(isinstance(value, pd.Series) for value in values):
            raise _Unclear(f"{ast.unparse(node)!r} holds a column")
        return values


def _comparable(column: pd.Series, other: Any) -> pd.Series:
    """A column that can meet the other side: categories as their values; a text asks for text.

    Raises
    ------
    _Unclear
        If a text meets numbers or the reverse.
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if isinstance(other, pd.Series) or other is None:
        return column
    numeric = pd.api.types.is_numeric_dtype(column.dtype)
    if isinstance(other, str) and numeric:
        raise _Unclear(f"{column.name!r} holds {column.dtype}, {other!r} is text")
    if not isinstance(other, str) and not numeric:
        raise _Unclear(f"{column.name!r} holds text, {other!r} is a number (write {str(other)!r})")
    return column
