"""Results as text for a terminal and as one JSON object for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any


def plain(value: Any) -> Any:
    """Strict JSON: numpy scalars and arrays as numbers and lists, NaN and infinity as null, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def as_json(result: Mapping[str, Any]) -> str:
    return json.dumps(plain(result), ensure_ascii=False, allow_nan=False)


def number(value: Any) -> str:
    """A scalar as people read it: 1,234,567; 0.913; 12.5."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if abs(value) >= 100:
            return f"{value:,.1f}"
        return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"
    if isinstance(value, list):
        return ", ".join(number(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {number(item)}" for name, item in value.items())
    return str(value)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned columns under their names, but for empty ones; numbers right."""
    rows = [plain(row) for row in rows]
    if not rows:
        return ""
    names = [name for name in rows[0] if any(row.get(name) not in (None, [], {}) for row in rows)]
    cells = [names, *([number(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    right = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]

    def line(texts: list[str]) -> str:
        padded = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join(line(texts) for texts in cells)


def columns(result: Mapping[str, Any]) -> str:
    """Names and values in two columns, but for what is empty; records, a list or by name, as tables below."""
    result = plain(result)
    scalars, blocks = {}, []
    for key, value in result.items():
        if value is None or value == {} or value == []:
            continue
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            blocks.append(f"{key}:\n{table(value)}")
        elif isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()):
            blocks.append(f"{key}:\n{table({'name': name} | item for name, item in value.items())}")
        else:
            scalars[key] = number(value)
    width = max((len(key) for key in scalars), default=0)
    lines = [f"{key.ljust(width)}  {value}" for key, value in scalars.items()]
    return "\n".join([*lines, *blocks])
