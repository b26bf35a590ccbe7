"""Every metric of a latent space from as few neighbour searches as the cells allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
from streamx.neighbors import Neighbors, nearest

BATCH_METRICS = ("batch_entropy_mixing", "ebm", "ilisi", "same_batch", "asw_batch")
LABEL_METRICS = (
    "clisi",
    "knn_purity",
    "silhouette",
    "asw_label",
    "graph_connectivity",
    "nmi",
    "ari",
)
SAMPLED_SILHOUETTES, SAMPLED_PER_LABEL = 2000, 500
CLUSTERED_SAMPLES = 5  # of max_cells / 4 each: their spread is the interval of a clustering metric


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


@dataclass(frozen=True)
class _Space:
    """Cells with a latent, and how to look at them."""

    latent_nk: np.ndarray
    exact: bool
    max_cells: int
    seed: int
    threads: int

    def around(self, rows: np.ndarray | None, n_neighbors: int) -> Neighbors:
        """Neighbours of `rows` (None: of all cells) among all cells; always exact."""
        own = np.arange(len(self.latent_nk)) if rows is None else rows
        return nearest(
            self.latent_nk,
            self.latent_nk[own],
            n_neighbors,
            own_m=own,
            method="exact",
            threads=self.threads,
            memory="1TB",  # latents are in memory already, and a search works in blocks
        )

    def take(self, keep_n: np.ndarray) -> _Space:
        latent_nk = self.latent_nk[keep_n]
        return _Space(latent_nk, len(latent_nk) <= self.max_cells, self.max_cells, self.seed, self.threads)

    def sample(self, size: int) -> np.ndarray:
        """Sorted rows, drawn without replacement."""
        n = len(self.latent_nk)
        return np.sort(np.random.default_rng(self.seed).choice(n, min(size, n), replace=False))


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
) -> Scores:
    """Mixing of batches and separation of labels in a latent space.

    Up to `max_cells` cells every metric is exact (but for the two entropy scores, which are defined by 10,000
    and 5,000 draws). Above, neighbours and silhouettes are exact for a seeded sample of cells against *all*
    cells, and clusters come from samples; each such value has a 95 % confidence interval.

    ======================  =========================================================================
    batch_entropy_mixing    SCALEX, 100 neighbours; 0 to ln 2 = 0.693
    ebm                     scArches, 50 neighbours; 0 to 1
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
        (n_cells, n_latent) float; rows with NaN are left out.
    batches, labels
        One per cell, or None. Missing labels and those in `unlabeled` are none.
    resolution
        Of Leiden; ``"best"`` tries 0.1, 0.2, ..., 2.0 and keeps the best NMI (scArches' get_nmi).

    Returns
    -------
    Scores
        A metric that isn't defined for these cells (one batch, one label) is None, with a reason.
    """
    latent_nk = np.asarray(latent_nk)
    batch = None if batches is None else encode_labels(batches, ())
    label = None if labels is None else encode_labels(labels, unlabeled)
    for name, given in (("batches", batch), ("labels", label)):
        if given is not None and len(given) != len(latent_nk):
            raise BadValuesError(f"{len(given):,} {name} for {len(latent_nk):,} cells")
    keep = np.isfinite(latent_nk).all(axis=1)
    if not keep.any():
        raise EmptyError("no cell has a latent", fix="project with a lower min_features")
    space = _Space(latent_nk, False, max_cells, seed, threads).take(keep)
    batch = None if batch is None else batch.take(keep)
    label = None if label is None else label.take(keep)

    measures, graph = _batch_measures(space, batch)
    measures |= _label_measures(space, batch, label, graph, resolution)
    notes = {"n_cells": len(space.latent_nk), "n_without_latent": int((~keep).sum())}
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


def _batch_measures(space: _Space, batch: Labels | None) -> tuple[dict[str, Measure], Neighbors | None]:
    """Metrics of batches, and the graph of all cells (None if only a sample was searched)."""
    n = len(space.latent_nk)
    if batch is not None and not batch.known_n.all():  # a missing batch is a batch of its own
        batch = encode_labels(batch.text("missing"), ())
    reason = _why_not(batch, "batches", n)
    if reason is not None or batch is None:
        return {name: undefined(reason or "") for name in BATCH_METRICS if name != "asw_batch"}, None
    draws = mixing.draw_cells(n, mixing.BEM_POOLS, seed=space.seed)
    rows = None if space.exact else np.unique(draws)
    found = space.around(rows, mixing.BEM_NEIGHBORS)
    graph = found if rows is None else None
    if rows is not None:
        draws = np.searchsorted(rows, draws)
    own = batch.codes_n if rows is None else batch.codes_n[rows]
    codes = batch.codes_n[found.indices_nm]
    n_batches, exact, seed = len(batch.names), space.exact, space.seed
    share_b = np.bincount(batch.codes_n, minlength=n_batches) / n
    scalex = mixing.mixing_entropies(codes, share_b)
    scarches = mixing.batch_entropies(codes[:, : mixing.EBM_NEIGHBORS], n_batches)
    near = lisi.LISI_NEIGHBORS - 1
    local = lisi.lisi(found.distances_nm[:, :near], codes[:, :near], n_batches)
    return {
        "batch_entropy_mixing": mixing.batch_entropy_mixing(scalex, draws, n_batches, seed),
        "ebm": mixing.entropy_batch_mixing(scarches, draws[: mixing.EBM_POOLS], seed),
        "ilisi": scaled(median_of(local, exact, seed), 1, n_batches),
        "same_batch": mixing.same_batch(codes[:, : mixing.SAME_NEIGHBORS], own, share_b, exact, seed),
    }, graph


def _label_measures(
    space: _Space,
    batch: Labels | None,
    label: Labels | None,
    graph: Neighbors | None,
    resolution: float | str,
) -> dict[str, Measure]:
    """Metrics of labels on the labelled cells; reuses `graph` if all cells have one."""
    known = np.zeros(0, dtype=bool) if label is None else label.known_n
    reason = _why_not(label, "labels", int(known.sum()))
    if reason is not None or label is None:
        return {name: undefined(reason or "") for name in ("asw_batch", *LABEL_METRICS)}
    if not known.all():
        space, graph, label = space.take(known), None, label.take(known)
        batch = None if batch is None else batch.take(known)
    codes = label.codes_n
    near = lisi.LISI_NEIGHBORS - 1
    rows = None if space.exact else space.sample(mixing.BEM_POOLS * mixing.DRAWS)
    found = graph if graph is not None and rows is None else space.around(rows, near)
    around = codes[found.indices_nm]
    own = codes if rows is None else codes[rows]
    n_labels, exact, seed = len(label.names), space.exact, space.seed
    local = lisi.lisi(found.distances_nm[:, :near], around[:, :near], n_labels)
    measures = {
        "asw_batch": _asw_batch(space, batch, codes),
        "clisi": scaled(median_of(local, exact, seed), n_labels, 1),
        "knn_purity": mixing.knn_purity(around[:, : mixing.PURITY_NEIGHBORS], own, exact, seed),
    }
    measures |= _silhouettes(space, codes, n_labels)
    return measures | _cluster_measures(space, codes, found if rows is None else None, resolution)


def _silhouettes(space: _Space, codes: np.ndarray, n_labels: int) -> dict[str, Measure]:
    if n_labels > len(codes) - 1:
        reason = f"every cell has its own label ({n_labels} labels, {len(codes)} cells)"
        return {"silhouette": undefined(reason), "asw_label": undefined(reason)}
    rows = None if space.exact else space.sample(SAMPLED_SILHOUETTES)
    values = silhouette.silhouette_samples(space.latent_nk, codes, rows, threads=space.threads)
    mean = mean_of(values, space.exact, space.seed)
    return {"silhouette": mean, "asw_label": scaled(mean, -1, 1)}


def _asw_batch(space: _Space, batch: Labels | None, codes: np.ndarray) -> Measure:
    if batch is None:
        return undefined("no batches given")
    scores, owners = silhouette.batch_silhouettes(
        space.latent_nk,
        codes,
        batch.codes_n,
        max_rows=None if space.exact else SAMPLED_PER_LABEL,
        rng=np.random.default_rng(space.seed),
        threads=space.threads,
    )
    if not len(scores):
        return undefined("no label has cells in two batches")
    return mean_of_means(scores, owners, space.exact, space.seed)


def _cluster_measures(
    space: _Space, codes: np.ndarray, found: Neighbors | None, resolution: float | str
) -> dict[str, Measure]:
    """NMI, ARI and graph connectivity of all cells, or their mean over samples of cells."""
    others = clusters.GRAPH_NEIGHBORS - 1
    if found is not None:
        one = _clustering(found.first(others), codes, resolution, space.seed)
        extra = {"resolution": one["resolution"], "n_clusters": int(one["n_clusters"])}
        connectivity = Measure(one["graph_connectivity"], n=len(codes))
        return {"graph_connectivity": connectivity} | {
            name: Measure(one[name], n=len(codes), seed=space.seed, extra=extra) for name in ("nmi", "ari")
        }
    size = min(max(space.max_cells // 4, 1000), len(codes))
    rng = np.random.default_rng(space.seed)
    runs = []
    for _ in range(CLUSTERED_SAMPLES):
        rows = np.sort(rng.choice(len(codes), size, replace=False))
        part = space.take(rows)
        runs.append(_clustering(part.around(None, others), codes[rows], resolution, space.seed))

    def over(name: str) -> Measure:
        return mean_of_samples(np.array([run[name] for run in runs]), size, space.seed, samples=len(runs))

    return {name: over(name) for name in ("graph_connectivity", "nmi", "ari")}


def _clustering(found: Neighbors, codes: np.ndarray, resolution: float | str, seed: int) -> dict[str, float]:
    graph = clusters.fuzzy_graph(found.indices_nm, found.distances_nm)
    agreed = clusters.cluster_agreement(graph, codes, resolution, seed)
    return agreed | {"graph_connectivity": clusters.graph_connectivity(found.indices_nm, codes)}
