"""``transfer``: labels of the reference for mapped cells, written into their obs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from streamx.config import TransferConfig
from streamx.errors import UsageError
from streamx.labels import Labels, encode_labels, unify_labels
from streamx.mapping.cells import (
    INDEXES,
    Cells,
    agreement_scores,
    configured,
    read_queries,
    read_reference,
)
from streamx.neighbors import kept_index
from streamx.neighbors.blocks import Rows, Stacked
from streamx.store.amend import amend
from streamx.store.location import Location, follow
from streamx.transfer import (
    UNKNOWN,
    HeldOut,
    Threshold,
    Transfer,
    Voters,
    gather,
    hold_out,
    score_labels,
    threshold_for,
    vote,
    voting_cells,
)

log = logging.getLogger("streamx")

NOVEL = 0.95  # novelty of more than this is counted


def transfer(
    model: str | Path | Location | Cells,
    output: str | Path | Location | Cells,
    config: TransferConfig | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Give mapped cells the labels of their neighbours in the reference.

    Writes ``obs["<label_key>_pred"]`` (categorical, ``Unknown`` above the threshold and for cells without a
    latent) and ``obs["<label_key>_uncertainty"]`` (float32) into every ``OUT/<query>.zarr``, and the same for
    each column of ``within``; with ``novelty``, also ``obs["<label_key>_novelty"]`` (float32); with
    ``probabilities``, ``obsm["<label_key>_probabilities"]`` (cells x labels) and the labels' names in
    ``uns["<label_key>_labels"]``. Run again, it replaces them.

    Latents of queries are read block by block; those of a reference that take more than 256 MB lie in a
    temporary file meanwhile. The index of a large reference is kept in ``MODEL/neighbors``.

    Parameters
    ----------
    model
        Folder that ``train`` wrote; or its cells (:func:`read_reference`).
    output
        Folder that ``project`` wrote; or one of its queries (:func:`read_cells`), taken as it is.
    config, settings
        :class:`~streamx.config.TransferConfig`, or its fields.

    Returns
    -------
    dict
        ``n_cells``, ``n_unknown``, ``knn_recall`` (of the neighbour search), ``labels``, ``method``,
        ``index``, ``n_neighbors``, and ``queries`` with the numbers of each; with ``truth_key`` also
        ``accuracy``, ``balanced_accuracy``, ``macro_f1`` and ``n_scored``, over all queries and for each, and
        ``per_label``; with ``keep`` or ``max_error``, ``thresholds``: each column's, and what it does to
        held-out reference cells; with ``novelty``, ``n_novel``: cells above .95.
    """
    config = configured(TransferConfig, config, settings)
    reference = model if isinstance(model, Cells) else read_reference(model)
    queries = [output] if isinstance(output, Cells) else read_queries(output, reference)
    truths = [_true_labels(query, config) for query in queries]
    if config.truth_key is not None and all(truth is None for truth in truths):
        raise UsageError(f"no query has the obs column {config.truth_key!r}", where=str(output))
    voters = _voters(reference, queries, config)
    held, thresholds = _asked_of_itself(voters, config)
    keys = [*config.within, config.label_key]
    reports: list[dict[str, Any]] = []
    scored: list[tuple[Labels, Labels]] = []
    for query, truth in zip(queries, truths, strict=True):
        levels = vote(
            voters,
            query.latents,
            thresholds=[threshold.value for threshold in thresholds],
            probabilities=config.probabilities,
            held=held if config.novelty else None,
            progress=f"transfer {query.name}",
        )
        _write(query, keys, levels)
        found = levels[-1]
        report: dict[str, Any] = {"name": query.name, "n_cells": query.n_cells, "n_unknown": found.n_unknown}
        if found.novelty_n is not None:
            report["n_novel"] = int((found.novelty_n > NOVEL).sum())
        if truth is not None:
            scored.append((truth, Labels(found.codes_n, found.names)))
            report |= agreement_scores(*scored[-1], config.unlabeled)
        reports.append(report)
        log.info("%s: %d of %d cells labelled", query.name, query.n_cells - found.n_unknown, query.n_cells)
    counts = [name for name in ("n_cells", "n_unknown", "n_novel") if name in reports[0]]
    result: dict[str, Any] = {name: sum(report[name] for report in reports) for name in counts}
    result |= {
        "knn_recall": voters.recall,
        "label_key": config.label_key,
        "labels": voters.levels[-1].names,
        "method": voters.method,
        "n_neighbors": voters.n_neighbors,
        "index": voters.index.method,
    }
    if held is not None and thresholds:
        result["thresholds"] = {key: asdict(of) for key, of in zip(keys, thresholds, strict=True)}
    if scored:
        true, guess = (_joined(parts) for parts in zip(*scored, strict=True))
        result |= agreement_scores(true, guess, config.unlabeled) | {"per_label": score_labels(true, guess)}
    return result | {"queries": reports}


def _voters(reference: Cells, queries: Sequence[Cells], config: TransferConfig) -> Voters:
    """The reference's labelled cells, with an index over them that is kept beside the model."""
    columns = [*config.within, config.label_key]
    levels = [encode_labels(reference.column(key), config.unlabeled) for key in columns]
    options: dict[str, Any] = {"seed": config.seed, "threads": config.threads, "memory": config.memory}
    latent_nk = reference.latent_nk
    asking = Stacked([query.latents for query in queries])
    voting = Rows(latent_nk, np.flatnonzero(voting_cells(latent_nk, levels)))
    home = follow(reference.location, "..").root
    index = kept_index(
        home / INDEXES if isinstance(home, Path) else None,
        voting,
        len(asking),
        method=config.index,
        **options,
    )
    return gather(
        latent_nk,
        levels,
        asking,
        method=config.method,
        n_neighbors=config.n_neighbors,
        index=index,
        **options,
    )


def _asked_of_itself(voters: Voters, config: TransferConfig) -> tuple[HeldOut | None, list[Threshold]]:
    """Held-out reference cells, where something is asked of them, and the threshold of each level."""
    goals = {name: getattr(config, name) for name in ("threshold", "keep", "max_error")}
    goals = {name: value for name, value in goals.items() if value is not None}
    if len(goals) > 1:
        raise UsageError(f"{' and '.join(goals)} given", fix="one of them sets the threshold")
    wanted = config.novelty or not goals.keys() <= {"threshold"}
    held = hold_out(voters, seed=config.seed) if wanted else None
    levels = range(len(voters.levels))
    if "threshold" in goals:
        return held, [Threshold(goals["threshold"]) for _ in levels]
    if held is None or not goals:
        return held, []
    return held, [threshold_for(held, level, **goals) for level in levels]


def _true_labels(query: Cells, config: TransferConfig) -> Labels | None:
    if config.truth_key is None or config.truth_key not in query.columns:
        return None
    return encode_labels(query.column(config.truth_key), config.unlabeled)


def _joined(parts: Sequence[Labels]) -> Labels:
    """The labels of all queries."""
    same = unify_labels(*parts)
    return Labels(np.concatenate([labels.codes_n for labels in same]), same[0].names)


def _write(query: Cells, keys: Sequence[str], levels: Sequence[Transfer]) -> None:
    """Predictions of one query, into its file; what an earlier run wrote and this one did not is removed."""
    obs: dict[str, pd.Series | None] = {}
    obsm: dict[str, np.ndarray | None] = {}
    uns: dict[str, Sequence[str] | None] = {}
    for key, found in zip(keys, levels, strict=True):
        categories = sorted({*found.names, UNKNOWN})
        lookup = np.array([*(categories.index(name) for name in found.names), categories.index(UNKNOWN)])
        predicted = pd.Categorical.from_codes(lookup[found.codes_n], pd.Index(categories))
        obs |= {f"{key}_pred": pd.Series(predicted), f"{key}_uncertainty": pd.Series(found.uncertainty_n)}
        shares = found.probabilities_nl
        obsm[f"{key}_probabilities"] = shares
        uns[f"{key}_labels"] = None if shares is None else found.names
    novelty_n = levels[-1].novelty_n
    obs[f"{keys[-1]}_novelty"] = None if novelty_n is None else pd.Series(novelty_n)
    amend(query.location, obs, obsm, uns)
