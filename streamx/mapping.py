"""What follows once cells have latents on disk: labels for the mapped ones, metrics of all.

::

    MODEL/reference.zarr     obs and latents of the reference
    MODEL/added/*.zarr       those of the cells that surgery added to it
    OUT/<query>.zarr         the same of each mapped query; `transfer` adds to its obs
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from streamx.config import MetricsConfig, TransferConfig, build
from streamx.errors import BadFileError, EmptyError, IncompleteError, UsageError
from streamx.labels import encode_labels
from streamx.metrics import agreement, score_latent
from streamx.store.amend import amend
from streamx.store.frame import column_names, read_column
from streamx.store.latents import latent_names
from streamx.store.location import Location, follow, is_there, open_location
from streamx.transfer import UNKNOWN, Transfer, gather, vote

if TYPE_CHECKING:
    import zarr

log = logging.getLogger("streamx")

REFERENCE = "reference.zarr"
LATENT = "X_scalex"


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells with latents on disk: a reference, or a mapped query. Columns are read when asked for.

    Attributes
    ----------
    location, group
        Of the file; of a reference that surgery extended, its first one.
    latent_nk
        Of all files.
    added
        The further files.
    """

    name: str
    location: Location
    group: zarr.Group
    latent_nk: np.ndarray
    added: tuple[zarr.Group, ...] = ()

    @property
    def path(self) -> Path | str:
        return self.location.root

    @property
    def n_cells(self) -> int:
        return len(self.latent_nk)

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
    return Cells(name, location, group, np.asarray(group[f"obsm/{key}"][:]))  # type: ignore[index]


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
    z_nk = np.concatenate([reference.latent_nk, *(part.latent_nk for part in parts)])
    return replace(reference, latent_nk=z_nk, added=tuple(part.group for part in parts))


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
        if query.latent_nk.shape[1] != reference.latent_nk.shape[1]:
            sizes = query.latent_nk.shape[1], reference.latent_nk.shape[1]
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
    latent) and ``obs["<label_key>_uncertainty"]`` (float32) into every ``OUT/<query>.zarr``; with
    ``probabilities``, also ``obsm["<label_key>_probabilities"]`` (cells x labels) and the labels' names in
    ``uns["<label_key>_labels"]``. Run again, it replaces them.

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
        ``accuracy``, ``balanced_accuracy``, ``macro_f1`` and ``n_scored``, over all queries and for each.
    """
    config = _configured(TransferConfig, config, settings)
    reference = model if isinstance(model, Cells) else read_reference(model)
    queries = [output] if isinstance(output, Cells) else read_queries(output, reference)
    key = config.label_key
    labels = encode_labels(reference.column(key), config.unlabeled)
    truths = [_truth(query, config.truth_key) for query in queries]
    if config.truth_key is not None and all(truth is None for truth in truths):
        raise UsageError(f"no query has the obs column {config.truth_key!r}", where=str(output))
    voters = gather(
        reference.latent_nk,
        labels,
        np.concatenate([query.latent_nk for query in queries]),
        method=config.method,
        n_neighbors=config.n_neighbors,
        unlabeled=config.unlabeled,
        index=config.index,
        seed=config.seed,
        memory=config.memory,
        threads=config.threads,
    )
    reports: list[dict[str, Any]] = []
    scored: list[tuple[np.ndarray, np.ndarray]] = []
    for query, truth in zip(queries, truths, strict=True):
        found = vote(voters, query.latent_nk, threshold=config.threshold, probabilities=config.probabilities)
        _write(query, key, found)
        report = {"name": query.name, "n_cells": query.n_cells, "n_unknown": found.n_unknown}
        if truth is not None:
            scored.append((truth, found.labels_n))
            report |= _scores(truth, found.labels_n, config.unlabeled)
        reports.append(report)
        log.info("%s: %d of %d cells labelled", query.name, query.n_cells - found.n_unknown, query.n_cells)
    result = {
        "n_cells": sum(query.n_cells for query in queries),
        "n_unknown": sum(report["n_unknown"] for report in reports),
        "knn_recall": voters.recall,
        "label_key": key,
        "labels": voters.labels.names,
        "method": voters.method,
        "n_neighbors": voters.n_neighbors,
        "index": voters.index.method,
    }
    if scored:
        truth_n, found_n = (np.concatenate(part) for part in zip(*scored, strict=True))
        result |= _scores(truth_n, found_n, config.unlabeled)
    return result | {"queries": reports}


def _configured(kind: Any, config: Any, settings: dict[str, Any]) -> Any:
    return build(kind, ({} if config is None else asdict(config)) | settings)


def _truth(query: Cells, key: str | None) -> np.ndarray | None:
    """True labels as text ("" = none), or None where the query has no such column."""
    if key is None or key not in query.columns:
        return None
    return encode_labels(query.column(key), ()).text()


def _scores(truth: np.ndarray, found: np.ndarray, unlabeled: Sequence[str]) -> dict[str, Any]:
    scores = agreement(truth, found, unlabeled)
    return {name: scores[name] for name in ("accuracy", "balanced_accuracy", "macro_f1", "n_scored")}


def _write(query: Cells, key: str, found: Transfer) -> None:
    """Predictions of one query, into its file."""
    categories = sorted({*found.names, UNKNOWN})
    lookup = np.array([*(categories.index(name) for name in found.names), categories.index(UNKNOWN)])
    predicted = pd.Categorical.from_codes(lookup[found.codes_n], pd.Index(categories))
    shares = found.probabilities_nl
    amend(
        query.location,
        {f"{key}_pred": pd.Series(predicted), f"{key}_uncertainty": pd.Series(found.uncertainty_n)},
        {f"{key}_probabilities": shares},
        {f"{key}_labels": None if shares is None else found.names},
    )


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
