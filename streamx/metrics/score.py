"""Every metric of a latent space from as few neighbour searches as the cells allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from streamx.config import UNLABELED, MetricsConfig
from streamx.errors import BadValuesError, EmptyError
from streamx.labels import Labels, encode_labels
from streamx.metrics import clusters, lisi, mixing, silhouette
from streamx.metrics.measure import (
    Measure,
    mean_of,
    mean_of_means,
    mean_of_samples,
    median_of,
    scaled,
    undefined,
)
from streamx.metrics.space import Space
from streamx.neighbors import Neighbors
from streamx.neighbors.blocks import finite_rows

BATCH_METRICS = ("batch_entropy_mixing", "ebm", "ilisi", "kbet", "same_batch", "asw_batch")
LABEL_METRICS = (
    "clisi",
    "knn_purity",
    "silhouette",
    "asw_label",
    "graph_connectivity",
    "nmi",
    "ari",
)
SILHOUETTES = 0.8  # of max_cells: rows whose silhouettes are sampled, over all repeats
SILHOUETTE_REPEATS = 8
CLUSTERED = 4  # times max_cells: a sketch that is clustered
SKETCHES = 10  # their spread is the interval of a clustering metric


@dataclass(frozen=True)
class Scores:
    """Metrics by name: ``scores["ilisi"]`` is the number, ``scores.measures["ilisi"]`` what it rests on."""

    measures: dict[str, Measure]
    notes: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float | None:
        return self.measures[name].value

    @property
    def values(self) -> dict[str, float | None]:
        """The numbers alone."""
        return {name: measure.value for name, measure in self.measures.items()}

    def to_json(self) -> dict[str, Any]:
        """One key per metric (a number, or None), and ``details``: how each was computed, why one is None."""
        details = {name: measure.details() for name, measure in self.measures.items()}
        return {**self.values, "details": details, **self.notes}


def score_latent(
    latent_nk: np.ndarray,
    batches: Any = None,
    labels: Any = None,
    *,
    unlabeled: Sequence[str] = UNLABELED,
    max_cells: int = MetricsConfig.max_cells,
    resolution: float | str = "best",
    seed: int = 0,
    threads: int = 0,
    progress: str | None = None,
) -> Scores:
    """Mixing of batches and separation of labels in a latent space.

    Up to `max_cells` cells every metric is exact (but for the two entropy scores, which are defined by 10,000
    and 5,000 draws). Above, each is estimated, with a 95 % confidence interval:

    * Metrics of neighbours from one search: `max_cells` sampled cells against *all* cells (and more of rare
      labels for knn_purity, which needs each label's mean). An approximate search reaches a recall of .99 on
      a sample of them, or warns. Missed neighbours moved no metric of 100,000 cells by more than .0003, but
      NMI by .003 and ARI by .03, which a graph changed so little already sends to other clusters.
    * Silhouettes from eight disjoint samples of cells, .8 `max_cells` together; each label or batch is
      represented by drawn cells and by its moments (:func:`~.silhouette.sampled_silhouettes`).
    * Graph connectivity from the graph of all cells, without an interval; as its search has the same
      recall, it is not called exact (details: knn_recall). So are NMI and ARI, up to 4 `max_cells`.
    * Above, NMI and ARI are those of ten sketches of 4 `max_cells` cells, each with its own graph (details:
      sketch): they estimate what a sketch of that size gives, and a sketch's graph is coarser than that of
      all cells. ``"best"`` looks for the resolution on the first sketch.

    ======================  =========================================================================
    batch_entropy_mixing    SCALEX, 100 neighbours; 0 to ln 2 = 0.693
    ebm                     scArches, 50 neighbours; 0 to 1
    kbet                    share of cells around which 50 neighbours pass the chi-squared test; 0 to .95
    ilisi, clisi            median LISI, 90 neighbours, scaled to 0-1 as scib (1 = mixed; 1 = separated)
    same_batch              share of 30 neighbours from the own batch (details: perfectly mixed)
    knn_purity              scArches, 50 neighbours; 0 to 1
    silhouette              of labels, mean over cells; -1 to 1
    asw_label               (silhouette + 1) / 2
    asw_batch               1 - |silhouette of batches| inside each label; 0 to 1
    graph_connectivity      labels in one piece of the 15-neighbour graph; 0 to 1
    nmi, ari                Leiden clusters of the 15-neighbour graph against labels
    ======================  =========================================================================

    Batch metrics use all cells, label metrics (and asw_batch) the labelled ones. Cells without a latent are
    left out and counted (``n_without_latent``).

    Parameters
    ----------
    latent_nk
        (n_cells, n_latent) float; rows with NaN are left out. May be memory-mapped; a copy without them, if
        large, lies in a file without a name in the system's folder for such.
    batches, labels
        One per cell, or None. Missing labels and those in `unlabeled` are none.
    resolution
        Of Leiden; ``"best"`` tries 0.1, 0.2, ..., 2.0 and keeps the best NMI (scArches' get_nmi).
    progress
        Title of a progress bar.

    Returns
    -------
    Scores
        A metric that isn't defined for these cells (one batch, one label) is None, with a reason.
    """
    latent_nk = np.asanyarray(latent_nk)
    batch = None if batches is None else encode_labels(batches, ())
    label = None if labels is None else encode_labels(labels, unlabeled)
    for name, given in (("batches", batch), ("labels", label)):
        if given is not None and len(given) != len(latent_nk):
            raise BadValuesError(f"{len(given):,} {name} for {len(latent_nk):,} cells")
    keep = finite_rows(latent_nk)
    if not keep.any():
        raise EmptyError("no cell has a latent", fix="project with a lower min_features")
    space = Space(latent_nk, len(latent_nk) <= max_cells, max_cells, seed, threads).take(keep)
    batch = None if batch is None else batch.take(keep)
    label = None if label is None else label.take(keep)
    if batch is not None and not batch.known_n.all():  # a missing batch is a batch of its own
        batch = encode_labels(batch.text("missing"), ())

    bar = tqdm(total=5, desc=progress, disable=None if progress else True, leave=False)
    with bar:
        measures, found = _batch_measures(space, batch)
        bar.update()
        measures |= _label_measures(space, batch, label, found, resolution, bar)
    notes: dict[str, Any] = {"n_cells": space.n, "n_without_latent": int((~keep).sum())}
    if found is not None:
        notes["knn_recall"] = found.recall
    return Scores(measures, notes)


def _why_not(labels: Labels | None, kind: str, n: int) -> str | None:
    """Why metrics of these batches or labels can't be computed, or None if they can."""
    if labels is None:
        return f"no {kind} given"
    if len(labels.names) < 2:
        return f"needs two {kind}, there is {len(labels.names) or 'none'}"
    if n < 3:
        return f"needs three cells, there are {n}"
    return None


def _batch_measures(space: Space, batch: Labels | None) -> tuple[dict[str, Measure], Neighbors | None]:
    """Metrics of batches, and the neighbours that they rest on: of all cells, or of the sample."""
    reason = _why_not(batch, "batches", space.n)
    if reason is not None or batch is None:
        return {name: undefined(reason or "") for name in BATCH_METRICS if name != "asw_batch"}, None
    rows = None if space.exact else space.sample(space.max_cells)
    draws = None if rows is not None else mixing.draw_cells(space.n, mixing.BEM_POOLS, seed=space.seed)
    found = space.around(rows, mixing.BEM_NEIGHBORS)
    own = batch.codes_n if rows is None else batch.codes_n[rows]
    codes = batch.codes_n[found.indices_nm]
    n_batches, exact, seed = len(batch.names), space.exact, space.seed
    share_b = np.bincount(batch.codes_n, minlength=n_batches) / space.n
    scalex = mixing.mixing_entropies(codes, share_b)
    scarches = mixing.batch_entropies(codes[:, : mixing.EBM_NEIGHBORS], n_batches)
    near = lisi.LISI_NEIGHBORS - 1
    local = lisi.lisi(found.distances_nm[:, :near], codes[:, :near], n_batches)
    tested = codes[:, : mixing.KBET_NEIGHBORS - 1]
    few = None if draws is None else draws[: mixing.EBM_POOLS]
    return {
        "batch_entropy_mixing": mixing.batch_entropy_mixing(scalex, draws, n_batches, seed),
        "ebm": mixing.entropy_batch_mixing(scarches, few, seed),
        "ilisi": scaled(median_of(local, exact, seed), 1, n_batches),
        "kbet": mixing.kbet(tested, own, share_b, exact, seed),
        "same_batch": mixing.same_batch(codes[:, : mixing.SAME_NEIGHBORS], own, share_b, exact, seed),
    }, found


def _label_measures(
    space: Space,
    batch: Labels | None,
    label: Labels | None,
    found: Neighbors | None,
    resolution: float | str,
    bar: Any,
) -> dict[str, Measure]:
    """Metrics of labels on the labelled cells; if these are all, from the neighbours already `found`."""
    known = np.zeros(0, dtype=bool) if label is None else label.known_n
    reason = _why_not(label, "labels", int(known.sum()))
    if reason is not None or label is None:
        return {name: undefined(reason or "") for name in ("asw_batch", *LABEL_METRICS)}
    if not known.all():
        space, found, label = space.take(known), None, label.take(known)
        batch = None if batch is None else batch.take(known)
    rows = None if space.exact else space.sample(space.max_cells)
    found = space.around(rows, lisi.LISI_NEIGHBORS - 1) if found is None else found
    local = lisi.lisi(
        found.distances_nm[:, : lisi.LISI_NEIGHBORS - 1],
        label.codes_n[found.indices_nm[:, : lisi.LISI_NEIGHBORS - 1]],
        len(label.names),
    )
    measures = {"clisi": scaled(median_of(local, space.exact, space.seed), len(label.names), 1)}
    measures["knn_purity"] = _purity(space, label, rows, found.indices_nm[:, : mixing.PURITY_NEIGHBORS])
    bar.update()
    measures["asw_batch"] = _asw_batch(space, batch, label.codes_n)
    bar.update()
    measures |= _silhouettes(space, label.codes_n, len(label.names))
    bar.update()
    measures |= _cluster_measures(space, label.codes_n, found if space.exact else None, resolution)
    bar.update()
    return measures


def _purity(space: Space, label: Labels, rows: np.ndarray | None, indices_mj: np.ndarray) -> Measure:
    """k-NN purity; of a sample, with more cells of labels that are rare in it."""
    codes = label.codes_n
    around, own = codes[indices_mj], codes
    if rows is not None:
        enough = max(space.max_cells // (2 * len(label.names)), 2)
        more = space.more_of_each(label, rows, enough)
        further = space.around(more, mixing.PURITY_NEIGHBORS).indices_nm
        around, own = np.concatenate([around, codes[further]]), codes[np.concatenate([rows, more])]
    return mixing.knn_purity(around, own, space.exact, space.seed, np.bincount(codes))


def _silhouettes(space: Space, codes: np.ndarray, n_labels: int) -> dict[str, Measure]:
    if n_labels > len(codes) - 1:
        reason = f"every cell has its own label ({n_labels} labels, {len(codes)} cells)"
        return {"silhouette": undefined(reason), "asw_label": undefined(reason)}
    if space.exact:
        mean = mean_of(silhouette.silhouette_samples(space.latent_nk, codes, threads=space.threads), True)
    else:
        n_rows = int(SILHOUETTES * space.max_cells)
        means_r = silhouette.sampled_label_silhouettes(
            space.latent_nk,
            codes,
            n_rows=n_rows,
            n_references=space.max_cells,
            repeats=SILHOUETTE_REPEATS,
            seed=space.seed,
            threads=space.threads,
        )
        mean = mean_of_samples(means_r, n_rows, space.seed)
    return {"silhouette": mean, "asw_label": scaled(mean, -1, 1)}


def _asw_batch(space: Space, batch: Labels | None, codes: np.ndarray) -> Measure:
    if batch is None:
        return undefined("no batches given")
    nothing = undefined("no label has cells in two batches")
    if space.exact:
        scores, owners = silhouette.batch_silhouettes(
            space.latent_nk, codes, batch.codes_n, threads=space.threads
        )
        owners = np.unique(owners, return_inverse=True)[1]
        return mean_of_means(scores, owners, True, None, np.bincount(owners)) if len(scores) else nothing
    means_r, n = silhouette.sampled_batch_silhouettes(
        space.latent_nk,
        codes,
        batch.codes_n,
        n_rows=int(SILHOUETTES * space.max_cells),
        n_references=space.max_cells,
        repeats=SILHOUETTE_REPEATS,
        seed=space.seed,
        threads=space.threads,
    )
    return mean_of_samples(means_r, n, space.seed) if len(means_r) else nothing


def _cluster_measures(
    space: Space, codes: np.ndarray, found: Neighbors | None, resolution: float | str
) -> dict[str, Measure]:
    """Graph connectivity of all cells; NMI and ARI of all cells, or their mean over sketches of cells."""
    others, size = clusters.GRAPH_NEIGHBORS - 1, CLUSTERED * space.max_cells
    if space.n > size:
        return _connectivity(space, codes) | _of_sketches(space, codes, size, resolution)
    found = space.around(None, others) if found is None else found
    recall = None if found.method == "exact" else found.recall
    connectivity = clusters.graph_connectivity(found.indices_nm[:, :others], codes)
    measures = {"graph_connectivity": _of_graph(connectivity, len(codes), recall)}
    one = _clustering(found.first(others), codes, resolution, space.seed)
    extra = {"resolution": one["resolution"], "n_clusters": int(one["n_clusters"])}
    for name in ("nmi", "ari"):
        measures[name] = _of_graph(one[name], len(codes), recall, space.seed, extra)
    return measures


def _connectivity(space: Space, codes: np.ndarray) -> dict[str, Measure]:
    """Of all cells, however many."""
    indices_nj, recall = space.graph(clusters.GRAPH_NEIGHBORS - 1)
    value = clusters.graph_connectivity(indices_nj, codes)
    return {"graph_connectivity": _of_graph(value, len(codes), recall)}


def _of_graph(
    value: float,
    n: int,
    recall: float | None,
    seed: int | None = None,
    extra: dict[str, Any] | None = None,
) -> Measure:
    """A metric of the graph of all cells; exact if its search was (no `recall`): else edges are missing."""
    lacking = {} if recall is None else {"knn_recall": recall}
    return Measure(value, recall is None, n, seed=seed, extra=(extra or {}) | lacking or None)


def _of_sketches(space: Space, codes: np.ndarray, size: int, resolution: float | str) -> dict[str, Measure]:
    """NMI and ARI of sketches of `size` cells; ``"best"`` is looked for on the first."""
    rng = np.random.default_rng(space.seed)
    runs: list[dict[str, float]] = []
    for _ in range(SKETCHES):
        rows = np.sort(rng.choice(space.n, size, replace=False))
        part = replace(space, latent_nk=np.asarray(space.latent_nk[rows]), exact=False)
        found = part.around(None, clusters.GRAPH_NEIGHBORS - 1)
        runs.append(_clustering(found, codes[rows], resolution, space.seed))
        resolution = runs[0]["resolution"]

    def over(name: str) -> Measure:
        values = np.array([run[name] for run in runs])
        about = {"samples": SKETCHES, "sketch": size, "resolution": resolution}
        return mean_of_samples(values, size, space.seed, **about)

    return {name: over(name) for name in ("nmi", "ari")}


def _clustering(found: Neighbors, codes: np.ndarray, resolution: float | str, seed: int) -> dict[str, float]:
    graph = clusters.fuzzy_graph(found.indices_nm, found.distances_nm)
    return clusters.cluster_agreement(graph, codes, resolution, seed)
