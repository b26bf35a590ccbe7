"""``streamx simulate``: a synthetic atlas of any size."""

from __future__ import annotations

import argparse

from streamx.cli.info import show as show_collection
from streamx.cli.show import columns
from streamx.cli.verb import Result, Verb, add_settings, given
from streamx.config import SimulateConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", required=True, metavar="STORE", help="the store, or the folder of files, to write"
    )
    add_settings(parser, SimulateConfig)


def run(args: argparse.Namespace) -> Result:
    from streamx.simulate.write import simulate

    settings = given(args, SimulateConfig)
    made = simulate(args.output, **settings)
    if isinstance(made, list):
        return {"files": [str(path) for path in made], "bytes": sum(path.stat().st_size for path in made)}
    return {"store": args.output, **made.summary()}


def show(result: Result) -> str:
    return columns(result) if "files" in result else show_collection(result)


VERB = Verb(
    name="simulate",
    help="write a synthetic atlas of any size, as a store or as h5ad files",
    example="  streamx simulate -o atlas --n-cells 10000000 --n-batches 100 --memory 1GB\n"
    "  streamx simulate -o files --format h5ad --n-proteins 20 --seed 1",
    add_arguments=add_arguments,
    run=run,
    show=show,
    measured=True,
)
