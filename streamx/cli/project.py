"""``streamx project``: new files -> latents in the space of a reference model."""

from __future__ import annotations

import argparse

from streamx.cli.verb import Result, Verb, add_settings, given
from streamx.config import ProjectConfig
from streamx.errors import PartialError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the reference: a folder that `train` wrote")
    parser.add_argument(
        "queries",
        nargs="+",
        metavar="QUERY",
        help="a file, or NAME=FILE; files under one NAME form one query, whose statistics are taken together",
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for OUT/<query>.zarr")
    add_settings(parser, ProjectConfig)


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return {"queries": sx.project(args.model, args.queries, args.output, **given(args, ProjectConfig))}


def exit_code(result: Result) -> int:
    failed = any(query["status"] == "failed" for query in result["queries"])
    return PartialError.exit_code if failed else 0


VERB = Verb(
    name="project",
    help="map new cells onto a reference without training; finished queries are skipped when run again",
    example="  streamx project model pbmc4k.h5ad stim=run1.h5ad stim=run2.h5ad -o mapped",
    add_arguments=add_arguments,
    run=run,
    exit_code=exit_code,
    measured=True,
)
