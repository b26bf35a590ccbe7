"""``streamx plot``: figures of a reference and of what was mapped onto it."""

from __future__ import annotations

import argparse

from streamx.cli.verb import Result, Verb, add_settings, given
from streamx.config import PlotConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the reference: a folder that `train` wrote")
    parser.add_argument("mapped", nargs="?", metavar="OUT", help="the folder that `project` wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FIGDIR", help="folder for the figures")
    add_settings(parser, PlotConfig)


def run(args: argparse.Namespace) -> Result:
    from streamx.figures import draw

    return {"figures": draw(args.model, args.mapped, args.output, **given(args, PlotConfig))}


VERB = Verb(
    name="plot",
    help="draw UMAPs, confusion matrices and the training history",
    example="  streamx plot model mapped -o figures --color batch cell_type --label-key cell_type",
    add_arguments=add_arguments,
    run=run,
    measured=True,
)
