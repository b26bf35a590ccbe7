"""``streamx convert``: any files -> one store."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from streamx.cli.info import show
from streamx.cli.verb import Result, Verb, add_dask, add_settings, given
from streamx.config import ConvertConfig
from streamx.errors import PartialError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="h5ad, zarr, 10x h5, mtx folder, csv, tsv or h5mu; globs and folders of such files",
    )
    parser.add_argument("-o", "--output", required=True, metavar="STORE", help="the store to write")
    parser.add_argument(
        "--append", action="store_true", help="add the inputs to a store that exists, as its next generation"
    )
    add_dask(parser)
    add_settings(parser, ConvertConfig)


def run(args: argparse.Namespace) -> Result:
    from streamx.cluster import client_of
    from streamx.store.convert import convert_files

    settings = given(args, ConvertConfig)
    with client_of(args.dask):
        done = convert_files(args.inputs, args.output, append=args.append, **settings)
    skipped = [{"input": error.where, "error": error.what} for error in done.skipped]
    predicted = {"predicted": asdict(done.needs)} if done.needs is not None else {}
    return {"store": args.output, **done.collection.summary(), "skipped": skipped, **predicted}


def exit_code(result: Result) -> int:
    return PartialError.exit_code if result["skipped"] else 0


VERB = Verb(
    name="convert",
    help="read any number of files into one store, batch by batch, within a memory limit",
    example="  streamx convert studies/*.h5ad more.h5 -o atlas --batch-key donor --memory 4GB\n"
    "  streamx convert new_study.h5ad -o atlas --append",
    add_arguments=add_arguments,
    run=run,
    show=show,
    exit_code=exit_code,
    measured=True,
)
