"""``streamx metrics``: how well batches are mixed and labels kept apart."""

from __future__ import annotations

import argparse

from streamx.cli.show import columns, number, table
from streamx.cli.verb import Result, Verb, add_settings, given
from streamx.config import MetricsConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the reference: a folder that `train` wrote")
    parser.add_argument("output", nargs="?", metavar="OUT", help="the folder that `project` wrote")
    add_settings(parser, MetricsConfig)


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return dict(sx.metrics(args.model, args.output, **given(args, MetricsConfig)))


def show(result: Result) -> str:
    """A line per metric: value, exact or its 95 % interval from a sample, cells that it rests on."""
    details = result["details"]
    rows = []
    for name, value in result.items():
        if name not in details:
            continue
        how = details[name]
        certain = "exact" if how["exact"] and value is not None else how.get("reason", "sampled")
        if "knn_recall" in how:
            certain = f"neighbours' recall {number(how['knn_recall'])}"
        if how.get("ci95"):
            certain = "sampled: " + " to ".join(number(limit) for limit in how["ci95"])
        rows.append({"metric": name, "value": value, "exact, or 95 % interval": certain, "cells": how["n"]})
    rest = {key: value for key, value in result.items() if key not in details and key != "details"}
    return f"{table(rows)}\n{columns(rest)}"


VERB = Verb(
    name="metrics",
    help="measure mixing of batches and separation of labels in the latent",
    example="  streamx metrics model mapped --label-key cell_type --truth-key cell_type",
    add_arguments=add_arguments,
    run=run,
    show=show,
)
