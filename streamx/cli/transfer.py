"""``streamx transfer``: labels of the reference -> labels and uncertainty for mapped cells."""

from __future__ import annotations

import argparse

from streamx.cli.verb import Result, Verb, add_settings, given
from streamx.config import TransferConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the reference: a folder that `train` wrote")
    parser.add_argument("output", metavar="OUT", help="the folder that `project` wrote")
    add_settings(parser, TransferConfig)


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return dict(sx.transfer(args.model, args.output, **given(args, TransferConfig)))


VERB = Verb(
    name="transfer",
    help="give mapped cells the labels of their neighbours in the reference, with an uncertainty",
    example="  streamx transfer model mapped --label-key cell_type --threshold 0.5",
    add_arguments=add_arguments,
    run=run,
)
