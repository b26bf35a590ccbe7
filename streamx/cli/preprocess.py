"""``streamx preprocess``: store -> view (chosen cells and genes, and how to transform them)."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from streamx.cli.info import show
from streamx.cli.verb import Result, Verb, add_dask, add_settings, given
from streamx.config import PreprocessConfig
from streamx.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="the store to read")
    parser.add_argument("-o", "--output", metavar="VIEW", help="the view to write")
    parser.add_argument(
        "--update",
        metavar="VIEW",
        help="add what was appended to the view's store since; genes and tables stay as they are",
    )
    add_dask(parser)
    add_settings(parser, PreprocessConfig)


def run(args: argparse.Namespace) -> Result:
    settings = given(args, PreprocessConfig)
    if args.update and (args.store or args.output):
        raise UsageError("--update takes the view alone", fix="streamx preprocess --update VIEW")
    if not args.update and not (args.store and args.output):
        raise UsageError("a STORE and -o VIEW are needed", fix="streamx preprocess STORE -o VIEW")
    from streamx.cluster import client_of
    from streamx.preprocess.run import preprocess_store, update_view

    if args.update:
        frozen = sorted(set(settings) - {"memory", "threads"})
        if frozen:
            raise UsageError(
                f"an update keeps the view's own settings, --{frozen[0].replace('_', '-')} can't change them",
                fix="run `streamx preprocess STORE -o NEW_VIEW` with other settings",
            )
        with client_of(args.dask):
            view = update_view(args.update, **settings)
        return {"path": args.update, **view.summary()}
    with client_of(args.dask):
        view, needs = preprocess_store(args.store, args.output, **settings)
    predicted = {"predicted": asdict(needs)} if needs is not None else {}
    return {"path": args.output, **view.summary(), **predicted}


VERB = Verb(
    name="preprocess",
    help="filter cells and genes, find variable genes, and write the view that models train on",
    example="  streamx preprocess atlas -o view --n-top-features 2000\n"
    "  streamx preprocess atlas -o view --where \"study in ['pbmc3k', 'donorA']\"\n"
    "  streamx preprocess --update view",
    add_arguments=add_arguments,
    run=run,
    show=show,
    measured=True,
)
