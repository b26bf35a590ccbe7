"""What is known of each query of a job, as it lies in its folder. Reading it needs no model and no data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamx.errors import BadFileError, SettingsChangedError, UsageError
from streamx.jobs.plan import PLAN
from streamx.store.ingest.source import file_checksum
from streamx.store.location import Location, is_url
from streamx.store.manifest import dump

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
    try:
        return json.loads(out.read(PLAN))
    except ValueError:
        raise BadFileError("is no JSON", where=f"{out}/{PLAN}", fix="begin the job anew, elsewhere") from None


def read_record(out: Location, name: str, kind: str = RECORDS) -> dict[str, Any] | None:
    """Record (or timings) of a query, or None."""
    key = f"{kind}/{name}.json"
    return json.loads(out.read(key)) if out.exists(key) else None


def write_record(out: Location, record: Mapping[str, Any]) -> None:
    """Put the record of a query in place; a failure never replaces what another process has recorded."""
    key = f"{RECORDS}/{record['name']}.json"
    if record["error"] is None:
        out.write(key, dump(record))
    else:
        out.create(key, dump(record))


def finished(out: Location, name: str) -> bool:
    """Whether a query needs no more work in this run; one that failed is taken up again by the next."""
    return out.exists(f"{RECORDS}/{name}.json")


def stamp(source: str) -> list[int] | None:
    """What tells, without reading it, that a file may have changed; None for a folder or URL."""
    path = Path(source)
    if is_url(source) or not path.is_file():
        return None
    return [path.stat().st_size, path.stat().st_mtime_ns]


def check_inputs(out: Location, queries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to take a query for finished whose files are others now. Those in a bucket are not looked at.

    Raises
    ------
    SettingsChangedError
        Names the query.
    """
    for query in queries:
        record, spent = (read_record(out, query["name"], kind) for kind in (RECORDS, TIMINGS))
        if record is None or spent is None or record["error"] is not None:
            continue
        now = [stamp(source) for source in query["source"]]
        if None in now or now == spent["stamps"]:
            continue
        checksums = [file_checksum(Path(source)) for source in query["source"]]
        if sorted(checksums) != sorted(record["inputs"].values()):
            raise SettingsChangedError(
                f"{query['name']} was mapped, and its file has changed since",
                where=", ".join(query["source"]),
                fix=f"choose another output; or delete {out}/{RECORDS}/{query['name']}.json and "
                f"{out}/{query['name']}.zarr to map it again",
            )


def forget_failed(out: Location, names: list[str]) -> None:
    """Let the queries that failed be tried again."""
    for name in names:
        record = read_record(out, name)
        if record is not None and record["error"] is not None:
            out.delete(f"{RECORDS}/{name}.json")
