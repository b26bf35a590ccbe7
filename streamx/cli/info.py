"""``streamx info``: what a store, view or model holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from streamx.cli.show import columns
from streamx.cli.verb import Result, Verb
from streamx.errors import BadFileError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="STORE|VIEW|MODEL", help="what to describe")


def run(args: argparse.Namespace) -> Result:
    manifest = Path(args.path) / "model.json"
    if manifest.is_file():
        return {"path": args.path, **describe_model(manifest)}
    import streamx as sx

    collection = sx.open(args.path)
    result = {"path": args.path, **collection.summary()}
    if collection.kind == "view":
        result["store_generation"] = (collection.view or {}).get("store_generation")
    return result


def describe_model(manifest: Path) -> Result:
    """The scalars of a model's manifest, and how long its lists are."""
    try:
        content = json.loads(manifest.read_text())
    except ValueError as error:
        raise BadFileError(f"not JSON: {error}", where=str(manifest), fix="train the model again") from None
    short = {key: value for key, value in content.items() if not isinstance(value, dict | list)}
    return {"kind": "model", **short}


def show(result: Result) -> str:
    """Batches below each other; of lists of names only how many there are."""
    text = {key: value for key, value in result.items() if key not in ("batches", "view")}
    lines = columns(text)
    if result.get("batches"):
        rows = [{"batch": name, "cells": cells} for name, cells in result["batches"].items()]
        lines += "\n" + columns({"batches": rows})
    return lines


VERB = Verb(
    name="info",
    help="describe a store, view or model: cells, genes, batches, dtypes, bytes per cell, generation",
    example="  streamx info atlas\n  streamx info view --json",
    add_arguments=add_arguments,
    run=run,
    show=show,
)
