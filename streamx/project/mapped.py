"""What a way of mapping is given and gives back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from streamx.query import Block, Found, Query
from streamx.store.scratch import new_array, pieces


@dataclass(frozen=True)
class Mapped:
    """What is known of all cells of a query.

    Attributes
    ----------
    z_nk
        Latents, float32; NaN for cells that did not pass.
    small
        Batches that were too small for statistics of their own.
    columns
        Further columns of obs: name -> (categories, codes int32 with -1 for none), or (None, float32).
    """

    z_nk: np.ndarray
    small: list[str] = field(default_factory=list)
    columns: dict[str, Found] = field(default_factory=dict)


def no_latents(query: Query, n_latent: int) -> np.ndarray:
    """NaN for every cell, float32 (n_cells, n_latent), on disk where that is large."""
    z_nk = new_array(query.scratch / "latents", query.n_obs * n_latent, np.float32).reshape(-1, n_latent)
    for low, high in pieces(query.n_obs):
        z_nk[low:high] = np.nan
    return z_nk


def watched(query: Query, blocks: Iterable[Block], progress: bool) -> Iterator[Block]:
    """The blocks, with a bar over the cells read."""
    bar = tqdm(
        total=query.n_obs, desc=query.name, unit="cell", leave=False, disable=None if progress else True
    )
    with bar:
        for block in blocks:
            yield block
            bar.update(int(block.row_n[-1]) + 1 - bar.n if len(block.row_n) else 0)
