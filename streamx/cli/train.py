"""``streamx train``: view -> model."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from streamx.cli.verb import Result, Verb, add_networks, add_settings, given
from streamx.config import NETWORKS, TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("view", metavar="VIEW", help="the view to train on")
    parser.add_argument("-o", "--output", required=True, metavar="MODEL", help="the model folder to write")
    add_settings(parser, TrainConfig)
    add_networks(parser, NETWORKS)


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return asdict(sx.train(args.view, args.output, **given(args, TrainConfig, *NETWORKS.values())))


VERB = Verb(
    name="train",
    help="train a reference model on a view; run again, it goes on from its last checkpoint",
    example="  streamx train view -o model --max-iteration 10000\n"
    "  streamx train view -o model --model scvi --arches",
    add_arguments=add_arguments,
    run=run,
    measured=True,
)
