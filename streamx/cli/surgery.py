"""``streamx surgery``: a reference learns the batches of query files."""

from __future__ import annotations

import argparse

from streamx.cli.verb import Result, Verb, add_settings, given
from streamx.config import FreezeConfig, SurgeryConfig
from streamx.errors import PartialError

# Options that would move what the latents of the reference depend on; load_query_data has them.
MOVING = ("unfrozen", "freeze_expression", "freeze_batchnorm_encoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REFERENCE", help="a scvi, scanvi, totalvi or trvae model")
    parser.add_argument(
        "queries",
        metavar="QUERY",
        nargs="*",
        help="files to learn from, each a query; NAME=FILE names one",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="UPDATED", help="folder of the updated model"
    )
    parser.add_argument(
        "--watch",
        metavar="PLACE",
        help="go on with files that appear in a folder, or as lines of a text file, until Ctrl-C",
    )
    parser.add_argument(
        "--idle", metavar="SECONDS", type=float, help="with --watch: stop when nothing came for so long"
    )
    add_settings(parser, SurgeryConfig)
    add_settings(parser.add_argument_group("what stays"), FreezeConfig, skip=MOVING)
    parser.add_argument_group(
        "what the order of files changes",
        "Nothing, with a reference trained with --arches: batches may come in any order, and with --refit "
        "a batch in any number of files. The order counts where new batches share weights: with "
        "--no-freeze-decoder-first-layer, --no-freeze-classifier, a decoder with batch norm (unless "
        "--freeze-batchnorm-decoder), a modelled library size, whose encoder every batch trains on, and "
        "levels of further covariates, which come with the first batch that has them and then stay.",
    )
    parser.add_argument_group(
        "what surgery can't see",
        "A batch of nothing but a type that the reference lacks: its difference is learnt as a batch effect, "
        "and its cells lie within a known type. totalVI's classifier of batches, which training fools where "
        "batches lack proteins, has no part in surgery: a batch is learnt alone, with none to tell it from.",
    )


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    settings = given(args, SurgeryConfig, FreezeConfig, skip=MOVING)
    reports = sx.surgery(
        args.reference, args.queries, args.output, watch=args.watch, idle=args.idle, **settings
    )
    return {"path": args.output, "queries": reports}


def exit_code(result: Result) -> int:
    failed = any(report["status"] == "failed" for report in result["queries"])
    return PartialError.exit_code if failed else 0


VERB = Verb(
    name="surgery",
    help="extend a reference model by the batches of query files, one after the other; it can be stopped and "
    "run again at any point",
    example="  streamx surgery model new.h5ad -o updated --batch-key donor\n"
    "  streamx surgery model --watch incoming -o updated",
    add_arguments=add_arguments,
    run=run,
    exit_code=exit_code,
    measured=True,
)
