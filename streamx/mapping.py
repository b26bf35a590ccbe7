"""What follows once cells have latents on disk: labels for the mapped ones, metrics of all.

::

    MODEL/reference.zarr     obs and latents of the reference
    MODEL/added/*.zarr       those of the cells that surgery added to it
    MODEL/neighbors/         indexes of large references, made once
    OUT/<query>.zarr         the same of each mapped query; `transfer` adds to its obs
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from streamx.config import MetricsConfig, TransferConfig, build
from streamx.errors import BadFileError, EmptyError, IncompleteError, UsageError
from streamx.labels import Labels, encode_labels, unify_labels
from streamx.metrics import agreement, score_latent
from streamx.neighbors import kept_index
from streamx.neighbors.blocks import Rows, Stacked, settle
from streamx.store.amend import amend
from streamx.store.frame import column_names, read_column
from streamx.store.latents import latent_names
from streamx.store.location import Location, follow, is_there, open_location
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

if TYPE_CHECKING:
    import zarr

log = logging.getLogger("streamx")

REFERENCE = "reference.zarr"
LATENT = "X_scalex"
INDEXES = "neighbors"
NOVEL = 0.95  # novelty of more than this is counted
IN_MEMORY = 256_000_000  # bytes of latents


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells with latents on disk: a reference, or a mapped query. Columns are read when asked for.

    Attributes
    ----------
    location, group
        Of the file; of a reference that surgery extended, its first one.
    latents
        Of all files, where they lie: (cells, n_latent), read by slices.
    added
        The further files.
    """

    name: str
    location: Location
    group: zarr.Group
    latents: Stacked
    added: tuple[zarr.Group, ...] = ()

    @cached_property
    def latent_nk(self) -> np.ndarray:
        """All latents, read once: in memory, or in a temporary file while they take more than 256 MB."""
        return settle(self.latents, IN_MEMORY)

    @property
    def path(self) -> Path | str:
        return self.location.root

    @property
    def n_cells(self) -> int:
        return len(self.latents)

    @property
    def columns(self) -> list[str]:
        """Of obs, in any of the files."""
        return list(dict.fromkeys(name for obs in self._obs for name in column_names(obs)))

    def column(self, name: str) -> pd.Series:
        """One column of obs; cells of a file that lacks it have none."""
        if name not in self.columns:
            raise UsageError(
                f"no obs column {name!r}", where=str(self.path), fix=f"one of {', '.join(self.columns)}"
            )
        if not self.added:
            return read_column(self._obs[0], name)
        parts = []
        for obs in self._obs:
            if name in column_names(obs):
                parts.append(read_column(obs, name).astype("object"))
            else:
                parts.append(pd.Series([None] * obs[str(obs.attrs["_index"])].shape[0], dtype=object))
        return pd.concat(parts, ignore_index=True).rename(name)

    @property
    def names(self) -> np.ndarray:
        """Names of the cells."""
        parts = [np.asarray(obs[str(obs.attrs["_index"])][:]).astype(object) for obs in self._obs]
        return np.concatenate(parts)

    @property
    def model_id(self) -> str | None:
        """Hash of the model that made the latents, where the file says so."""
        found = self._uns("model")
        return None if found is None else str(found)

    @property
    def model_ids(self) -> set[str | None]:
        """Of a reference: the models whose latents lie in one space with these."""
        card = json.loads(follow(self.location, "..").read("model.json"))
        return {self.model_id, card.get("id"), *card.get("earlier", [])}

    @property
    def batch_key(self) -> str | None:
        """obs column with the batches, where the file says so."""
        found = self._uns("batch_key")
        return None if found is None else str(found)

    @property
    def _obs(self) -> list[Any]:
        return [group["obs"] for group in (self.group, *self.added)]

    def _uns(self, name: str) -> Any:
        try:
            return np.asarray(self.group[f"uns/streamx/{name}"][()]).item()  # type: ignore[index]
        except KeyError:
            return None


def read_cells(location: Location, name: str) -> Cells:
    """Open an AnnData-Zarr with obs and a latent; what is on disk now counts, not consolidated metadata."""
    import zarr

    try:
        group = zarr.open_group(location.zarr(""), mode="r", zarr_format=3, use_consolidated=False)
        latents = [str(key) for key in group["obsm"] if str(key).startswith("X_")]  # type: ignore[union-attr]
    except (FileNotFoundError, KeyError, ValueError, json.JSONDecodeError) as error:
        raise BadFileError(
            "is no AnnData-Zarr with latents", where=str(location), fix="train and project write such files"
        ) from error
    key = LATENT if LATENT in latents else next((name for name in latents if name != "X_umap"), None)
    if key is None:
        raise BadFileError("obsm holds no latent (X_...)", where=str(location), fix="project the query again")
    return Cells(name, location, group, Stacked([group[f"obsm/{key}"]]))


def read_reference(model: str | Path | Location) -> Cells:
    """The reference cells of a finished model."""
    location = open_location(model)
    there = [location.exists(key) for key in ("model.json", f"{REFERENCE}/zarr.json")]
    if not any(there) and not location.journal.exists():
        if not is_there(location):
            raise UsageError("no such model", where=str(location), fix="streamx train VIEW -o MODEL")
        raise BadFileError("is no model", where=str(location), fix="name the folder that `train -o` wrote")
    if not all(there):
        raise IncompleteError(
            "training has not finished",
            where=str(location),
            fix="run the same `streamx train` again to resume",
        )
    reference = read_cells(location.below(REFERENCE), "reference")
    added = json.loads(location.read("model.json")).get("added", [])
    parts = [read_cells(location.below(name), name) for name in added]
    if not parts:
        return reference
    everyone = Stacked([latents for cells in (reference, *parts) for latents in cells.latents.parts])
    return replace(reference, latents=everyone, added=tuple(part.group for part in parts))


def read_queries(output: str | Path | Location, reference: Cells | None = None) -> list[Cells]:
    """The mapped queries of an output folder, by name; those of another model are refused."""
    location = open_location(output)
    names = latent_names(location)
    if not names:
        if not is_there(location):
            raise UsageError(
                "no such folder", where=str(location), fix="streamx project MODEL QUERY... -o OUT"
            )
        raise EmptyError(
            "holds no mapped query (*.zarr)",
            where=str(location),
            fix="streamx project MODEL QUERY... -o OUT",
        )
    queries = [read_cells(location.below(name), name.removesuffix(".zarr")) for name in names]
    for query in queries if reference is not None else ():
        assert reference is not None
        if None not in (query.model_id, reference.model_id) and query.model_id not in reference.model_ids:
            home = follow(reference.location, "..")
            raise UsageError(
                "was mapped with another model",
                where=str(query.path),
                fix=f"name the model that it was mapped with, or project it onto {home}",
            )
        sizes = query.latents.shape[1], reference.latents.shape[1]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"has {sizes[0]} latent dimensions, the reference {sizes[1]}", where=str(query.path)
            )
    return queries


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
    config = _configured(TransferConfig, config, settings)
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
            report |= _scores(*scored[-1], config.unlabeled)
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
        result |= _scores(true, guess, config.unlabeled) | {"per_label": score_labels(true, guess)}
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


def _configured(kind: Any, config: Any, settings: dict[str, Any]) -> Any:
    return build(kind, ({} if config is None else asdict(config)) | settings)


def _truth(query: Cells, key: str | None) -> np.ndarray | None:
    """True labels as text ("" = none), or None where the query has no such column."""
    if key is None or key not in query.columns:
        return None
    return encode_labels(query.column(key), ()).text()


def _true_labels(query: Cells, config: TransferConfig) -> Labels | None:
    if config.truth_key is None or config.truth_key not in query.columns:
        return None
    return encode_labels(query.column(config.truth_key), config.unlabeled)


def _joined(parts: Sequence[Labels]) -> Labels:
    """The labels of all queries."""
    same = unify_labels(*parts)
    return Labels(np.concatenate([labels.codes_n for labels in same]), same[0].names)


def _scores(truth: Any, found: Any, unlabeled: Sequence[str]) -> dict[str, Any]:
    scores = agreement(truth, found, unlabeled)
    return {name: scores[name] for name in ("accuracy", "balanced_accuracy", "macro_f1", "n_scored")}


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


def metrics(
    model: str | Path | Location | Cells,
    output: str | Path | Location | Cells | None = None,
    config: MetricsConfig | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Mixing and separation in the latent space of a reference, with the queries mapped onto it.

    Batches of a query are those of its batch column, else the query is one batch; one that has the name of a
    reference batch is another batch all the same. Labels of a query are its true ones: of `truth_key`, else
    of `label_key`; transferred labels say nothing here.

    Parameters
    ----------
    model
        Folder that ``train`` wrote; or its cells (:func:`read_reference`).
    output
        Folder that ``project`` wrote; or one of its queries (:func:`read_cells`), taken as it is; None: the
        reference alone.
    config, settings
        :class:`~streamx.config.MetricsConfig`, or its fields.

    Returns
    -------
    dict
        One number (or None) per metric, see :func:`streamx.metrics.score_latent`; with ``truth_key`` also
        ``accuracy``, ``balanced_accuracy`` and ``macro_f1`` of ``<label_key>_pred``, overall and in
        ``queries``; ``details`` says how each was computed.
    """
    config = _configured(MetricsConfig, config, settings)
    if config.truth_key is not None and (output is None or config.label_key is None):
        raise UsageError(
            "truth_key scores the predictions for mapped cells", fix="name OUT and the label key as well"
        )
    reference = model if isinstance(model, Cells) else read_reference(model)
    if isinstance(output, Cells):
        queries = [output]
    else:
        queries = [] if output is None else read_queries(output, reference)
    everyone = [reference, *queries]
    batches = np.concatenate(batches_of(reference, queries, config.batch_key))
    labels = None
    if config.label_key is not None:
        keys = [config.label_key, *[config.truth_key or config.label_key] * len(queries)]
        parts = [_given_labels(cells, key) for cells, key in zip(everyone, keys, strict=True)]
        labels = np.concatenate(parts)
    found = score_latent(
        np.concatenate([cells.latent_nk for cells in everyone]),
        batches,
        labels,
        unlabeled=config.unlabeled,
        max_cells=config.max_cells,
        resolution=_resolution(config.resolution),
        seed=config.seed,
        threads=config.threads,
    ).to_json()
    if config.truth_key is not None:
        found |= _score_queries(queries, f"{config.label_key}_pred", config.truth_key, config.unlabeled)
    return found


def _resolution(text: str) -> float | str:
    try:
        return text if text == "best" else float(text)
    except ValueError:
        raise UsageError(f"resolution = {text!r}", fix="a number, or best") from None


def batches_of(reference: Cells, queries: Sequence[Cells], batch_key: str | None = None) -> list[np.ndarray]:
    """Names of the batches, per cell, of the reference and of each query; no two share a name by accident."""
    key = batch_key or reference.batch_key
    if key is None:
        card = json.loads(follow(reference.location, "..").read("model.json"))
        key = card.get("batch_key")
    if key is None or key not in reference.columns:
        if batch_key is not None:
            reference.column(batch_key)  # says which there are
        parts = [np.full(reference.n_cells, "reference", dtype=object)]
    else:
        parts = [encode_labels(reference.column(key), ()).text("missing")]
    taken = set(parts[0])
    for query in queries:
        if key is not None and key in query.columns:
            own = encode_labels(query.column(key), ()).text(query.name)
        else:
            own = np.full(query.n_cells, query.name, dtype=object)
        clash = taken & set(own)
        own = np.array([f"{query.name}: {name}" if name in clash else name for name in own], dtype=object)
        taken |= set(own)
        parts.append(own)
    return parts


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
        truth = _truth(query, truth_key)
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
        reports.append({"name": query.name, **_scores(truth, guess, unlabeled)})
    if not scored:
        raise UsageError(f"no query has the obs column {truth_key!r}")
    truth_n, guess_n = (np.concatenate(part) for part in zip(*scored, strict=True))
    return {**_scores(truth_n, guess_n, unlabeled), "queries": reports}
