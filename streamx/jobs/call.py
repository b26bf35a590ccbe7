"""``streamx map`` and ``sx.map``: many queries onto one reference, taken up again where it was left."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from streamx.cluster import client_of
from streamx.errors import UsageError
from streamx.jobs.claims import Seen, claimed, sweep
from streamx.jobs.plan import PLAN, added, make_plan, parse_part, part_of, steps_of
from streamx.jobs.records import check_inputs, finished, forget_failed, read_plan, write_record
from streamx.jobs.run import Job, error_of, forget
from streamx.jobs.spread import Query, Spread, in_turn, on_dask, on_workers
from streamx.jobs.status import status
from streamx.mapping import UPDATED, read_reference
from streamx.project.run import sweep_scratch
from streamx.query import requests
from streamx.store.location import Location, open_location
from streamx.store.manifest import dump
from streamx.surgery import surgery
from streamx.train.model import load_model

log = logging.getLogger("streamx")

POLL_SECONDS = 1.0  # between looks at queries that other processes have


def map_queries(
    reference: str | Path | Location,
    queries: Any,
    output: str | Path | Location,
    *,
    task: str | None = None,
    dask: Any = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Map queries onto a reference, label and score them: many at once, one output each.

    Whatever is killed meanwhile, the same call goes on, and does nothing again of a query that is finished.
    A query that can't be mapped is recorded with its error, the others go on; the next call tries it again.
    A call with other files adds these to the job (but for incremental surgery), and maps its own alone.
    Several calls on one output, also on several machines, share the queries. What comes out is the same, bit
    by bit, for any number of workers.

    Parameters
    ----------
    reference
        Folder of a model (or ``s3://bucket/prefix``).
    queries
        Files, see :func:`streamx.query.requests`.
    output
        Folder or prefix; :mod:`streamx.jobs.plan` says what it holds afterwards.
    task
        ``"i/n"``: only the i-th of n parts of the queries, as a task of a cluster's array.
    dask
        A ``distributed`` client, the address of a scheduler, ``"local"`` or ``"local:N"``: its workers map.
        They have to see the same files.
    settings
        Fields of :class:`~streamx.config.MapConfig`, and of the configs of its steps:
        :class:`~streamx.config.ProjectConfig`, :class:`~streamx.config.TransferConfig`,
        :class:`~streamx.config.MetricsConfig`, :class:`~streamx.config.SurgeryConfig` and
        :class:`~streamx.config.FreezeConfig`.

    Returns
    -------
    What :func:`streamx.jobs.status.status` says afterwards, of the queries of this task.

    Raises
    ------
    SettingsChangedError
        If the output was planned with another reference or other settings, or the file of a query is another
        than planned or has changed since it was mapped; names the field.
    """
    part = (1, 1) if task is None else parse_part(task)
    if settings.get("surgery") == "incremental" and task is not None:
        raise UsageError(
            "incremental surgery goes through the queries in their order", fix="leave the task out"
        )
    job, planned = begin_job(reference, queries, output, settings)
    mine = part_of(planned, *part)
    names = [query["name"] for query in mine]
    check_inputs(job.output, mine)
    forget_failed(job.output, names)
    try:
        if job.steps.map.surgery == "incremental":
            _extend(job, mine, progress)
        with client_of(dask) as client:
            _map_all(job, mine, _way(job, client, len(mine)), progress)
    finally:
        forget()
        sweep(job.output)
        if not job.output.shared:
            sweep_scratch(Path(job.output.root))
    return status(job.output, names)


def begin_job(
    reference: str | Path | Location, queries: Any, output: str | Path | Location, settings: dict[str, Any]
) -> tuple[Job, list[Query]]:
    """Write the plan, or join the one that is there: the job, and the queries of this call in their order."""
    steps = steps_of(settings)
    source, out = open_location(reference), open_location(output)
    model = load_model(source)
    if steps.transfer is not None:
        read_reference(source).column(steps.transfer["label_key"])  # says which there are
    if steps.map.surgery != "none" and model.kind == "scalex":
        raise UsageError("SCALEX has no surgery", where=str(source), fix="--surgery none")
    plan = json.loads(dump(make_plan(source, model.id, requests(queries), out, steps)))
    if any(out.exists(name) for name in ("streamx.json", "model.json")):
        raise UsageError("holds a store, view or model", where=str(out), fix="choose another folder")
    if not out.create(PLAN, dump(plan)):
        _join(out, plan, incremental=steps.map.surgery == "incremental")
    return Job(source, model.id, out, steps), plan["queries"]


def _join(out: Location, plan: dict[str, Any], *, incremental: bool) -> None:
    """Hold a call against the plan of its job, to which it may add queries."""
    seen = Seen()
    while True:
        with claimed(out, PLAN, seen) as ours:
            before = read_plan(out)
            more = added(before, plan, str(out))
            if incremental and plan["queries"] != before["queries"]:
                raise UsageError(
                    "incremental surgery takes the queries of its job in their order, these are others",
                    where=str(out),
                    fix=f"the same files; or a new job, on the reference {out}/{UPDATED}",
                )
            if more and ours:
                out.write(PLAN, dump(before | {"queries": before["queries"] + more}))
            if ours or not more:
                return
        time.sleep(POLL_SECONDS)


def _way(job: Job, client: Any, n_queries: int) -> AbstractContextManager[Spread]:
    if client is not None:
        return on_dask(job, client)
    workers = min(job.steps.map.workers, n_queries)
    return on_workers(job, workers) if workers > 1 else in_turn(job)


def _map_all(job: Job, queries: Sequence[Query], way: AbstractContextManager[Spread], progress: bool) -> None:
    """All queries to their end; what other processes have is waited for, and taken over if these die."""
    out = job.output
    waiting = [query for query in queries if not finished(out, query["name"])]
    before = len(queries) - len(waiting)
    bar = tqdm(total=len(queries), initial=before, unit="query", disable=None if progress else True)
    with bar, way as spread:
        while waiting:
            busy = []
            for query, how in spread(waiting):
                if isinstance(how, str):
                    _fail(job, query, {"what": how, "kind": "ResourceError", "where": None, "fix": None})
                if how:
                    bar.update()
                else:
                    busy.append(query)
            waiting = [query for query in busy if not finished(out, query["name"])]
            bar.update(len(busy) - len(waiting))
            if waiting:
                time.sleep(POLL_SECONDS)


def _fail(job: Job, query: Query, error: dict[str, Any]) -> None:
    """A query that no process could bring to a record of its own."""
    record = {"name": query["name"], "source": query["source"], "error": error, "warnings": []}
    write_record(job.output, record)


def _extend(job: Job, queries: Sequence[Query], progress: bool) -> None:
    """One model with the batches of all queries, added in their order."""
    out, seen = job.output, Seen()
    while True:
        with claimed(out, UPDATED, seen) as ours:
            for query in queries if ours else ():
                if not finished(out, query["name"]):
                    _add(job, query, progress)
        if ours:
            return
        time.sleep(POLL_SECONDS)


def _add(job: Job, query: Query, progress: bool) -> None:
    assert job.steps.surgery is not None
    inputs, updated = {query["name"]: query["source"]}, job.output.below(UPDATED)
    try:
        surgery(job.reference, inputs, updated, progress=progress, **job.steps.surgery)
    except Exception as error:
        log.error("%s: %s", query["name"], error)
        _fail(job, query, error_of(error))
