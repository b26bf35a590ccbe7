"""What a setting is: a field of a frozen class that carries its help and its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from math import isfinite
from numbers import Real
from typing import Any, get_args, get_type_hints

from streamx.errors import UsageError

UNLABELED = ("", "unknown", "Unknown")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    many: bool = False,
    least: float | None = None,
) -> Any:
    """A dataclass field that carries its help, what it may be, and whether the command line takes several."""
    return field(default=default, metadata={"help": help, "choices": choices, "many": many, "least": least})


def parse_bytes(text: str | int) -> int:
    """``"4GB"``, ``"512 MiB"`` or a number of bytes -> bytes (kB, MB, GB are powers of 1000).

    Raises
    ------
    UsageError
        If the text is no positive size.
    """
    units = {
        "": 1,
        "B": 1,
        "K": 1e3,
        "M": 1e6,
        "G": 1e9,
        "T": 1e12,
        "KI": 2**10,
        "MI": 2**20,
        "GI": 2**30,
        "TI": 2**40,
    }
    raw = str(text).strip().upper()
    number = raw.rstrip("BKMGTI ")
    unit = raw[len(number) :].strip()
    unit = unit[:-1] if unit.endswith("B") and unit != "B" else unit
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise UsageError(f"{text!r} is no size in bytes", fix="write it as 4GB, 512MB or 2GiB")
    return size


def _as_number(name: str, value: Any, hint: Any) -> Any:
    """The value, checked where the setting is a number; the command line's parser has seen to that before."""
    if isinstance(value, float) and not isfinite(value):
        raise UsageError(f"{name} = {value}", fix="a finite number")
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if value is None or kinds not in ([int], [float]):
        return value
    whole = kinds == [int]
    good = isinstance(value, Real) and not isinstance(value, bool)
    if not good or (whole and value != int(value)):
        raise UsageError(f"{name} = {value!r}", fix="a whole number" if whole else "a number")
    return int(value) if whole else value


def build(cls: Callable[..., Any], settings: dict[str, Any]) -> Any:
    """``cls(**settings)``; an unknown name or choice, no number or one too small is a :class:`UsageError`.

    A single text for a setting of many is one of them, and not its letters; 1e4 is a whole number.
    """
    fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    many = [name for name, value in settings.items() if isinstance(value, str) and name in fields]
    many = [name for name in many if fields[name].metadata.get("many")]
    settings = settings | {name: (settings[name],) for name in many}
    hints = get_type_hints(cls)
    for name, value in settings.items():
        if name not in fields:
            raise UsageError(f"unknown setting {name!r}", fix=f"one of {', '.join(sorted(fields))}")
        choices = fields[name].metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise UsageError(f"{name} = {value!r}", fix=f"one of {', '.join(choices)}")
        least = fields[name].metadata.get("least")
        settings[name] = _as_number(name, value, hints[name])
        if least is not None and value is not None and value < least:
            raise UsageError(f"{name} = {value}", fix=f"at least {least:g}")
    return cls(**settings)
