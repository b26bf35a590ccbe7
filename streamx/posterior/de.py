"""Differential expression between two groups of cells, from draws of their posterior expression.

``"vanilla"`` (Lopez 2018) asks how probable it is that the first group expresses more; ``"change"`` (Boyeau
2019) how probable it is that the logarithms of the two (to base 2) differ by at least ``delta``. Everything
here is numpy on draws; only :func:`draw` asks a model for them, through a function.

Two deviations, both off by default. A model's scales are shares of a cell's total, so that a rise of some
genes lowers all others: :func:`relative_to_median` takes the median gene as unchanged. And a probability over
pairs of cells stays well below 1 for a change as small as cells differ among themselves, however many there
are: :func:`draw` can give means of cells. ``benchmarks/de.py`` measures what either does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from streamx.config import DifferentialConfig
from streamx.errors import UsageError

# rows of cells, and a batch code or None -> one draw of expression per row, (n_rows, n_features)
Sampler = Callable[[np.ndarray, int | None], np.ndarray]

_EPS = 1e-8
_SILENT_QUANTILE = 0.9
_LEAST_PSEUDOCOUNT = 1e-10
_LEAST_DELTA, _DELTA_SHARE, _DELTA_MODES = 0.1, 0.6, 3


@dataclass(frozen=True, eq=False)
class Draws:
    """Posterior expression of one group.

    Attributes
    ----------
    scale_sg
        Normalised expression, (n_draws, n_features).
    batch_s
        int64 (n_draws,): the batch that each was decoded as; None where each cell kept its own.
    """

    scale_sg: np.ndarray
    batch_s: np.ndarray | None = None


def draw(
    sampler: Sampler,
    row_n: np.ndarray,
    n_samples: int,
    rng: np.random.Generator,
    batches: Sequence[int] | None = None,
    cells_per_draw: int = 1,
) -> Draws:
    """Draw ``n_samples`` cells of a group with replacement, and one posterior expression of each.

    Parameters
    ----------
    sampler
        Takes rows (ascending, an often drawn cell several times) and a batch code to decode as, or None.
    row_n
        Rows of the group's cells.
    batches
        Batch codes to decode as, which share the draws evenly; None: each cell as its own batch.
    cells_per_draw
        More than 1: every draw is the mean of so many random ones of its batch, at most as many as the group
        has cells, which is the bootstrap of the group's mean.

    Raises
    ------
    UsageError
        If the group has no cell.
    """
    if len(row_n) == 0:
        raise UsageError("a group of no cells", fix="choose groups that have cells")
    n_each = n_samples if batches is None else max(n_samples // len(batches), 2)
    drawn = []
    for batch in (None,) if batches is None else batches:
        scale_sg = sampler(np.sort(rng.choice(row_n, n_each)), batch)[rng.permutation(n_each)]
        drawn.append(_means(scale_sg, min(cells_per_draw, len(row_n)), rng))
    batch_s = None if batches is None else np.repeat(np.asarray(batches, np.int64), n_each)
    return Draws(np.concatenate(drawn), batch_s)


def _means(scale_sg: np.ndarray, n_cells: int, rng: np.random.Generator) -> np.ndarray:
    """As many draws as there are, each the mean of ``n_cells`` random ones."""
    if n_cells == 1:
        return scale_sg
    n = len(scale_sg)
    share = np.full(n * n_cells, 1 / n_cells, scale_sg.dtype)
    first = np.arange(0, len(share) + 1, n_cells)
    return sparse.csr_matrix((share, rng.integers(n, size=len(share)), first), (n, n)) @ scale_sg


def pairs(
    first: Draws, second: Draws, rng: np.random.Generator, m_permutation: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of both groups side by side, (n_pairs, n_features) each.

    Where both were decoded as the same set of batches, the draws of a batch meet draws of the same batch.

    Parameters
    ----------
    m_permutation
        Number of pairs, drawn at random from all possible ones; None: the draws as they came, or, where the
        groups have unequal numbers of them, as many random pairs as the larger has.
    """
    if first.batch_s is None or second.batch_s is None:
        return _paired(first.scale_sg, second.scale_sg, rng, m_permutation)
    batches = np.unique(first.batch_s)
    if not np.array_equal(batches, np.unique(second.batch_s)):
        return _paired(first.scale_sg, second.scale_sg, rng, m_permutation)
    m_each = None if m_permutation is None else m_permutation // len(batches)
    parts = [
        _paired(first.scale_sg[first.batch_s == b], second.scale_sg[second.batch_s == b], rng, m_each)
        for b in batches
    ]
    return np.concatenate([one for one, _ in parts]), np.concatenate([two for _, two in parts])


def _paired(
    one_sg: np.ndarray, two_sg: np.ndarray, rng: np.random.Generator, m_pairs: int | None
) -> tuple[np.ndarray, np.ndarray]:
    if m_pairs is None and len(one_sg) == len(two_sg):
        return one_sg, two_sg
    m_pairs = m_pairs or max(len(one_sg), len(two_sg))
    return one_sg[rng.integers(len(one_sg), size=m_pairs)], two_sg[rng.integers(len(two_sg), size=m_pairs)]


def relative_to_median(one_mg: np.ndarray, two_mg: np.ndarray, n_shares: int | None = None) -> np.ndarray:
    """The second group's draws, scaled so that the median log fold change of each pair is 0.

    The reference is that of median-of-ratios normalisation (Anders & Huber 2010): right where fewer than half
    of the genes change in either direction.

    Parameters
    ----------
    one_mg, two_mg
        Paired draws of both groups.
    n_shares
        The first features, whose scales are shares of a total; the others (proteins) stay as they are.
    """
    median_m = np.median(_log_fold_change(one_mg[:, :n_shares], two_mg[:, :n_shares], 0.0), axis=1)
    scaled_mg = two_mg.astype(np.float64)
    scaled_mg[:, :n_shares] *= np.exp2(median_m)[:, None]
    return scaled_mg


def vanilla(one_mg: np.ndarray, two_mg: np.ndarray) -> dict[str, np.ndarray]:
    """Probability that the first group expresses more, and its Bayes factor (Lopez 2018)."""
    proba_g = np.mean(one_mg > two_mg, axis=0)
    return {"proba_m1": proba_g, "proba_m2": 1 - proba_g, "bayes_factor": bayes_factor(proba_g)}


def change(
    one_mg: np.ndarray,
    two_mg: np.ndarray,
    *,
    delta: float | None = 0.25,
    pseudocount: float = 0.0,
    test_mode: str = "two",
    intervals: Sequence[float] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Probability that log2 fold changes are at least ``delta`` in size, and how they are distributed.

    Parameters
    ----------
    one_mg, two_mg
        Paired draws of both groups.
    delta
        Size of a change that counts; None: :func:`estimated_delta` of the mean changes.
    pseudocount
        Added to every scale. The fold changes that are described get a thousandth of it, so as to be told
        correctly, as in scvi-tools.
    test_mode
        ``"two"``: a change in either direction; ``"three"``: in the more probable of the two directions.
    intervals
        Levels of highest-density intervals, such as 0.95.
    seed
        Of the mixture that finds ``delta``.
    """
    lfc_mg = _log_fold_change(one_mg, two_mg, pseudocount)
    if delta is None:
        delta = estimated_delta(lfc_mg.mean(axis=0), seed)
    up_g, down_g = np.mean(lfc_mg >= delta, axis=0), np.mean(lfc_mg <= -delta, axis=0)
    proba_g = np.maximum(up_g, down_g) if test_mode == "three" else up_g + down_g
    if pseudocount:
        lfc_mg = _log_fold_change(one_mg, two_mg, 1e-3 * pseudocount)
    result = {
        "proba_de": proba_g,
        "proba_not_de": 1 - proba_g,
        "bayes_factor": bayes_factor(proba_g),
        "pseudocounts": pseudocount,
        "delta": delta,
        "lfc_mean": lfc_mg.mean(axis=0),
        "lfc_median": np.median(lfc_mg, axis=0),
        "lfc_std": lfc_mg.std(axis=0),
        "lfc_min": lfc_mg.min(axis=0),
        "lfc_max": lfc_mg.max(axis=0),
    }
    for level in intervals:
        low_g, high_g = densest_interval(lfc_mg, level)
        result[f"lfc_confidence_interval_{level}_min"] = low_g
        result[f"lfc_confidence_interval_{level}_max"] = high_g
    return result


def _log_fold_change(one_mg: np.ndarray, two_mg: np.ndarray, pseudocount: float) -> np.ndarray:
    # A softmax in float32 can give zeros: two of them are no change, and not a difference of infinities.
    least = np.finfo(np.float32).tiny
    log_one_mg = np.log2(np.maximum(one_mg.astype(np.float64) + pseudocount, least))
    return log_one_mg - np.log2(np.maximum(two_mg.astype(np.float64) + pseudocount, least))


def bayes_factor(proba_g: np.ndarray) -> np.ndarray:
    """ln(p + 1e-8) - ln(1 - p + 1e-8)."""
    return np.log(proba_g + _EPS) - np.log(1 - proba_g + _EPS)


def estimated_pseudocount(
    one_mg: np.ndarray, two_mg: np.ndarray, silent1_g: np.ndarray, silent2_g: np.ndarray
) -> float:
    """A pseudocount below which scales are noise, from genes that hardly have counts.

    The 0.9 quantile of the largest scales of a group's silent genes, the larger of both groups, divided by
    the number of genes; at least 1e-10 (scvi-tools from 1.0 on).

    Parameters
    ----------
    silent1_g, silent2_g
        bool (n_features,): the gene's mean count in the group is below 0.01.
    """
    noise = [
        np.quantile(scale_mg.max(axis=0)[silent_g], _SILENT_QUANTILE) if silent_g.any() else 0.0
        for scale_mg, silent_g in ((one_mg, silent1_g), (two_mg, silent2_g))
    ]
    return max(_LEAST_PSEUDOCOUNT, float(max(noise)) / one_mg.shape[1])


def estimated_delta(lfc_mean_g: np.ndarray, seed: int = 0) -> float:
    """A size of change that counts: 0.6 x the mean size of the outer two of three modes, at least 0.1."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(n_components=_DELTA_MODES, random_state=seed).fit(lfc_mean_g[:, None])
    modes = np.sort(mixture.means_[:, 0])
    return max(_LEAST_DELTA, _DELTA_SHARE * float(np.abs(modes[[0, -1]]).mean()))


def densest_interval(values_mg: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The narrowest interval that holds the share ``level`` of the draws, per feature: low, high.

    Raises
    ------
    UsageError
        If ``level`` is not within (0, 1).
    """
    if not 0 < level < 1:
        raise UsageError(f"an interval of level {level}", fix="between 0 and 1, such as 0.95")
    sorted_mg = np.sort(values_mg, axis=0)
    n_inside = int(level * len(sorted_mg))
    start_g = np.argmin(sorted_mg[n_inside:] - sorted_mg[: len(sorted_mg) - n_inside], axis=0)
    columns = np.arange(sorted_mg.shape[1])
    return sorted_mg[start_g, columns], sorted_mg[start_g + n_inside, columns]


def fdr_calls(proba_g: np.ndarray, target: float = 0.05) -> np.ndarray:
    """Which features to call, so that the expected share of false ones is at most ``target``; bool.

    Features in descending order of probability; the first d, where d counts those at which the mean of
    (1 - probability) so far is at most ``target``. Ties are called in the order of the features.
    """
    order_g = np.argsort(-proba_g, kind="stable")
    expected_g = np.cumsum(1 - proba_g[order_g]) / np.arange(1, len(proba_g) + 1)
    calls_g = np.zeros(len(proba_g), bool)
    calls_g[order_g[: int((expected_g <= target).sum())]] = True
    return calls_g


@dataclass(frozen=True, eq=False)
class GroupSums:
    """Sums over a group's cells, as one pass over the counts accumulates them.

    Attributes
    ----------
    n_cells
        Cells of the group.
    sum_g, nonzero_g
        Sum of counts and number of cells with a count, (n_features,).
    normalized_g
        Sum of counts scaled to 10,000 per cell; NaN for proteins, which are not scaled.
    """

    n_cells: int
    sum_g: np.ndarray
    nonzero_g: np.ndarray
    normalized_g: np.ndarray

    def columns(self, group: int) -> dict[str, np.ndarray]:
        """Means over the cells, named as scvi-tools names them for its group 1 or 2."""
        return {
            f"raw_mean{group}": self.sum_g / self.n_cells,
            f"non_zeros_proportion{group}": self.nonzero_g / self.n_cells,
            f"raw_normalized_mean{group}": self.normalized_g / self.n_cells,
        }


def compare(
    first: Draws,
    second: Draws,
    config: DifferentialConfig,
    rng: np.random.Generator,
    sums: tuple[GroupSums, GroupSums] | None = None,
    n_shares: int | None = None,
) -> dict[str, Any]:
    """Every column of a differential expression table, in the order of the features; scalars hold for all.

    Parameters
    ----------
    first, second
        Draws of both groups, from :func:`draw`.
    config
        Mode, delta, pseudocount, false discovery rate and so on.
    rng
        Pairs draws, where they have to be.
    sums
        Of both groups' raw counts: adds their means to the table. Needed where the pseudocount is estimated.
    n_shares
        The first features, whose scales are shares of a total (:func:`relative_to_median`); None: all.

    Raises
    ------
    UsageError
        If the pseudocount is to be estimated without ``sums``.
    """
    one_mg, two_mg = pairs(first, second, rng, config.m_permutation)
    if config.relative_to == "median":
        two_mg = relative_to_median(one_mg, two_mg, n_shares)
    if config.mode == "vanilla":
        result: dict[str, Any] = vanilla(one_mg, two_mg)
    else:
        result = change(
            one_mg,
            two_mg,
            delta=config.delta,
            pseudocount=_pseudocount(one_mg, two_mg, config, sums),
            test_mode=config.test_mode,
            intervals=config.intervals,
            seed=config.seed,
        )
        result[f"is_de_fdr_{config.fdr_target}"] = fdr_calls(result["proba_de"], config.fdr_target)
    result |= {"scale1": first.scale_sg.mean(axis=0), "scale2": second.scale_sg.mean(axis=0)}
    if sums is not None:
        result |= sums[0].columns(1) | sums[1].columns(2)
    return result


def _pseudocount(
    one_mg: np.ndarray,
    two_mg: np.ndarray,
    config: DifferentialConfig,
    sums: tuple[GroupSums, GroupSums] | None,
) -> float:
    if config.pseudocount is not None:
        return config.pseudocount
    if sums is None:
        raise UsageError(
            "a pseudocount can't be estimated without raw counts", fix="give one, or the groups' sums"
        )
    silent = [group.sum_g / group.n_cells < config.silent_below for group in sums]
    return estimated_pseudocount(one_mg, two_mg, *silent)


def ranked(result: dict[str, Any]) -> np.ndarray:
    """Features in the order of a table: by descending ``proba_de`` (change) or ``bayes_factor`` (vanilla)."""
    return np.argsort(-result["proba_de" if "proba_de" in result else "bayes_factor"], kind="stable")
