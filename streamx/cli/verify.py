"""``streamx verify``: is every byte of a store, view or model what was written?"""

from __future__ import annotations

import argparse

from streamx.cli.verb import Result, Verb
from streamx.errors import IntegrityError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="STORE|VIEW|MODEL", help="what to check")


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return dict(sx.verify(args.path))


def exit_code(result: Result) -> int:
    return 0 if result["ok"] else IntegrityError.exit_code


VERB = Verb(
    name="verify",
    help="check every object of a store, view or model against its checksum",
    example="  streamx verify atlas",
    add_arguments=add_arguments,
    run=run,
    exit_code=exit_code,
)
