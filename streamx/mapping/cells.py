"""Cells on disk that have latents: of a reference, of what surgery added to it, of mapped queries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from streamx.config import build
from streamx.errors import BadFileError, EmptyError, IncompleteError, UsageError
from streamx.labels import encode_labels
from streamx.metrics import agreement
from streamx.neighbors.blocks import Stacked, settle
from streamx.store.frame import column_names, read_column
from streamx.store.latents import latent_names
from streamx.store.location import Location, follow, is_there, open_location
from streamx.store.read import integrity

if TYPE_CHECKING:
    import zarr

REFERENCE = "reference.zarr"
LATENT = "X_scalex"
INDEXES = "neighbors"
RESTORE = "restore it from a copy, or make it again with the command that wrote it"
UPDATED = "updated.model"  # in the output of a job: the reference and all queries' batches
IN_MEMORY = 256_000_000  # bytes of latents


@dataclass(frozen=True, eq=False)
class _Latents:
    """Latents of one file: bytes that are not those that were written are named as that, and where."""

    array: Any
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def __getitem__(self, some: slice) -> np.ndarray:
        with integrity(self.where, RESTORE):
            return np.asarray(self.array[some])


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
            with integrity(f"{self.path}/obs/{name}", RESTORE):
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
    return Cells(name, location, group, Stacked([_Latents(group[f"obsm/{key}"], f"{location}/obsm/{key}")]))


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
    if location.exists("model.json"):  # its reference.zarr would be taken for a query, and written to
        raise UsageError(
            "is a model, and no folder of mapped queries",
            where=str(location),
            fix="the model comes first: MODEL OUT, where OUT is what `streamx project` wrote",
        )
    names = latent_names(location)
    if not names:
        if not is_there(location):
            raise UsageError(
                "no such folder", where=str(location), fix="streamx project MODEL QUERY... -o OUT"
            )
        if location.exists("zarr.json"):
            raise UsageError("is a single query", where=str(location), fix="name the folder that it lies in")
        raise EmptyError(
            "holds no mapped query (*.zarr)",
            where=str(location),
            fix="streamx project MODEL QUERY... -o OUT",
        )
    queries = [read_cells(location.below(name), name.removesuffix(".zarr")) for name in names]
    for query in queries if reference is not None else ():
        assert reference is not None
        if not _in_one_space(query, reference, location):
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


def _in_one_space(query: Cells, reference: Cells, output: Location) -> bool:
    """Whether a query was mapped with the reference; or with what a job made of it by surgery, which leaves
    the latents of the reference's cells as they are. Where a file does not say, that is supposed.
    """
    if None in (query.model_id, reference.model_id) or query.model_id in reference.model_ids:
        return True
    for name in (f"{query.name}.model", UPDATED):
        if output.exists(f"{name}/model.json"):
            card = json.loads(output.read(f"{name}/model.json"))
            known = {card.get("id"), *card.get("earlier", [])}
            if query.model_id in known and known & reference.model_ids:
                return True
    return False


def configured(kind: Any, config: Any, settings: dict[str, Any]) -> Any:
    """A config with some fields changed."""
    return build(kind, ({} if config is None else asdict(config)) | settings)


def truth_of(query: Cells, key: str | None) -> np.ndarray | None:
    """True labels as text ("" = none), or None where the query has no such column."""
    if key is None or key not in query.columns:
        return None
    return encode_labels(query.column(key), ()).text()


def agreement_scores(truth: Any, found: Any, unlabeled: Sequence[str]) -> dict[str, Any]:
    """Accuracy, balanced accuracy and macro F1 of the cells with a true label, and their number."""
    scores = agreement(truth, found, unlabeled)
    return {name: scores[name] for name in ("accuracy", "balanced_accuracy", "macro_f1", "n_scored")}


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
