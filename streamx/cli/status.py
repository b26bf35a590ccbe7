"""``streamx status``: how far a mapping job is."""

from __future__ import annotations

import argparse

from streamx.cli.show import columns
from streamx.cli.verb import Result, Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", help="the folder that `map` writes")


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return dict(sx.status(args.output))


def show(result: Result) -> str:
    """A line per query, without the columns that are empty for all of them."""
    rows = result["queries"]
    empty = {name for name in (rows[0] if rows else ()) if not any(row[name] for row in rows)}
    rows = [{name: value for name, value in row.items() if name not in empty} for row in rows]
    return columns(result | {"queries": rows})


VERB = Verb(
    name="status",
    help="say of each query of a mapping job whether it is done, failed, running or waiting",
    example="  streamx status mapped",
    add_arguments=add_arguments,
    run=run,
    show=show,
)
