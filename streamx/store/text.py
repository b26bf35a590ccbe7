"""Strings as bytes, one after the other: names of ten million cells in a file, not as Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from streamx.compiled import compiled


@dataclass(frozen=True)
class Text:
    """UTF-8 strings.

    Attributes
    ----------
    ends
        int64 (n + 1,): where each string begins and, last, where the last one ends; need not begin at 0.
    data
        uint8: their bytes.
    """

    ends: np.ndarray
    data: np.ndarray

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def dtype(self) -> Any:
        """What zarr calls its kind."""
        return str

    def __getitem__(self, rows: slice) -> Text:
        """Consecutive strings, uncopied."""
        start, stop, _ = rows.indices(len(self))
        return Text(self.ends[start : max(start, stop) + 1], self.data)

    def take(self, rows: np.ndarray) -> Text:
        """Strings of any rows, copied."""
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        ends = np.zeros(len(rows) + 1, np.int64)
        _lengths(self.ends, rows, ends)
        data = np.empty(int(ends[-1]), np.uint8)
        _take(self.ends, self.data, rows, ends, data)
        return Text(ends, data)

    def strings(self) -> np.ndarray:
        """As an object array of str."""
        first, last = int(self.ends[0]), int(self.ends[-1])
        raw = np.asarray(self.data[first:last]).tobytes()
        at = (np.asarray(self.ends) - first).tolist()
        out = np.empty(len(self), dtype=object)
        text = raw.decode(errors="surrogatepass")
        if len(text) == len(raw):
            out[:] = [text[a:b] for a, b in pairwise(at)]
        else:
            out[:] = [raw[a:b].decode(errors="surrogatepass") for a, b in pairwise(at)]
        return out

    def hashes(self) -> np.ndarray:
        """64 bits per string, uint64."""
        out = np.empty(len(self), np.uint64)
        _hashes(self.ends, self.data, out)
        return out

    def framed(self) -> np.ndarray:
        """What the codec ``vlen-utf8`` makes of them: a count, then each string after its length, uint8."""
        out = np.empty(4 + 4 * len(self) + int(self.ends[-1] - self.ends[0]), np.uint8)
        _framed(self.ends, self.data, out)
        return out


def text_of(strings: Sequence[str] | np.ndarray) -> Text:
    """Strings -> their bytes."""
    encoded = [value.encode(errors="surrogatepass") for value in strings]
    ends = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=ends[1:])
    return Text(ends, np.frombuffer(b"".join(encoded), np.uint8))


def joined(pieces: Iterable[Text]) -> Text:
    """Several one after the other, copied."""
    pieces = list(pieces)
    data = [piece.data[int(piece.ends[0]) : int(piece.ends[-1])] for piece in pieces]
    starts = np.cumsum([0, *(len(values) for values in data)])
    ends = [piece.ends[1:] - piece.ends[0] + at for piece, at in zip(pieces, starts[:-1], strict=True)]
    return Text(
        np.concatenate([np.zeros(1, np.int64), *ends]), np.concatenate([np.zeros(0, np.uint8), *data])
    )


@compiled
def _lengths(ends, rows, out):
    for i in range(rows.size):
        out[i + 1] = out[i] + ends[rows[i] + 1] - ends[rows[i]]


@compiled
def _take(ends, data, rows, out_ends, out):
    for i in range(rows.size):
        first, at = ends[rows[i]], out_ends[i]
        for j in range(out_ends[i + 1] - at):
            out[at + j] = data[first + j]


@compiled
def _hashes(ends, data, out):
    """FNV-1a (Fowler, Noll and Vo), its bits mixed as splitmix64 does."""
    for i in range(out.size):
        h = np.uint64(0xCBF29CE484222325)
        for j in range(ends[i], ends[i + 1]):
            h = (h ^ np.uint64(data[j])) * np.uint64(0x100000001B3)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = h ^ (h >> np.uint64(31))


@compiled
def _framed(ends, data, out):
    n = ends.size - 1
    for k in range(4):
        out[k] = (n >> (8 * k)) & 255
    at = 4
    for i in range(n):
        size = ends[i + 1] - ends[i]
        for k in range(4):
            out[at + k] = (size >> (8 * k)) & 255
        at += 4
        for j in range(ends[i], ends[i + 1]):
            out[at] = data[j]
            at += 1
