"""A pickle's program before it is carried out: whether all that it does is bounded.

Names are :mod:`streamx.interop.unpickle`'s business; here are sizes, the memo, and what hashing keys takes.
"""

from __future__ import annotations

import pickletools
from typing import Any

LARGEST = 1 << 28  # bytes of a pickle without its tensors: millions of names
DEEPEST = 64  # levels of nesting
_HASHED = 10_000_000  # values that are visited to hash keys; a pickle's bytes come on top
_KEYED = {"SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET"}  # these hash what they take
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


class Refused(Exception):
    """A name or an operation that no file of ours needs."""


def bounded(program: bytes) -> bytes:
    """The same bytes, if they do nothing that find_class and the nodes can't stop."""
    if len(program) > LARGEST:
        raise ValueError(f"{len(program):,} bytes")
    sizes = _Sizes(len(program))
    for op, argument, _ in pickletools.genops(program):
        if op.name.startswith("EXT"):
            raise Refused("an extension code")  # may be answered from a cache, without asking find_class
        if op.name in _PUT and (argument or 0) > len(program):
            raise ValueError(f"memo number {argument:,}")  # allocates a table of that length
        sizes.after(op, argument)
    return program


class _Sizes:
    """What hashing a pickle's keys will take, from its operations alone, before any is carried out.

    A tuple is hashed through all that it holds, each time: one deep within the other ends the process, and
    forty that hold the one before twice take hours. Of everything on the stack its values and its depth.
    """

    def __init__(self, n_bytes: int) -> None:
        self._stack: list[tuple[int, int] | None] = []  # None: a mark
        self._memo: dict[int, tuple[int, int] | None] = {}
        self._left = _HASHED + n_bytes

    def after(self, op: pickletools.OpcodeInfo, argument: Any) -> None:
        if op.name in _PUT or op.name == "MEMOIZE":
            self._memo[argument if op.name in _PUT else len(self._memo)] = self._top()
        elif op.name in _GET:
            self._stack.append(self._memo.get(argument, (1, 0)))
        elif op.name == "DUP":
            self._stack.append(self._top())
        else:
            taken = self._taken(op)
            if op.name in _KEYED:
                self._left -= sum(n for n, _ in taken)
            size = (1, 0)
            if op.name.startswith(("TUPLE", "EMPTY_TUPLE")):
                size = 1 + sum(n for n, _ in taken), 1 + max((depth for _, depth in taken), default=0)
            if size[1] > DEEPEST or self._left < 0:
                raise ValueError("keys that would take too long to hash")
            marks = op.name == "MARK"
            self._stack += [None if marks else size] * len(op.stack_after)

    def _top(self) -> tuple[int, int] | None:
        return self._stack[-1] if self._stack else (1, 0)

    def _taken(self, op: pickletools.OpcodeInfo) -> list[tuple[int, int]]:
        """What an operation takes from the stack."""
        taken = []
        if pickletools.markobject in op.stack_before:
            while self._stack and (one := self._stack.pop()) is not None:
                taken.append(one)
        for kind in op.stack_before:
            if kind is pickletools.markobject:
                break
            one = self._stack.pop() if self._stack else None
            taken += [] if one is None else [one]
        return taken
