"""Texts of others in a page: names of labels, batches, genes and files may hold anything."""

from __future__ import annotations

import html
import re
from typing import Any

LONGEST = 200
NONE = "\N{EN DASH}"
# What HTML does not allow in text (C0 and C1 controls, lone surrogates, noncharacters).
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def escape(value: Any) -> str:
    """Text for the inside of an element or of a quoted attribute: it can't end either."""
    return html.escape(_FORBIDDEN.sub("�", str(value)), quote=True)


def shortened(value: Any, most: int = LONGEST) -> str:
    """The beginning of a long text."""
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def name(value: Any, most: int = LONGEST) -> str:
    """A name as an element of its own: in its own direction, so that it can't turn what follows round."""
    return f"<bdi>{escape(shortened(value, most))}</bdi>"


def number(value: Any) -> str:
    """A number as people read it; a dash for none."""
    if value is None or (isinstance(value, float) and value != value):
        return NONE
    if isinstance(value, bool | str):
        return name(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else NONE
