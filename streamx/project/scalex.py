"""SCALEX: the query through the encoder, with statistics of its batch norm chosen per query batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from streamx.config import ProjectConfig
from streamx.errors import ResourceError, UsageError, warn
from streamx.loader.plan import permutation
from streamx.loader.transform import apply_transform
from streamx.models.matched import QUERY_BATCH_SAMPLE, as_statistics, fit_query, normalised, stay
from streamx.models.scalex import encode, encode_by_minibatch, norm_stats, running_stats
from streamx.project.mapped import Mapped, no_latents, watched
from streamx.query import Block, Query, lay_blocks, read_blocks
from streamx.store.scratch import pieces
from streamx.train.feed import query_input
from streamx.train.latent import ORIGINAL
from streamx.train.model import Model


def settled(model: Model, config: ProjectConfig) -> ProjectConfig:
    """The settings with the norm that is meant.

    Raises
    ------
    UsageError
        If the model can't do what they say.
    """
    if model.transform.scale is not None and model.scale_bg is None and config.scale == "reference":
        raise UsageError(
            "this checkpoint of SCALEX keeps no largest values per gene",
            where=str(model.path),
            fix="--scale query estimates them from the query, as SCALEX does",
        )
    if config.norm == "matched" and model.clusters is None:
        raise UsageError(
            "this checkpoint of SCALEX says nothing about its cells",
            where=str(model.path),
            fix="--norm minibatch, as SCALEX does; or running, domain",
        )
    if config.norm is None:
        return replace(config, norm="minibatch" if model.clusters is None else "matched")
    return config


def map_cells(model: Model, query: Query, config: ProjectConfig, memory: int, progress: bool) -> Mapped:
    """Latents; reads the query once. What passed is laid down in the scratch folder for further passes."""
    z_nk = no_latents(query, model.module.config.n_latent)
    own_scale = config.scale == "query" and model.transform.scale is not None
    blocks: Callable[[], Iterable[Block]] = lambda: watched(  # noqa: E731
        query, read_blocks(query, model, config, memory), progress
    )
    small: list[int] = []
    n_batches = len(query.batches)
    pooled_g = model.pooled_scale_g
    scale_bg = None if pooled_g is None else np.tile(pooled_g, (n_batches, 1))
    if config.norm != "running" or own_scale:
        kept = lay_blocks(blocks(), query.scratch / "blocks", len(model.genes))
        blocks = lambda: kept  # noqa: E731
        if config.norm == "minibatch" and kept.nbytes > memory // 2:
            raise ResourceError(
                f"norm minibatch draws cells at random from the whole query, which takes more than half of "
                f"{config.memory}",
                where=query.name,
                fix="--norm domain, its exact limit; or more --memory",
            )
        n_b = np.zeros(n_batches, np.int64)
        for low, high in pieces(query.n_obs):
            n_b += np.bincount(query.code_n[low:high][query.passed_n[low:high]], minlength=n_batches)
        small = np.flatnonzero(n_b < config.min_query_cells).tolist()
        _warn_small(query, n_b, small, config)
        if own_scale:
            scale_bg = _query_scale(model, blocks(), n_b, small, pooled_g)
    inputs = _Inputs(model, blocks, scale_bg)
    for row_n, found in _encoded(model, inputs, query, config, small):
        z_nk[row_n] = found
    return Mapped(z_nk, [query.batches[b] for b in small])


@dataclass(frozen=True)
class _Inputs:
    """The query as the network's input; every call of :meth:`transformed` is a pass."""

    model: Model
    blocks: Callable[[], Iterable[Block]]
    scale_bg: np.ndarray | None

    @property
    def device(self) -> torch.device:
        return self.model.module.encoder.hidden.weight.device

    def transformed(self) -> Iterator[Block]:
        for block in self.blocks():
            x_ng = block.x_ng.copy()
            apply_transform(
                x_ng,
                self.model.transform,
                total_n=block.total_n,
                batch_n=block.batch_n,
                scale_bg=self.scale_bg,
            )
            yield replace(block, x_ng=x_ng)

    def minibatches(self, rows: deque[np.ndarray] | None = None) -> Iterator[tuple[Any, np.ndarray]]:
        """(input, batch codes) of each block; their rows are appended to ``rows``."""
        for block in self.transformed():
            if len(block.row_n):
                if rows is not None:
                    rows.append(block.row_n)
                yield query_input(block.x_ng, self.device), block.batch_n


def _encoded(
    model: Model, inputs: _Inputs, query: Query, config: ProjectConfig, small: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, latents) under the chosen norm; small batches always by the running statistics."""
    n_batches = len(query.batches)
    rows: deque[np.ndarray] = deque()
    mean_h, var_h = running_stats(model.module)
    mean_bh, var_bh = mean_h[None], var_h[None]
    if config.norm == "minibatch":
        yield from _encoded_by_minibatch(model, inputs, n_batches, small)
        return
    if config.norm == "domain":
        stats = norm_stats(model.module, inputs.minibatches, n_batches)
        mean_bh, var_bh = stats.mean_bh.copy(), stats.var_bh.copy()
        mean_bh[small], var_bh[small] = mean_h, var_h
    if config.norm == "matched":
        mean_bh, var_bh = _matched(model, inputs, query, small)
    for z_nk in encode(model.module, lambda: inputs.minibatches(rows), mean_bh, var_bh):
        yield rows.popleft(), z_nk


def _matched(model: Model, inputs: _Inputs, query: Query, small: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Statistics per query batch that give it what the reference has at its composition.

    A batch of many cells is judged by a sample, chosen and ordered by the hash of the cells' names: neither
    the order of files nor that of cells matters.
    """
    assert model.clusters is not None
    chosen = _sampled(query, small)
    wanted = np.zeros(query.n_obs, dtype=bool)
    wanted[np.concatenate(chosen)] = True
    found_n, found_nh = [], []
    for block in inputs.transformed():
        take = wanted[block.row_n]
        if take.any():
            x_ng = block.x_ng[take]
            found_n.append(block.row_n[take])
            found_nh.append(normalised(model.module, query_input(x_ng, inputs.device)))
    moves = [stay(model.module.config.n_hidden)] * len(query.batches)
    if found_n:
        found, u_nh = np.concatenate(found_n), np.concatenate(found_nh)  # rows come in order
        for b, rows in enumerate(chosen):
            if len(rows):
                moves[b] = fit_query(model.module, u_nh[np.searchsorted(found, rows)], model.clusters)
    mean_bh, var_bh = zip(*(as_statistics(model.module, move) for move in moves), strict=True)
    return np.stack(mean_bh), np.stack(var_bh)


def _sampled(query: Query, small: list[int]) -> list[np.ndarray]:
    """Per batch that is not small, its rows with the least hashes of names, by hash."""
    keys = [np.zeros(0, np.uint64) for _ in query.batches]
    rows = [np.zeros(0, np.int64) for _ in query.batches]
    first = 0
    for source in query.sources:
        for low, high in pieces(source.n_obs):
            span = slice(first + low, first + high)
            key_n = pd.util.hash_array(source.obs_names[low:high])
            code_n, passed_n = np.asarray(query.code_n[span]), query.passed_n[span]
            for b in np.unique(code_n[passed_n]).tolist():
                if b in small:
                    continue
                mine = np.flatnonzero(passed_n & (code_n == b))
                keys[b] = np.concatenate([keys[b], key_n[mine]])
                rows[b] = np.concatenate([rows[b], mine + span.start])
                least = np.argsort(keys[b], kind="stable")[:QUERY_BATCH_SAMPLE]
                keys[b], rows[b] = keys[b][least], rows[b][least]
        first += source.n_obs
    return rows


def _encoded_by_minibatch(
    model: Model, inputs: _Inputs, n_batches: int, small: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The original's way: minibatches of 64 random cells of one batch, normalised by themselves."""
    blocks = list(inputs.transformed())
    x_ng = sparse.vstack([block.x_ng for block in blocks], format="csr")
    row_n = np.concatenate([block.row_n for block in blocks])
    code_n = np.concatenate([block.batch_n for block in blocks])
    mean_h, var_h = running_stats(model.module)
    for b in range(n_batches):
        members = np.flatnonzero(code_n == b)
        members = members[permutation(len(members), 0, b)]
        pieces = [members[low : low + ORIGINAL] for low in range(0, len(members), ORIGINAL)]
        given = lambda pieces=pieces: (  # noqa: E731
            (query_input(x_ng[piece], inputs.device), np.zeros(len(piece), np.int64)) for piece in pieces
        )
        found = (
            encode(model.module, given, mean_h[None], var_h[None])
            if b in small
            else encode_by_minibatch(model.module, given)
        )
        for piece, z_nk in zip(pieces, found, strict=True):
            yield row_n[piece], z_nk


def _query_scale(
    model: Model, blocks: Iterable[Block], n_b: np.ndarray, small: list[int], pooled_g: np.ndarray | None
) -> np.ndarray:
    """Largest transformed value per query batch and gene, float32; small batches take the reference's."""
    unscaled = replace(model.transform, scale=None)
    scale_bg = np.zeros((len(n_b), len(model.genes)), np.float32)
    for block in blocks:
        x_ng = block.x_ng.copy()
        apply_transform(x_ng, unscaled, total_n=block.total_n)
        for b in np.unique(block.batch_n):
            largest_g = x_ng[block.batch_n == b].max(axis=0).toarray().ravel()
            np.maximum(scale_bg[b], largest_g, out=scale_bg[b])
    if model.transform.scale == "global":
        scale_bg[:] = scale_bg.max(0)
        small = list(range(len(n_b))) if len(small) == len(n_b) else []
    if pooled_g is not None:
        scale_bg[small] = pooled_g
    return scale_bg


def _warn_small(query: Query, n_b: np.ndarray, small: list[int], config: ProjectConfig) -> None:
    if small:
        some = ", ".join(f"{query.batches[b]} ({n_b[b]})" for b in small[:5])
        warn(
            f"{len(small)} of {len(n_b)} batches have fewer than {config.min_query_cells} cells: {some}"
            + (", ..." if len(small) > 5 else "")
            + "; the reference's statistics are used for them",
            where=query.name,
            fix="name files that belong together as one query (NAME=FILE...), or lower --min-query-cells",
        )
