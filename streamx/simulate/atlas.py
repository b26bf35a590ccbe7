"""What a synthetic atlas is: a pure function of its settings, cell by cell.

A batch has a composition of cell types, a factor per gene (the batch effect) and a depth; a cell has a type,
a log-normal number of transcripts, and draws as many from its type's profile times the factors. How the cells
are cut into blocks, by how many threads, and into what they are written, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from streamx.config import SimulateConfig
from streamx.errors import UsageError
from streamx.simulate import kernels

GENE_SPREAD = 1.5  # of the logarithm of a gene's abundance; 95 % of peaks differ less
PEAK_SPREAD = 0.8
MARKERS = 0.1  # share of genes that tell a type from the others
DEPTH_SPREAD = 0.6  # of the logarithm of a cell's transcripts
MAX_DEPTH = 40  # times the median: the end of the tail
COMPOSITION = 2.0  # concentration of the types of a batch: about a third of the types make up half of it
SIZE_SPREAD = 0.3  # of the logarithm of a batch's cells


@dataclass(frozen=True)
class Block:
    """Consecutive cells of one batch.

    Attributes
    ----------
    indptr, indices, data
        Counts as CSR: int64, int32, int32; sorted columns, no zeros.
    type_n
        Cell type, int64.
    depth_n
        Transcripts of the cell, int64.
    protein_np
        Protein counts, float32 (n, n_proteins).
    """

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    type_n: np.ndarray
    depth_n: np.ndarray
    protein_np: np.ndarray


@dataclass(frozen=True)
class Atlas:
    """A synthetic atlas; its cells are drawn when they are asked for."""

    config: SimulateConfig

    @cached_property
    def gene_names(self) -> list[str]:
        n = self.config.n_genes
        if self.config.features == "peaks":
            return [f"chr{1 + g * 22 // n}:{1000 * g}-{1000 * g + 500}" for g in range(n)]
        return [f"gene{g:0{len(str(n - 1))}d}" for g in range(n)]

    @cached_property
    def batch_names(self) -> list[str]:
        return [f"batch{b:0{len(str(self.config.n_batches - 1))}d}" for b in range(self.config.n_batches)]

    @cached_property
    def type_names(self) -> list[str]:
        return [f"type{t:0{len(str(self.config.n_types - 1))}d}" for t in range(self.config.n_types)]

    @cached_property
    def protein_names(self) -> list[str]:
        return [f"protein{p}" for p in range(self.config.n_proteins)]

    @cached_property
    def size_b(self) -> np.ndarray:
        """Cells of each batch, int64; at least one."""
        config = self.config
        share_b = np.exp(SIZE_SPREAD * self._rng(1).standard_normal(config.n_batches))
        edges = np.cumsum(share_b) / share_b.sum() * (config.n_cells - config.n_batches)
        return 1 + np.diff(np.rint(edges).astype(np.int64), prepend=0)

    @cached_property
    def profile_tg(self) -> np.ndarray:
        """Abundance of each gene in each type, float64, rows sum to 1."""
        config, rng = self.config, self._rng(2)
        spread = PEAK_SPREAD if config.features == "peaks" else GENE_SPREAD
        shape = (config.n_types, config.n_genes)
        base_g = np.exp(spread * rng.standard_normal(config.n_genes))
        factor_tg = np.exp(1.0 + rng.standard_normal(shape))
        profile_tg = base_g * np.where(rng.random(shape) < MARKERS, factor_tg, 1.0)
        return profile_tg / profile_tg.sum(axis=1, keepdims=True)

    @cached_property
    def protein_tp(self) -> np.ndarray:
        """Median of each protein in each type: background, or far above it."""
        config, rng = self.config, self._rng(3)
        shape = (config.n_types, config.n_proteins)
        present_tp = rng.random(shape) < 0.3
        return np.where(present_tp, np.exp(5 + 0.5 * rng.standard_normal(shape)), 3 + 4 * rng.random(shape))

    def factor_g(self, batch: int) -> np.ndarray:
        """What a batch multiplies each gene by."""
        return np.exp(self.config.batch_effect * self._rng(4, batch).standard_normal(self.config.n_genes))

    def share_t(self, batch: int) -> np.ndarray:
        """Composition of a batch."""
        return self._rng(5, batch).dirichlet(np.full(self.config.n_types, COMPOSITION))

    def depth(self, batch: int) -> float:
        """Median transcripts of a batch's cells."""
        effect = np.exp(self.config.batch_effect * self._rng(6, batch).standard_normal() / 2)
        return max(1.0, self.config.depth * effect)

    def cells(self, batch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Type and transcripts of the cells start..stop of a batch, int64 each."""
        n = stop - start
        type_n, depth_n = np.empty(n, np.int64), np.empty(n, np.int64)
        median = self.depth(batch)
        kernels.draw_cells(
            self._salt(batch), start, np.cumsum(self.share_t(batch)), median, DEPTH_SPREAD,
            int(MAX_DEPTH * median), type_n, depth_n,
        )  # fmt: skip
        return type_n, depth_n

    def block(self, batch: int, start: int, stop: int) -> Block:
        """The cells start..stop of a batch."""
        config = self.config
        type_n, depth_n = self.cells(batch, start, stop)
        shape = (config.n_types, config.n_genes)
        threshold_tg, alias_tg = np.empty(shape, np.uint64), np.empty(shape, np.int32)
        weight_tg = self.profile_tg * self.factor_g(batch)
        for t in np.unique(type_n):
            kernels.alias_table(weight_tg[t], threshold_tg[t], alias_tg[t])
        room = int(np.minimum(depth_n, config.n_genes).sum()) + 1  # a value that is not wanted is written too
        indptr = np.zeros(len(type_n) + 1, np.int64)
        indices, data = np.empty(room, np.int32), np.empty(room, np.int32)
        salt = self._salt(batch)
        n = kernels.draw_counts(salt, start, type_n, depth_n, threshold_tg, alias_tg, indptr, indices, data)
        protein_np = np.zeros((len(type_n), config.n_proteins), np.float32)
        if config.n_proteins:
            kernels.draw_proteins(salt, start, type_n, self.protein_tp, 0.5, protein_np)
        return Block(indptr, indices[:n], data[:n], type_n, depth_n, protein_np)

    def _salt(self, batch: int) -> np.uint64:
        words = np.random.SeedSequence([self.config.seed, 7, batch]).generate_state(1, np.uint64)
        return np.uint64(words[0])

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *what])


def make_atlas(config: SimulateConfig) -> Atlas:
    """The atlas of these settings.

    Raises
    ------
    UsageError
        If they can't be.
    """
    for name in ("n_cells", "n_genes", "n_batches", "n_types", "depth"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} = {getattr(config, name)}", fix="at least 1")
    for name in ("n_proteins", "n_columns", "seed", "threads"):
        if getattr(config, name) < 0:
            raise UsageError(f"{name} = {getattr(config, name)}", fix="0 or more")
    if config.n_cells < config.n_batches:
        raise UsageError(
            f"{config.n_cells} cells in {config.n_batches} batches", fix="at least one cell per batch"
        )
    if not 0 <= config.batch_effect <= 5:
        raise UsageError(f"batch_effect = {config.batch_effect}", fix="0 (none) to 5; 0.3 is usual")
    return Atlas(config)
