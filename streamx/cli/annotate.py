"""``streamx annotate``: join columns to cells by name, without touching counts."""

from __future__ import annotations

import argparse

from streamx.cli.verb import Result, Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="STORE|OUT", help="a store, or the folder that `project` wrote")
    parser.add_argument("table", help="csv or tsv: first column the cell's name, the others are joined")


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return dict(sx.annotate(args.path, args.table))


VERB = Verb(
    name="annotate",
    help="join a table of labels to the cells of a store or of mapped queries, by cell name",
    example="  streamx annotate atlas labels.csv",
    add_arguments=add_arguments,
    run=run,
)
