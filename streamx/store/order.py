"""In which order cells lie, and what they are called: decided by hashes, in pieces that fit in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from streamx.store.columns import ColumnFile, file_of
from streamx.store.scratch import new_array, pieces
from streamx.store.text import Text, text_of

BUCKET_ROWS = 1 << 18  # rows that are sorted at a time


def row_order(
    batch_codes: np.ndarray,
    digests: Sequence[int],
    checksums: Sequence[str],
    lengths: Sequence[int],
    seed: int,
    folder: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows in their final order: batches in the order of their codes, rows shuffled inside each.

    The key of a row mixes the seed, a digest of its file's cell and gene names, and its number in the file,
    so that neither the order of files, nor their format, nor their names decide anything.

    Parameters
    ----------
    batch_codes
        Batch of each row of all files, one after the other.
    digests, checksums, lengths
        Of each file: of its names, of its bytes (they decide between files of the same names), its rows.
    folder
        For the results, which are mapped.

    Returns
    -------
    order, destination
        Row at each place, and place of each row; int64.
    """
    n = int(sum(lengths))
    salt = _mix(np.array(digests, dtype=np.uint64))
    rank = np.argsort(np.argsort(checksums, kind="stable"), kind="stable")

    def keys(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What rows are sorted by, the last first."""
        file, number = file_of(rows, lengths)
        key = _mix(_mix(number.astype(np.uint64) + salt[file]) + np.uint64(seed % 2**64))
        return number, rank[file], key, np.asarray(batch_codes[rows])

    order = new_array(folder / "order", n, np.int64)
    ends = _into_buckets(order, n, keys)
    low = 0
    while low < n:  # whole buckets, as many as fit
        fitting = int(np.searchsorted(ends, low + BUCKET_ROWS, side="right")) - 1
        high = max(int(ends[fitting]), int(ends[np.searchsorted(ends, low, side="right")]))
        rows = np.asarray(order[low:high])
        order[low:high] = rows[np.lexsort(keys(rows))]
        low = high
    destination = new_array(folder / "destination", n, np.int64)
    for low, high in pieces(n):
        destination[order[low:high]] = np.arange(low, high)
    return order, destination


def _into_buckets(
    order: np.ndarray, n: int, keys: Callable[[np.ndarray], tuple[np.ndarray, ...]]
) -> np.ndarray:
    """Rows by batch and the first bits of their key, into `order`; returns where each bucket ends."""
    bits = max(0, int(n // BUCKET_ROWS)).bit_length()

    def bucket_of(rows: np.ndarray) -> np.ndarray:
        _, _, key, code = keys(rows)
        first = (key >> np.uint64(64 - bits)).astype(np.int64) if bits else 0
        return (code.astype(np.int64) << bits) + first

    counts = np.zeros(0, np.int64)
    for low, high in pieces(n):
        found = np.bincount(bucket_of(np.arange(low, high)), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    ends = np.cumsum(counts)
    cursor = ends - counts
    for low, high in pieces(n):
        bucket = bucket_of(np.arange(low, high))
        by_bucket = np.argsort(bucket, kind="stable")
        bucket = bucket[by_bucket]
        within = np.arange(len(bucket)) - np.searchsorted(bucket, bucket)
        order[cursor[bucket] + within] = low + by_bucket
        cursor += np.bincount(bucket, minlength=len(cursor))
    return np.concatenate([[0], ends])


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele 2014): every input bit changes half of the output bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def names_digest(obs_names: Iterable[Text], var_names: Sequence[str] | np.ndarray) -> int:
    """64 bits that stand for a file's cell and gene names, however those are cut into pieces."""
    digest = hashlib.blake2b(digest_size=8)
    for names in obs_names:
        digest.update(names.hashes().data)
    digest.update(b"\1")
    digest.update(text_of(var_names).hashes().data)
    return int.from_bytes(digest.digest(), "little")


def unique_names(
    names: Text, keys: Sequence[str], lengths: Sequence[int], folder: Path, taken: np.ndarray | None = None
) -> Text:
    """Cell names that occur once: one that several cells share gets its file's key, and a number if needed.

    Names are told apart by 64 bits: two different ones that agree in these (one pair in 10^5 atlases of ten
    million cells) are taken for the same, and get their files' keys.

    Parameters
    ----------
    names
        Names of the cells of all files, one after the other.
    keys, lengths
        Of each file: its key and its cells.
    taken
        Hashes of the names of cells that are in the store already; those stay as they are.
    """
    taken = np.zeros(0, np.uint64) if taken is None else np.sort(taken)

    def with_key(rows: np.ndarray, text: np.ndarray, times: np.ndarray) -> np.ndarray:
        file, _ = file_of(rows, lengths)
        return np.array([f"{name}-{keys[f]}" for name, f in zip(text, file, strict=True)], dtype=object)

    def with_number(rows: np.ndarray, text: np.ndarray, times: np.ndarray) -> np.ndarray:
        return np.array([f"{name}-{k}" for name, k in zip(text, times, strict=True)], dtype=object)

    step = 0
    while (times := _repeated(names, taken, folder, everyone=step == 0)) is not None:
        names = _renamed(names, times, with_key if step == 0 else with_number, folder / f"names{step}")
        step += 1
    return names


def _renamed(names: Text, times: np.ndarray, rename: Callable[..., np.ndarray], path: Path) -> Text:
    file = ColumnFile(path)
    for low, high in pieces(len(names)):
        piece = names[low:high]
        changed = np.flatnonzero(times[low:high])
        if len(changed):
            text = piece.strings()
            text[changed] = rename(low + changed, text[changed], times[low + changed])
            piece = text_of(text)
        file.append((piece, None))
    made = file.column().values
    assert isinstance(made, Text)
    return made


def _repeated(names: Text, taken: np.ndarray, folder: Path, *, everyone: bool) -> np.ndarray | None:
    """How many cells before have each cell's name (`everyone`: how many others), int32; None if none has.

    A name that is taken counts as one cell before all others.
    """
    n = len(names)
    hash_n, times = new_array(folder / "hash", n, np.uint64), new_array(folder / "times", n, np.int32)
    for low, high in pieces(n):
        hash_n[low:high] = names[low:high].hashes()
    found = False
    for rows, own in _by_hash(hash_n):
        order = np.argsort(own, kind="stable")  # rows of one name stay in their order
        own = own[order]
        first = np.searchsorted(own, own)
        count = (
            np.searchsorted(own, own, side="right") - first - 1 if everyone else np.arange(len(own)) - first
        )
        if len(taken):
            at = np.minimum(np.searchsorted(taken, own), len(taken) - 1)
            count = count + (taken[at] == own)
        found |= bool(count.any())
        times[rows[order]] = count
    return times if found else None


def _by_hash(hash_n: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows by the first bits of their hash: their numbers, ascending, and hashes."""
    n = len(hash_n)
    bits = (n // BUCKET_ROWS).bit_length()
    if not bits:
        yield np.arange(n), np.asarray(hash_n)
        return
    for k in range(1 << bits):
        rows = [
            low + np.flatnonzero(hash_n[low:high] >> np.uint64(64 - bits) == k) for low, high in pieces(n)
        ]
        mine = np.concatenate(rows)
        yield mine, hash_n[mine]
