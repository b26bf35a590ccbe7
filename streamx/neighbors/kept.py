"""An index that is made once and kept beside what it indexes."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from streamx.errors import BadFileError, IntegrityError, StorageError
from streamx.neighbors.blocks import blocks
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

    The folder's name is the seed and the checksum of the cells, so another reference never finds them. One
    that is damaged is made again; where `home` can't be written, the lists are not kept.

    Parameters
    ----------
    home
        Folder for kept indexes; None: nothing is kept.
    """
    options: dict[str, Any] = {"threads": threads, "memory": memory}
    chosen = choose_method(reference_nk.shape[0], n_query, method)
    if home is None or chosen != "ivf" or reference_nk.shape[0] < FEWEST:
        return build_index(reference_nk, n_query, method=chosen, seed=seed, **options)
    folder = home / f"ivf-{seed}-{fingerprint(reference_nk)}"
    try:
        index = open_index(folder, **options)
        log.info("neighbours: the index in %s", folder)
        return index
    except (BadFileError, IntegrityError) as error:
        if folder.exists():
            log.warning("neighbours: %s; made again", error.what)
    index = build_index(reference_nk, n_query, method=chosen, seed=seed, **options)
    try:
        save_index(index, folder)
    except StorageError as error:
        log.info("neighbours: the index is not kept: %s", error)
    return index


def fingerprint(points_nk: Any) -> str:
    """Checksum of points and their number: 8 hexadecimal digits each."""
    crc = 0
    for _, some_nk in blocks(points_nk):
        crc = zlib.crc32(np.ascontiguousarray(some_nk).data, crc)
    return f"{points_nk.shape[0]:08x}-{crc:08x}"
