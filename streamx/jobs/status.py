"""``streamx status`` and ``sx.status``: how far a mapping job is."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamx.errors import IntegrityError, UsageError
from streamx.jobs.claims import LEASE, alive, held
from streamx.jobs.records import TIMINGS, read_plan, read_record
from streamx.store.location import Location, open_location

STATES = ("done", "failed", "running", "waiting")


def status(output: str | Path | Location, names: Sequence[str] | None = None) -> dict[str, Any]:
    """What is known of a job, while it runs and afterwards.

    Parameters
    ----------
    output
        The job's folder or prefix.
    names
        Only these queries.

    Returns
    -------
    dict
        ``path``, ``n_queries``, how many are ``done``, ``failed``, ``running`` and ``waiting``, ``n_cells``
        and ``seconds`` of those that are done, and ``queries``: for each its ``name``, ``status``,
        ``n_cells``, ``n_passed``, ``gene_overlap``, ``accuracy`` (where truth is known), ``seconds``, ``by``
        (machine and process, of those that run; and for how long it has said nothing, if for more than a
        minute: then a call of the job takes the query over), ``n_warnings`` and ``error``.

    Raises
    ------
    UsageError
        If there is no job.
    """
    out = open_location(output)
    planned = [query["name"] for query in read_plan(out)["queries"]]
    for name in names or ():
        if name not in planned:
            raise UsageError(f"no query {name!r}", where=str(out), fix=f"one of {', '.join(planned[:9])}")
    claims = held(out)
    rows = [_row(out, name, claims.get(name, [])) for name in names or planned]
    number = Counter(row["status"] for row in rows)
    done = [row for row in rows if row["status"] == "done"]
    return {
        "path": str(out),
        "n_queries": len(rows),
        **{state: number[state] for state in STATES},
        "n_cells": sum(row["n_cells"] for row in done),
        "seconds": round(sum(row["seconds"] or 0 for row in rows), 3),
        "queries": rows,
    }


def _row(out: Location, name: str, claims: Sequence[str]) -> dict[str, Any]:
    record, spent = read_record(out, name), read_record(out, name, TIMINGS) or {}
    row = {
        "name": name,
        "status": "waiting",
        "n_cells": None,
        "n_passed": None,
        "gene_overlap": None,
        "accuracy": None,
        "seconds": None,
        "by": None,
        "n_warnings": 0,
        "error": None,
    }
    if record is not None:
        error = record["error"]
        row |= {"status": "done" if error is None else "failed", "n_warnings": len(record["warnings"])}
        row |= {key: record.get(key) for key in ("n_cells", "n_passed", "gene_overlap")}
        row |= {"accuracy": (record.get("transfer") or {}).get("accuracy"), "seconds": spent.get("seconds")}
        if error is not None:
            row["error"] = f"{error['where']}: {error['what']}" if error["where"] else error["what"]
    elif claims and alive(out, claims[-1]):
        row |= {"status": "running", "by": _holder(out, claims[-1])}
    return row


def _holder(out: Location, key: str) -> str | None:
    try:
        holder = json.loads(out.read(key))
    except IntegrityError:  # it has just finished
        return None
    silent = time.time() - holder["time"]
    told = f", silent for {silent / 60:.0f} min" if silent > LEASE else ""
    return f"{holder['host']}:{holder['pid']}{told}"
