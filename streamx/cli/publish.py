"""``streamx publish``: a model with its card as a record on Zenodo."""

from __future__ import annotations

import argparse

from streamx.cli.verb import Result, Verb, add_settings, given
from streamx.config import PublishConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of the model")
    parser.add_argument("--to", default="zenodo", choices=("zenodo",), help="where to (default: zenodo)")
    parser.add_argument("--url", metavar="URL", help="another service with Zenodo's interface")
    add_settings(parser, PublishConfig)


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return sx.publish(args.model, base_url=args.url, **given(args, PublishConfig))


VERB = Verb(
    name="publish",
    help="put a model on Zenodo with its card, checksums and a DOI; an interrupted upload goes on",
    example='  streamx publish model --sandbox --creator "Doe, Jane"\n'
    '  streamx publish model --creator "Doe, Jane" "Roe, Richard" --title "Lung atlas, scANVI"',
    add_arguments=add_arguments,
    run=run,
)
