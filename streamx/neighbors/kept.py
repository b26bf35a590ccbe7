"""An index that is made once and kept beside what it indexes."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamx.errors import BadFileError, IntegrityError, StorageError
from streamx.neighbors.blocks import Rows, blocks
from streamx.neighbors.index import FEWEST, Index, build_index, choose_method, open_index, save_index

log = logging.getLogger("streamx")


def kept_index(
    home: Path | None,
    reference_nk: Any,
    n_query: int,
    *,
    method: str = "auto",
    seed: int = 0,
    threads: int = 0,
    memory: str | int = "4GB",
) -> Index:
    """As :func:`.build_index`; inverted lists come from a folder of `home`, or go there.

    The folder's name is the seed and the checksum of the cells, so another reference never finds them. Lists
    of the first of these cells, as they lie beside a reference before surgery, get the others appended. What
    is damaged is made again; where `home` can't be written, the lists are not kept.

    Parameters
    ----------
    home
        Folder for kept indexes; None: nothing is kept.
    """
    options: dict[str, Any] = {"threads": threads, "memory": memory}
    n = reference_nk.shape[0]
    chosen = choose_method(n, n_query, method)
    if home is None or chosen != "ivf" or n < FEWEST:
        return build_index(reference_nk, n_query, method=chosen, seed=seed, **options)
    with _alone(home):
        return _found_or_made(home, reference_nk, seed, options)


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One process at a time looks, makes and removes; where nothing can be locked, nobody waits.

    Without, one could find lists that another is removing, and make other ones than that.
    """
    import fcntl

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(home, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _found_or_made(home: Path, reference_nk: Any, seed: int, options: dict[str, Any]) -> Index:
    n = reference_nk.shape[0]
    there = _lists_in(home, seed)
    crc_of = checksums(reference_nk, {length for length, _ in there} | {n})
    folder = home / f"ivf-{seed}-{n:08x}-{crc_of[n]:08x}"
    fitting = [length for length, crc in there if crc_of.get(length) == crc]
    shorter = there[max(fitting), crc_of[max(fitting)]] if fitting else None
    index = None if shorter is None else _opened(shorter, options)
    if index is not None and shorter == folder:
        return index
    if index is None:
        index = build_index(reference_nk, 0, method="ivf", seed=seed, **options)
    else:
        index = index.append(Rows(reference_nk, np.arange(index.n, n)))
    try:
        save_index(index, folder)
    except StorageError as error:
        log.info("neighbours: the index is not kept: %s", error)
        return index
    if shorter is not None and shorter != folder:  # what maps its files keeps them
        shutil.rmtree(shorter, ignore_errors=True)
    return index


def _lists_in(home: Path, seed: int) -> dict[tuple[int, int], Path]:
    """Folders of kept lists by the number and the checksum of their cells."""
    found = {}
    for folder in home.glob(f"ivf-{seed}-*-*"):
        try:
            length, crc = (int(part, 16) for part in folder.name.split("-")[-2:])
        except ValueError:
            continue
        found[length, crc] = folder
    return found


def _opened(folder: Path, options: dict[str, Any]) -> Index | None:
    try:
        index = open_index(folder, **options)
    except (BadFileError, IntegrityError) as error:
        log.warning("neighbours: %s; made again", error.what)
        return None
    log.info("neighbours: the index in %s", folder)
    return index


def checksums(points_nk: Any, lengths: Iterable[int]) -> dict[int, int]:
    """CRC-32 of the first so many points, for each length that there is, in one pass."""
    n = points_nk.shape[0]
    found, crc, done = dict[int, int](), 0, 0
    cuts = sorted(length for length in set(lengths) if 0 < length <= n)
    for low, some_nk in blocks(points_nk):
        high = low + len(some_nk)
        for cut in [cut for cut in cuts if low < cut <= high]:
            crc = zlib.crc32(np.ascontiguousarray(some_nk[done - low : cut - low]).data, crc)
            done, found[cut] = cut, crc
        crc, done = zlib.crc32(np.ascontiguousarray(some_nk[done - low :]).data, crc), high
    return found
