"""What a mapping job is: a reference, settings, and queries in their order. Pure: nothing is opened here.

::

    OUT/
      map.json                what is mapped onto what; a later call may add queries
      <name>.zarr             cells of a query: latents, labels
      records/<name>.json     what is known of it, or its error; with it the query is finished
      timings/<name>.json     seconds, memory, host: what differs from run to run
      claims/<name>.<n>.json  who works on it now
      <name>.model            with ``surgery="per-query"``: the reference and this query's batches
      updated.model           with ``surgery="incremental"``: the reference and all queries' batches

Everything but ``timings`` and ``claims`` follows from the plan and the inputs alone, bit by bit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamx
from streamx.config import (
    FreezeConfig,
    MapConfig,
    MetricsConfig,
    ProjectConfig,
    SurgeryConfig,
    TransferConfig,
    build,
)
from streamx.errors import SettingsChangedError, UsageError
from streamx.store.journal import first_difference
from streamx.store.location import Location, is_url, relative

if TYPE_CHECKING:
    from streamx.query import Request

FORMAT = 1
PLAN = "map.json"
# Settings that change how the work is done and not its result.
FREE = ("device", "memory", "threads", "workers", "on_error", "checkpoint_seconds")
_STEPS = {"project": ProjectConfig, "transfer": TransferConfig, "metrics": MetricsConfig}


@dataclass(frozen=True)
class Steps:
    """The settings of each step; None for one that is left out.

    Attributes
    ----------
    surgery
        Fields of :class:`~streamx.config.SurgeryConfig` and :class:`~streamx.config.FreezeConfig` that were
        given.
    """

    map: MapConfig
    project: dict[str, Any]
    transfer: dict[str, Any] | None
    metrics: dict[str, Any] | None
    surgery: dict[str, Any] | None


def steps_of(settings: Mapping[str, Any]) -> Steps:
    """The settings by step. One that several steps know, as ``seed``, is given to all of them.

    Raises
    ------
    UsageError
        For a setting that none of them knows, and for one of a step that is left out.
    """
    own = {f.name for f in fields(MapConfig)}
    config: MapConfig = build(MapConfig, {name: settings[name] for name in own & settings.keys()})
    kinds = _STEPS | {"surgery": SurgeryConfig, "freeze": FreezeConfig}
    known = {step: {f.name for f in fields(kind)} for step, kind in kinds.items()}
    known["metrics"] -= {"batch_key", "truth_key"}  # the reference's own; and what transfer has, below
    wanted = {"project"} | ({"transfer"} if config.label_key is not None else set())
    wanted |= {"metrics"} if config.metrics else set()
    wanted |= {"surgery", "freeze"} if config.surgery != "none" else set()
    for name in settings.keys() - own:
        holders = [step for step, names in known.items() if name in names]
        if not holders:
            every = own.union(*known.values())
            raise UsageError(f"unknown setting {name!r}", fix=f"one of {', '.join(sorted(every))}")
        if not wanted & set(holders):
            fix = {"transfer": "name the labels, --label-key", "metrics": "leave --no-metrics out"}
            raise UsageError(
                f"{name} is a setting of {holders[0]}, which is left out",
                fix=fix.get(holders[0], "--surgery per-query or incremental"),
            )
    found: dict[str, Any] = {}
    shared = {"label_key": config.label_key, "memory": config.memory, "threads": config.threads}
    for step, kind in kinds.items():
        mine = {name: value for name, value in {**settings, **shared}.items() if name in known[step]}
        if step in wanted:
            build(kind, mine)  # says what is wrong before anything runs
        found[step] = mine if step in wanted else None
    if found["transfer"] is not None and found["metrics"] is not None:
        found["metrics"]["truth_key"] = found["transfer"].get("truth_key")
    surgery = None if found["surgery"] is None else found["surgery"] | found["freeze"]
    return Steps(config, found["project"], found["transfer"], found["metrics"], surgery)


def decisive(steps: Steps) -> dict[str, Any]:
    """All settings that the result depends on, with their defaults, as JSON has them."""
    found: dict[str, Any] = {"label_key": steps.map.label_key}
    for step, kind in _STEPS.items():
        given = getattr(steps, step)
        found[step] = None if given is None else _bare(asdict(build(kind, given)))
    found["surgery"] = None
    if steps.surgery is not None:
        found["surgery"] = {"mode": steps.map.surgery}
        for config in (SurgeryConfig, FreezeConfig):
            mine = {f.name for f in fields(config)} & steps.surgery.keys()
            found["surgery"] |= _bare(asdict(build(config, {name: steps.surgery[name] for name in mine})))
    return found


def _bare(settings: dict[str, Any]) -> dict[str, Any]:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {name: value for name, value in plain.items() if name not in FREE}


def make_plan(
    reference: Location, model_id: str, requests: Sequence[Request], output: Location, steps: Steps
) -> dict[str, Any]:
    """The plan as ``map.json`` holds it.

    Raises
    ------
    UsageError
        If a query is no file: other processes could not open it.
    """
    return {
        "format": FORMAT,
        "reference": {"path": relative(reference, output), "id": model_id},
        "settings": decisive(steps),
        "queries": [{"name": r.name, "source": [_source(item) for item in r.inputs]} for r in requests],
        "versions": {"streamx": streamx.__version__},
    }


def added(before: Mapping[str, Any], plan: Mapping[str, Any], where: str) -> list[Any]:
    """Queries of a call's plan that its job has not yet.

    Raises
    ------
    SettingsChangedError
        If they differ in more than that; names the field.
    """
    fix = "choose another folder; or give the same reference and settings, and new files other names"
    apart = {"versions": None, "queries": None}
    field = first_difference({**before, **apart}, {**plan, **apart})
    known = {query["name"]: query["source"] for query in before["queries"]}
    for query in plan["queries"]:
        earlier = known.get(query["name"], query["source"])
        field = field or first_difference(earlier, query["source"], f"file of {query['name']}")
    if field:
        raise SettingsChangedError(f"was planned with another {field}", where=where, fix=fix)
    return [query for query in plan["queries"] if query["name"] not in known]


def _source(item: Any) -> str:
    """A file's absolute path, or its URL."""
    if isinstance(item, Path):
        return os.path.abspath(item)
    if is_url(str(item)):
        return str(item)
    raise UsageError(f"a query is a {type(item).__name__}", fix="write it to a file: a job maps files")


def part_of(queries: Sequence[Any], number: int, parts: int) -> list[Any]:
    """The queries of part ``number`` (from 1) of so many; every query is in one of them."""
    return list(queries[number - 1 :: parts])


def parse_part(text: str) -> tuple[int, int]:
    """``"3/16"`` -> (3, 16).

    Raises
    ------
    UsageError
        If it isn't of that form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= parts:
        raise UsageError(f"task {text!r}", fix="i/n, with i from 1 to n: 3/16")
    return number, parts
