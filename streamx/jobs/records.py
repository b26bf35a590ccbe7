"""What is known of each query of a job, as it lies in its folder. Reading it needs no model and no data."""

from __future__ import annotations

import json
from typing import Any

from streamx.errors import UsageError
from streamx.jobs.plan import PLAN
from streamx.store.location import Location

RECORDS, TIMINGS = "records", "timings"


def read_plan(out: Location) -> dict[str, Any]:
    """The plan of a job.

    Raises
    ------
    UsageError
        If there is none.
    """
    if not out.exists(PLAN):
        raise UsageError(
            f"holds no {PLAN}", where=str(out), fix="streamx map REFERENCE QUERY... -o OUT begins a job"
        )
    return json.loads(out.read(PLAN))


def read_record(out: Location, name: str, kind: str = RECORDS) -> dict[str, Any] | None:
    """Record (or timings) of a query, or None."""
    key = f"{kind}/{name}.json"
    return json.loads(out.read(key)) if out.exists(key) else None


def finished(out: Location, name: str) -> bool:
    """Whether a query needs no more work in this run; one that failed is taken up again by the next."""
    return out.exists(f"{RECORDS}/{name}.json")


def forget_failed(out: Location, names: list[str]) -> None:
    """Let the queries that failed be tried again."""
    for name in names:
        record = read_record(out, name)
        if record is not None and record["error"] is not None:
            out.delete(f"{RECORDS}/{name}.json")
