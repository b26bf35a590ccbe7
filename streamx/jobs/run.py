"""One query of a job: claimed, mapped, labelled, scored, recorded."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from streamx.errors import IntegrityError, StreamxError, StreamxWarning, named
from streamx.jobs.claims import Seen, claimed, holds
from streamx.jobs.plan import Steps
from streamx.jobs.records import TIMINGS, finished, stamp, write_record
from streamx.labels import encode_labels
from streamx.mapping import REFERENCE, UPDATED, Cells, metrics, read_cells, read_reference, transfer
from streamx.memory import give_back, peak_rss_bytes, reset_peak
from streamx.project import project
from streamx.store.location import Location
from streamx.store.manifest import dump
from streamx.surgery import surgery
from streamx.train.model import Model, load_model

log = logging.getLogger("streamx")

_seen: Seen = {}
_one_at_a_time = threading.Lock()  # of a process: models, warnings and threads of torch are its own


@dataclass(frozen=True)
class Job:
    """What every query of a job has in common; goes to other processes.

    Attributes
    ----------
    model_id
        Of the reference, as the plan has it.
    """

    reference: Location
    model_id: str
    output: Location
    steps: Steps


def map_query(job: Job, query: Mapping[str, Any]) -> bool:
    """Map a query of the plan, unless it is finished or somebody else has it; whether it is finished now.

    Whatever is wrong with it goes into its record: the others go on.
    """
    out, name = job.output, query["name"]
    with _one_at_a_time, claimed(out, name, _seen) as claim:
        if claim is None or finished(out, name):
            return claim is not None
        reset_peak()
        begun, used = time.perf_counter(), time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StreamxWarning)
            try:
                found = _mapped(job, query)
            except Exception as error:
                log.error("%s: %s", name, named(error), exc_info=log.isEnabledFor(logging.DEBUG))
                found = {"error": error_of(error)}
        told = [str(w.message) for w in caught if issubclass(w.category, StreamxWarning)]
        for text in told:
            log.warning("%s", text)
        if not holds(out, claim):
            log.warning("%s: another process took it over meanwhile", name)
            return False
        record = {"name": name, "source": query["source"], **found, "warnings": told}
        spent = {
            "seconds": round(time.perf_counter() - begun, 3),
            "cpu_seconds": round(time.process_time() - used, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "host": socket.gethostname(),
            "worker": os.getpid(),
            "stamps": [stamp(source) for source in query["source"]],
        }
        out.write(f"{TIMINGS}/{name}.json", dump(spent))
        write_record(out, record)
        give_back()
        return True


def error_of(error: Exception) -> dict[str, Any]:
    """What a record says of it; ``kind`` is the name of our class of errors, or of Python's."""
    ours = named(error)
    kind = type(ours if type(ours) is not StreamxError else error).__name__
    return {"what": ours.what, "kind": kind, "where": ours.where, "fix": ours.fix}


@lru_cache(maxsize=1)
def _loaded(place: Location, model_id: str) -> tuple[Model, Cells | None]:
    """The reference, once per process; without cells, if another tool wrote it."""
    model = load_model(place)
    if model.id != model_id:
        raise IntegrityError(
            "is not the model that the job was planned with", where=str(place), fix="plan it anew, elsewhere"
        )
    return model, read_reference(place) if place.exists(f"{REFERENCE}/zarr.json") else None


def forget() -> None:
    """Let go of the reference, at the end of a job in a process that goes on."""
    _loaded.cache_clear()


def _mapped(job: Job, query: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about a query that is known when it is done."""
    out, steps, name, source = job.output, job.steps, query["name"], list(query["source"])
    model, reference = _loaded(job.reference, job.model_id)
    learnt = None
    if steps.map.surgery != "none":
        model, learnt = _extended(job, name, source)
    report = project(model, {name: source}, out, progress=False, **steps.project)[0]
    cells = read_cells(out.below(f"{name}.zarr"), name)
    found = {key: report[key] for key in ("n_cells", "n_passed", "gene_overlap", "n_genes_found")}
    fingerprint = json.loads(str(np.asarray(cells.group["uns/streamx/fingerprint"][()]).item()))  # type: ignore[index]
    found["inputs"] = fingerprint["inputs"]
    found |= {"model": model.id, "surgery": learnt, "labels": None, "transfer": None, "metrics": None}
    found["batches"] = _counts(_batches(cells, steps.project.get("batch_key")))
    if steps.transfer is not None and reference is not None:
        labelled = transfer(reference, cells, **_with_truth(steps.transfer, cells))
        found["transfer"] = {key: value for key, value in labelled.items() if key != "queries"}
        cells = read_cells(cells.location, name)
        found["labels"] = _counts(cells.column(f"{steps.transfer['label_key']}_pred").astype(str))
    if steps.metrics is not None and reference is not None:
        found["metrics"] = metrics(reference, cells, **_with_truth(steps.metrics, cells))
    return found | {"error": None}


def _extended(job: Job, name: str, source: list[str]) -> tuple[Model, dict[str, Any]]:
    """The reference with the query's batches, and what surgery says of them."""
    if job.steps.map.surgery == "per-query":
        place = job.output.below(f"{name}.model")
        assert job.steps.surgery is not None
        surgery(job.reference, {name: source}, place, progress=False, **job.steps.surgery)
    else:
        place = job.output.below(UPDATED)
    model = load_model(place)
    entry = next((entry for entry in model.card["surgery"] if entry["name"] == name), None)
    if entry is None:
        raise StreamxError("surgery could not add it", where=name, fix="see its error above")
    return model, entry["report"]


def _with_truth(settings: Mapping[str, Any], cells: Cells) -> dict[str, Any]:
    """The settings, without a column of true labels that this query does not have."""
    there = settings.get("truth_key") in cells.columns
    return {key: value for key, value in settings.items() if key != "truth_key" or there}


def _batches(cells: Cells, batch_key: str | None) -> np.ndarray:
    """Name of each cell's batch, as projection took it."""
    if batch_key is None:
        return np.full(cells.n_cells, cells.name, dtype=object)
    return encode_labels(cells.column(batch_key), ()).text("missing")


def _counts(names: Any) -> dict[str, int]:
    """How often each name occurs, by name."""
    found, times = np.unique(np.asarray(names, dtype=str), return_counts=True)
    return dict(zip(found.tolist(), times.tolist(), strict=True))
