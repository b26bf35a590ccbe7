"""``metrics``: how well a reference and what was mapped onto it mix, and how right its labels are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamx.config import MetricsConfig
from streamx.errors import UsageError
from streamx.labels import encode_labels
from streamx.mapping.cells import (
    IN_MEMORY,
    Cells,
    agreement_scores,
    batches_of,
    configured,
    read_queries,
    read_reference,
    truth_of,
)
from streamx.metrics import score_latent
from streamx.neighbors.blocks import Stacked, settle
from streamx.store.location import Location, open_location


def metrics(
    model: str | Path | Location | Cells,
    output: str | Path | Location | Cells | list[Cells] | None = None,
    config: MetricsConfig | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Mixing and separation in the latent space of a reference, with the queries mapped onto it.

    Batches of a query are those of its batch column, else the query is one batch; one that has the name of a
    reference batch is another batch all the same. Labels of a query are its true ones: of `truth_key`, else
    of `label_key`; transferred labels say nothing here. Latents that take more than 256 MB lie in a temporary
    file meanwhile.

    Parameters
    ----------
    model
        Folder that ``train`` wrote; or its cells (:func:`read_reference`).
    output
        Folder that ``project`` wrote; or one or several of its queries (:func:`read_cells`), taken as they
        are; None: the reference alone.
    config, settings
        :class:`~streamx.config.MetricsConfig`, or its fields.

    Returns
    -------
    dict
        One number (or None) per metric, see :func:`streamx.metrics.score_latent`; with ``truth_key`` also
        ``accuracy``, ``balanced_accuracy`` and ``macro_f1`` of ``<label_key>_pred``, overall and in
        ``queries``; ``details`` says how each was computed.
    """
    config = configured(MetricsConfig, config, settings)
    if config.truth_key is not None and (output is None or config.label_key is None):
        raise UsageError(
            "truth_key scores the predictions for mapped cells", fix="name OUT and the label key as well"
        )
    if config.card and (output is not None or isinstance(model, Cells)):
        raise UsageError("a card holds the scores of the reference alone", fix="leave OUT out, or card=True")
    reference = model if isinstance(model, Cells) else read_reference(model)
    if output is None or isinstance(output, Cells | list):
        queries = [output] if isinstance(output, Cells) else output or []
    else:
        queries = read_queries(output, reference)
    everyone = [reference, *queries]
    batches = np.concatenate(batches_of(reference, queries, config.batch_key))
    labels = None
    if config.label_key is not None:
        keys = [config.label_key, *[config.truth_key or config.label_key] * len(queries)]
        parts = [_given_labels(cells, key) for cells, key in zip(everyone, keys, strict=True)]
        labels = np.concatenate(parts)
    found = score_latent(
        settle(Stacked([cells.latents for cells in everyone]), IN_MEMORY),
        batches,
        labels,
        unlabeled=config.unlabeled,
        max_cells=config.max_cells,
        resolution=_resolution(config.resolution),
        seed=config.seed,
        threads=config.threads,
        progress="metrics",
    ).to_json()
    if config.card and not isinstance(model, Cells):
        from streamx.train.card import add_scores  # which loads torch

        asked = {name: getattr(config, name) for name in ("label_key", "batch_key", "max_cells", "seed")}
        add_scores(open_location(model), found, asked)
    if config.truth_key is not None:
        found |= _score_queries(queries, f"{config.label_key}_pred", config.truth_key, config.unlabeled)
    return found


def _resolution(text: str) -> float | str:
    try:
        return text if text == "best" else float(text)
    except ValueError:
        raise UsageError(f"resolution = {text!r}", fix="a number, or best") from None


def _given_labels(cells: Cells, key: str) -> np.ndarray:
    if cells.name == "reference" or key in cells.columns:
        return encode_labels(cells.column(key), ()).text()
    return np.full(cells.n_cells, "", dtype=object)


def _score_queries(
    queries: Sequence[Cells], predicted: str, truth_key: str, unlabeled: Sequence[str]
) -> dict[str, Any]:
    """Agreement of the predictions with the truth: overall, and per query."""
    reports, scored = [], []
    for query in queries:
        truth = truth_of(query, truth_key)
        if truth is None:
            continue
        if predicted not in query.columns:
            raise UsageError(
                f"no predictions (obs column {predicted!r})",
                where=str(query.path),
                fix="streamx transfer MODEL OUT first",
            )
        guess = encode_labels(query.column(predicted), ()).text()
        scored.append((truth, guess))
        reports.append({"name": query.name, **agreement_scores(truth, guess, unlabeled)})
    if not scored:
        raise UsageError(f"no query has the obs column {truth_key!r}")
    truth_n, guess_n = (np.concatenate(part) for part in zip(*scored, strict=True))
    return {**agreement_scores(truth_n, guess_n, unlabeled), "queries": reports}
