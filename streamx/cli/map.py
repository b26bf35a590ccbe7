"""``streamx map``: many query files onto one reference, in parallel, resumable."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from streamx.cli.show import as_json
from streamx.cli.status import show
from streamx.cli.surgery import MOVING
from streamx.cli.verb import Result, Verb, add_dask, add_settings, given
from streamx.config import (
    FreezeConfig,
    MapConfig,
    MetricsConfig,
    ProjectConfig,
    SurgeryConfig,
    TransferConfig,
)
from streamx.errors import PartialError, UsageError

GROUPS: dict[str, type] = {
    "mapping": ProjectConfig,
    "labels, with --label-key": TransferConfig,
    "metrics": MetricsConfig,
    "surgery": SurgeryConfig,
    "what stays in surgery": FreezeConfig,
}
NOT_HERE = ("on_error", *MOVING)  # a query that fails never stops the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REFERENCE", nargs="?", help="a folder that `train` wrote")
    parser.add_argument(
        "queries",
        metavar="QUERY",
        nargs="*",
        help="files, globs and folders, each file a query; NAME=FILE names one",
    )
    parser.add_argument("-o", "--output", metavar="OUT", help="folder for all that is found")
    add_dask(parser)
    parser.add_argument(
        "--plan", metavar="FILE", help="write the job to a JSON file and stop; with --task, run it from there"
    )
    parser.add_argument(
        "--task",
        metavar="I/N",
        help="only the I-th of N parts: of a Slurm array, --task $SLURM_ARRAY_TASK_ID/16",
    )
    add_settings(parser, MapConfig)
    taken = [*NOT_HERE, *(setting.name for setting in fields(MapConfig))]
    for title, config in GROUPS.items():
        add_settings(parser.add_argument_group(title), config, skip=tuple(taken))
        taken += [setting.name for setting in fields(config)]


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    settings = given(args, MapConfig, *GROUPS.values(), skip=NOT_HERE)
    if args.plan is not None and args.task is not None:
        call = _read(Path(args.plan)) | _of_this_machine(args, settings)
    elif args.reference is None or not args.queries or args.output is None:
        raise UsageError(
            "a job has a reference, queries and an output", fix="streamx map REFERENCE QUERY... -o OUT"
        )
    else:
        call = {"reference": args.reference, "queries": args.queries, "output": args.output, **settings}
    if args.plan is not None and args.task is None:
        return _write(Path(args.plan), call)
    return sx.map(**call, task=args.task, dask=args.dask)


def _of_this_machine(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings given beside a plan: what changes how the work is done, and not its result."""
    from streamx.jobs.plan import FREE

    settled = [f"--{name.replace('_', '-')}" for name in settings if name not in FREE]
    if args.reference is not None or args.queries or args.output is not None or settled:
        raise UsageError(
            f"the plan says what is mapped onto what, and how{': ' if settled else ''}{', '.join(settled)}",
            where=args.plan,
            fix="of settings, beside --plan and --task: --workers, --threads, --memory, --device",
        )
    return settings


def _write(path: Path, call: dict[str, Any]) -> Result:
    """The call with all that it names in full, so that it can be made elsewhere."""
    from streamx.jobs.call import begin_job

    settings = {name: value for name, value in call.items() if name not in ("reference", "queries", "output")}
    job, queries = begin_job(call["reference"], call["queries"], call["output"], settings)
    for name, place in {"reference": job.reference, "output": job.output}.items():
        call[name] = str(place if place.shared else Path(place.root).absolute())
    call["queries"] = {query["name"]: query["source"] for query in queries}
    path.write_text(as_json(call) + "\n")
    return {"plan": str(path), "path": call["output"], "n_queries": len(queries), "queries": []}


def _read(path: Path) -> dict[str, Any]:
    try:
        call = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"can't be read: {error}", where=str(path), fix="write it by the same command without --task"
        ) from None
    if not isinstance(call, dict) or not {"reference", "queries", "output"} <= call.keys():
        raise UsageError("is no plan of a job", where=str(path), fix="streamx map ... --plan FILE writes one")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in call.items()}


def exit_code(result: Result) -> int:
    left = sum(result.get(state, 0) for state in ("failed", "running", "waiting"))
    return PartialError.exit_code if left else 0


VERB = Verb(
    name="map",
    help="map many query files onto a reference, label and score them, several at once; run again, it goes "
    "on where it was",
    example="  streamx map model incoming/*.h5ad -o mapped --label-key cell_type --workers 4\n"
    "  streamx map model incoming/*.h5ad -o mapped --plan job.json\n"
    "  streamx map --plan job.json --task 3/16",
    add_arguments=add_arguments,
    run=run,
    show=show,
    exit_code=exit_code,
    measured=True,
)
