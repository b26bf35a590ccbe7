"""The fully connected layers that the count models share, with covariates as columns that are added by index.

What scvi-tools does by appending one-hot codes to a layer's input is done here by adding the code's column to
its output: the same sum, without the zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamx.models.layers import batch_norm
from streamx.models.sparse import Rows, SparseLinear

NORM_MOMENTUM, NORM_EPS = 0.01, 1e-3  # of scVI's batch norm
LAYER_NORM_EPS = 1e-5


def n_columns(n_levels: int) -> int:
    """Columns of a category: one with a single level has none, as it says nothing."""
    return n_levels if n_levels > 1 else 0


def dropped(h_nh: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Dropout by one's own generator: each value is 0 with probability ``share``, the rest is scaled up."""
    if share == 0:
        return h_nh
    kept_nh = torch.rand(h_nh.shape, generator=generator, device=h_nh.device) >= share
    return h_nh * (kept_nh * (1 / (1 - share)))


class CovariateLinear(nn.Module):
    """x W' + bias, plus the columns of the batch and of further categories, plus continuous covariates.

    Parameters
    ----------
    n_in, n_out
        Width of x and of the result.
    n_batches
        Batches: None for a layer that they do not enter. One batch has no column yet: its table is of shape
        (n_out, 0), and can grow (:mod:`streamx.models.grow`).
    n_levels
        Levels of each further categorical covariate.
    n_continuous
        Number of continuous covariates.
    generator
        Weights are drawn from it as torch does for a layer whose input holds the covariates too: uniform,
        +-1/sqrt(all inputs).
    sparse
        x may be sparse rows (CPU).

    Attributes
    ----------
    linear
        Weights (n_out, n_in) and bias.
    batch, category, continuous
        (n_out, n_batches), (n_out, sum of levels) and (n_out, n_continuous), or None.
    """

    batch: nn.Parameter | None
    category: nn.Parameter | None
    continuous: nn.Parameter | None
    kept_c: Tensor
    first_c: Tensor

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        generator: torch.Generator,
        n_batches: int | None = None,
        n_levels: tuple[int, ...] = (),
        n_continuous: int = 0,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        n_batch_columns = n_columns(n_batches or 0)
        levels = [n_columns(n) for n in n_levels]
        widths = [n_in, n_continuous, n_batch_columns, sum(levels)]
        bound = 1 / math.sqrt(sum(widths))
        weight = torch.empty(n_out, sum(widths)).uniform_(-bound, bound, generator=generator)
        parts = [part.contiguous() for part in weight.split(widths, dim=1)]
        self.linear = nn.utils.skip_init(SparseLinear if sparse else nn.Linear, n_in, n_out)
        if sparse:
            parts[0] = parts[0].t().contiguous().t()
        self.linear.weight = nn.Parameter(parts[0])
        with torch.no_grad():
            self.linear.bias.uniform_(-bound, bound, generator=generator)
        self.continuous = nn.Parameter(parts[1]) if n_continuous else None
        self.batch = None if n_batches is None else nn.Parameter(parts[2])
        self.category = nn.Parameter(parts[3]) if sum(levels) else None
        self._lay_levels(n_levels)

    def _lay_levels(self, n_levels: tuple[int, ...]) -> None:
        """Where each category's columns begin; categories without columns are left out."""
        levels = [n_columns(n) for n in n_levels]
        self.n_levels = n_levels
        device = self.linear.weight.device
        kept = [c for c, n in enumerate(levels) if n]
        kept_c = torch.tensor(kept, dtype=torch.int64, device=device)
        self.register_buffer("kept_c", kept_c, persistent=False)
        kept_levels = [0, *(n for n in levels if n)]
        first_c = torch.tensor(kept_levels[:-1], dtype=torch.int64, device=device).cumsum(0)
        self.register_buffer("first_c", first_c, persistent=False)

    def forward(
        self,
        x: Tensor | Rows,
        batch_n: Tensor | None = None,
        category_nc: Tensor | None = None,
        continuous_nc: Tensor | None = None,
    ) -> Tensor:
        """(n, n_in) -> (n, n_out); codes int64."""
        h_nh = self.linear(x)
        if self.continuous is not None:
            assert continuous_nc is not None
            h_nh = h_nh + continuous_nc @ self.continuous.t()
        if self.batch is not None and self.batch.shape[1]:
            assert batch_n is not None
            h_nh = h_nh + F.embedding(batch_n, self.batch.t())
        if self.category is not None:
            assert category_nc is not None
            columns_nc = category_nc[:, self.kept_c] + self.first_c
            h_nh = h_nh + F.embedding(columns_nc, self.category.t()).sum(1)
        return h_nh

    def new_batch(self, name: str, generator: torch.Generator) -> Tensor:
        """The column (n_out,) of one batch more, drawn as in a layer of two batches.

        However many there are: what a batch begins with does not depend on those that came before it (in
        scvi-tools it does, by the width of the layer).
        """
        assert name == "batch"
        return self._new_column(generator)

    def _new_column(self, generator: torch.Generator) -> Tensor:
        """A column as in a layer of two batches, and of two levels of each category."""
        n_continuous = 0 if self.continuous is None else self.continuous.shape[1]
        bound = 1 / math.sqrt(self.linear.weight.shape[1] + n_continuous + 2 + 2 * len(self.n_levels))
        return torch.empty(len(self.linear.weight)).uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def add_level(self, category: int, generator: torch.Generator) -> None:
        """One level more of a category, in place, drawn as a new batch's column; the others keep their bits.

        A category of a single level has no column: it gets one of zeros, and its cells the results that they
        had.
        """
        stop = sum(n_columns(n) for n in self.n_levels[: category + 1])
        new = [self._new_column(generator).to(self.linear.weight)]
        if self.n_levels[category] == 1:
            new.insert(0, torch.zeros_like(new[0]))
        old = self.linear.weight.new_zeros(len(new[0]), 0) if self.category is None else self.category
        longer = torch.cat([old[:, :stop], torch.stack(new, 1), old[:, stop:]], 1)
        self.category = nn.Parameter(longer, requires_grad=self.linear.weight.requires_grad)
        n_levels = list(self.n_levels)
        n_levels[category] += 1
        self._lay_levels(tuple(n_levels))

    def last_levels(self, n_new: Sequence[int]) -> Tensor:
        """Where the columns of so many last levels of each category are: bool, of the table's shape."""
        assert self.category is not None
        mask, stop = torch.zeros_like(self.category, dtype=torch.bool), 0
        for n, new in zip(self.n_levels, n_new, strict=True):
            stop += n_columns(n)
            mask[:, stop - new : stop] = True
        return mask


class Layer(nn.Module):
    """Linear with covariates -> batch norm -> layer norm (no weights) -> ReLU -> dropout."""

    def __init__(self, columns: CovariateLinear, *, norm: bool, layer_norm: bool, dropout: float) -> None:
        super().__init__()
        n_out = columns.linear.out_features
        self.columns = columns
        self.norm = nn.BatchNorm1d(n_out, eps=NORM_EPS, momentum=NORM_MOMENTUM) if norm else None
        self.layer_norm, self.dropout = layer_norm, dropout

    def forward(
        self,
        x: Tensor | Rows,
        batch_n: Tensor | None = None,
        category_nc: Tensor | None = None,
        continuous_nc: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        h_nh = self.columns(x, batch_n, category_nc, continuous_nc)
        if self.norm is not None:
            h_nh = batch_norm(self.norm, h_nh)
        if self.layer_norm:
            h_nh = F.layer_norm(h_nh, h_nh.shape[-1:], eps=LAYER_NORM_EPS)
        h_nh = F.relu(h_nh)
        return dropped(h_nh, self.dropout, generator) if self.training else h_nh


class Stack(nn.Module):
    """``n_layers`` of :class:`Layer`.

    Parameters
    ----------
    n_in, n_hidden, n_layers
        Width of the input; width of every layer; number of layers.
    deep
        Batches and categories enter every layer, not the first alone. Continuous covariates enter the first.
    norm, layer_norm, dropout
        Batch norm; layer norm; share of units dropped while training.
    n_batches, n_levels, n_continuous, generator, sparse
        As :class:`CovariateLinear`; only the first layer may take sparse rows.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_layers: int,
        *,
        generator: torch.Generator,
        n_batches: int | None = None,
        n_levels: tuple[int, ...] = (),
        n_continuous: int = 0,
        deep: bool = True,
        norm: bool = True,
        layer_norm: bool = False,
        dropout: float = 0.0,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for number in range(n_layers):
            first, enters = number == 0, number == 0 or deep
            columns = CovariateLinear(
                n_in if first else n_hidden,
                n_hidden,
                generator=generator,
                n_batches=n_batches if enters else None,
                n_levels=n_levels if enters else (),
                n_continuous=n_continuous if first else 0,
                sparse=sparse and first,
            )
            self.layers.append(Layer(columns, norm=norm, layer_norm=layer_norm, dropout=dropout))

    def forward(
        self,
        x: Tensor | Rows,
        batch_n: Tensor | None = None,
        category_nc: Tensor | None = None,
        continuous_nc: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(n, n_in) -> (n, n_hidden), float32; codes int64. ``generator`` draws the dropout in training."""
        h: Tensor | Rows = x
        for layer in self.layers:
            h = layer(h, batch_n, category_nc, continuous_nc, generator)
        assert isinstance(h, Tensor)
        return h
