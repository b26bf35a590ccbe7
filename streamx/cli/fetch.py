"""``streamx fetch``: a published model as a folder."""

from __future__ import annotations

import argparse

from streamx.cli.verb import Result, Verb, add_settings, given
from streamx.config import FetchConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="DOI|URL", help="a DOI or record of Zenodo, or the address of a model's zip file"
    )
    parser.add_argument("-o", "--output", required=True, metavar="MODEL", help="folder of the model")
    parser.add_argument("--url", metavar="URL", help="another service with Zenodo's interface")
    add_settings(parser, FetchConfig)


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return sx.fetch(args.source, args.output, base_url=args.url, **given(args, FetchConfig))


VERB = Verb(
    name="fetch",
    help="get a published model, checked byte by byte and unpacked safely; an interrupted download goes on",
    example="  streamx fetch 10.5281/zenodo.1234567 -o model",
    add_arguments=add_arguments,
    run=run,
)
