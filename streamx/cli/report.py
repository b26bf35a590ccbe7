"""``streamx report``: one page of what was mapped onto what."""

from __future__ import annotations

import argparse

from streamx.cli.verb import Result, Verb, add_settings, given
from streamx.config import ReportConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", help="the folder that `map` or `project` wrote")
    parser.add_argument("-o", "--page", required=True, metavar="PAGE", help="the page: a name in .html")
    add_settings(parser, ReportConfig)


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return dict(sx.report(args.output, args.page, **given(args, ReportConfig)))


VERB = Verb(
    name="report",
    help="write one HTML page of what was mapped onto what, and how well",
    example="  streamx report mapped --model model -o report.html",
    add_arguments=add_arguments,
    run=run,
    measured=True,
)
