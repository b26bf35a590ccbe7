"""Expression as a model sees it, minibatch by minibatch: normalised, as parameters, or drawn anew.

Every function is a generator over the minibatches, so that nothing of all cells is held. Arrays are float32,
(n, n_features); with several samples and no mean (n_samples, n, n_features), as scVI's in scvi-tools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamx.errors import UsageError
from streamx.models.cells import Cells
from streamx.models.counts import Counts
from streamx.models.scanvi import Scanvi
from streamx.models.scvi import observed_library
from streamx.models.totalvi_decoder import Proteins
from streamx.posterior.de import Sampler
from streamx.posterior.draws import CountModel, decoded, evaluating, latents

Batches = Sequence[int | None]
OWN: Batches = (None,)  # every cell as its own batch


@dataclass(frozen=True, eq=False)
class Asked:
    """Which expression is wanted.

    Attributes
    ----------
    batches
        Codes of batches to decode every cell as, averaged; None among them: its own.
    genes, proteins
        Positions of the wanted features; default: all.
    library_size
        What a cell's scales add up to; ``"latent"``: its own library size.
    n_samples
        Posterior draws per cell; 0: at the means of the latent variables (of totalVI's background, the
        median), without randomness.
    return_mean
        The mean over the draws; otherwise all of them.
    sample_mixing
        totalVI: draw whether a protein is background, instead of weighting by the probability.
    scale_protein
        totalVI: a cell's proteins add up to 1.
    include_background
        totalVI: the background counts as expression too.
    measured_p
        totalVI: bool (n_proteins,), False hides a protein from the encoder: its expression is imputed.
    """

    batches: Batches = OWN
    genes: np.ndarray | None = None
    proteins: np.ndarray | None = None
    library_size: float | str = 1.0
    n_samples: int = 1
    return_mean: bool = True
    sample_mixing: bool = False
    scale_protein: bool = False
    include_background: bool = False
    measured_p: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.batches:
            raise UsageError("no batch to decode as", fix="leave it out for each cell's own")
        if isinstance(self.library_size, str) and self.library_size != "latent":
            raise UsageError(f"library_size {self.library_size!r}", fix="a number, or latent")


def normalized_expression(
    module: CountModel,
    minibatches: Iterable[Cells],
    asked: Asked | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Normalised expression of genes and, for totalVI, proteins (Lopez 2018; Gayoso 2021).

    Genes: the scale, times ``library_size``; or the mean of the counts, ``"latent"``. Proteins: the
    foreground's mean times its probability, without a batch's efficiency. The same draws of the latent are
    decoded as every batch asked for; scvi-tools draws anew for each.
    """
    asked = asked or Asked()
    yield from _averaged(
        module, minibatches, asked, lambda g, p: _normalized(g, p, asked, generator), generator
    )


def _normalized(
    genes: Counts, proteins: Proteins | None, asked: Asked, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    size = asked.library_size
    gene_ng = genes.rate_ng if isinstance(size, str) else genes.scale_ng * size
    if proteins is None:
        return gene_ng, None
    background_np = torch.sigmoid(proteins.mixing_np)
    if asked.sample_mixing:
        background_np = torch.bernoulli(background_np, generator=generator)
    protein_np = proteins.rate_fore_np * (1 - background_np)
    if asked.include_background:
        protein_np = protein_np + proteins.rate_back_np * background_np
    if asked.scale_protein:
        protein_np = torch.nn.functional.normalize(protein_np, p=1, dim=-1)
    return gene_ng, protein_np


def foreground_probability(
    module: CountModel,
    minibatches: Iterable[Cells],
    asked: Asked | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[np.ndarray]:
    """Probability that a protein's counts are foreground (totalVI).

    Raises
    ------
    UsageError
        If the model has no proteins.
    """

    def probability(genes: Counts, proteins: Proteins | None) -> tuple[Tensor, Tensor | None]:
        if proteins is None:
            raise UsageError("this model has no proteins", fix="train totalVI")
        return genes.scale_ng[:, :0], 1 - torch.sigmoid(proteins.mixing_np)

    for _, found in _averaged(module, minibatches, asked or Asked(), probability, generator):
        assert found is not None
        yield found


def _averaged(
    module: CountModel,
    minibatches: Iterable[Cells],
    asked: Asked,
    value: Callable[[Counts, Proteins | None], tuple[Tensor, Tensor | None]],
    generator: torch.Generator | None,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """``value`` of what is decoded, its mean over batches, and over samples or not."""
    measured_p = None if asked.measured_p is None else torch.as_tensor(asked.measured_p)
    for cells in minibatches:
        samples: list[list[Tensor]] = []
        with evaluating(module):
            for z_nk, library_n in latents(module, cells, asked.n_samples, generator, measured_p):
                parts = [
                    _chosen(value(*_decoded(module, z_nk, library_n, cells, batch, asked, generator)), asked)
                    for batch in asked.batches
                ]
                samples.append([sum(part) / len(parts) for part in zip(*parts, strict=True)])
                if asked.return_mean and len(samples) == 2:  # never more than two of them in memory
                    first, second = samples
                    samples = [[one + two for one, two in zip(first, second, strict=True)]]
        n_samples = max(asked.n_samples, 1)
        if asked.return_mean or n_samples == 1:
            found = [(part / n_samples).cpu().numpy() for part in samples[0]]
        else:
            found = [torch.stack(part).cpu().numpy() for part in zip(*samples, strict=True)]
        yield found[0], found[1] if len(found) > 1 else None


def _decoded(
    module: CountModel,
    z_nk: Tensor,
    library_n: Tensor,
    cells: Cells,
    batch: int | None,
    asked: Asked,
    generator: torch.Generator | None,
) -> tuple[Counts, Proteins | None]:
    genes, proteins = decoded(module, z_nk, library_n, cells, batch, generator)
    if proteins is not None and not asked.n_samples:
        proteins = proteins.at_mean()
    return genes, proteins


def _chosen(found: tuple[Tensor, Tensor | None], asked: Asked) -> list[Tensor]:
    """The wanted features of genes and, where there are any, proteins."""
    chosen = []
    for part, positions in zip(found, (asked.genes, asked.proteins), strict=True):
        if part is not None:
            whole = positions is None or not part.shape[1]
            chosen.append(part if whole else part[:, torch.as_tensor(positions, device=part.device)])
    return chosen


def likelihood_parameters(
    module: CountModel,
    minibatches: Iterable[Cells],
    n_samples: int = 1,
    give_mean: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Parameters of p(x | z), by name: of one draw (n, n_features), of several, or their mean.

    Genes: ``mean`` (before dropout), ``dispersions`` (inverse; not for Poisson), ``dropout`` (probability, of
    zinb alone). totalVI also ``protein_background`` and ``protein_foreground`` (means, with the batch's
    efficiency), ``protein_mixing`` (probability of background) and ``protein_dispersions``.
    """
    for cells in minibatches:
        with evaluating(module):
            draws = [
                _parameters(*decoded(module, z_nk, library_n, cells, None, generator))
                for z_nk, library_n in latents(module, cells, n_samples, generator)
            ]
        stacked = {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}
        if len(draws) == 1:
            yield draws[0]
        else:
            yield {name: values.mean(axis=0) for name, values in stacked.items()} if give_mean else stacked


def _parameters(genes: Counts, proteins: Proteins | None) -> dict[str, np.ndarray]:
    found: dict[str, Tensor] = {"mean": genes.rate_ng}
    if genes.theta is not None:
        found["dispersions"] = genes.theta.expand_as(genes.rate_ng)
    if genes.dropout_ng is not None:
        found["dropout"] = torch.sigmoid(genes.dropout_ng)
    if proteins is not None:
        found["protein_background"], found["protein_foreground"] = proteins.means
        found["protein_mixing"] = torch.sigmoid(proteins.mixing_np)
        found["protein_dispersions"] = proteins.theta.expand_as(proteins.mixing_np)
    return {name: value.cpu().numpy() for name, value in found.items()}


def posterior_predictive(
    module: CountModel,
    minibatches: Iterable[Cells],
    asked: Asked | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Counts drawn anew for each cell, from p(x | z) at draws of its posterior.

    Of ``asked``, ``batches`` (one only), ``genes``, ``proteins`` and ``n_samples`` (at least 1) are looked
    at; several samples are all given. Proteins have the batch's efficiency, which scvi-tools leaves out.

    Raises
    ------
    UsageError
        If several batches are asked for: counts of no batch are their average.
    """
    asked = asked or Asked()
    if len(asked.batches) != 1 or asked.n_samples < 1:
        raise UsageError("counts are drawn as one batch, once or more often", fix="ask for one batch")
    for cells in minibatches:
        draws = []
        with evaluating(module):
            for z_nk, library_n in latents(module, cells, asked.n_samples, generator):
                genes, proteins = decoded(module, z_nk, library_n, cells, asked.batches[0], generator)
                y_np = None if proteins is None else proteins.sample(generator)
                draws.append(_chosen((genes.sample(generator), y_np), asked))
        found = [torch.stack(part).cpu().numpy() for part in zip(*draws, strict=True)]
        found = [part[0] for part in found] if asked.n_samples == 1 else found
        yield found[0], found[1] if len(found) > 1 else None


def latent_library_size(
    module: CountModel,
    minibatches: Iterable[Cells],
    give_mean: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[np.ndarray]:
    """Library sizes (n,): the mean of the posterior, or a draw of it; total counts where it is observed."""
    core = module.vae if isinstance(module, Scanvi) else module
    for cells in minibatches:
        with evaluating(module):
            if core.config.use_observed_lib_size:
                log_n = observed_library(cells)
            else:
                mean_n, var_n = core.encode_library(cells)
                noise_n = torch.randn(mean_n.shape, generator=generator, device=mean_n.device)
                log_n = mean_n + 0.5 * var_n if give_mean else mean_n + var_n.sqrt() * noise_n
        yield log_n.exp().cpu().numpy()


def de_sampler(
    module: CountModel,
    cells_of: Callable[[np.ndarray], Iterable[Cells]],
    asked: Asked | None = None,
    protein_prior_count: float = 0.1,
    generator: torch.Generator | None = None,
) -> Sampler:
    """What :func:`streamx.posterior.de.draw` asks for scales: one draw of each row, genes then proteins.

    Parameters
    ----------
    cells_of
        Minibatches of the cells at given rows, in that order, a row as often as it is given.
    protein_prior_count
        Added to proteins, whose foreground may be all but zero (as scvi-tools does).
    """
    asked = asked or Asked()

    def sampler(row_n: np.ndarray, batch: int | None) -> np.ndarray:
        settings: dict[str, Any] = vars(asked) | {"batches": (batch,), "n_samples": 1}
        parts = []
        for genes_ng, proteins_np in normalized_expression(
            module, cells_of(row_n), Asked(**settings), generator
        ):
            both = [genes_ng] if proteins_np is None else [genes_ng, proteins_np + protein_prior_count]
            parts.append(np.concatenate(both, axis=1))
        return np.concatenate(parts)

    return sampler
