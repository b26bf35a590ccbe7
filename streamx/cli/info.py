"""``streamx info``: what a store, view or model holds."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from streamx.cli.show import columns
from streamx.cli.verb import Result, Verb
from streamx.errors import BadFileError, StreamxError

if TYPE_CHECKING:
    from streamx.store.collection import Collection
    from streamx.store.location import Location


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="STORE|VIEW|MODEL", help="what to describe")


def run(args: argparse.Namespace) -> Result:
    import streamx as sx
    from streamx.store.location import open_location

    location = open_location(args.path)
    if location.exists("model.json"):
        return {"path": args.path, **describe_model(location)}
    collection = sx.open(location)
    result = {"path": args.path, **collection.summary()}
    return result | generations(collection) if collection.kind == "view" else result


def generations(view: Collection) -> dict[str, Any]:
    """Which generation of its store a view was made from, and at which the store is now (None: not found)."""
    from streamx.preprocess.view import store_of

    try:
        now = store_of(view).generation
    except StreamxError:
        now = None
    return {"store_generation": (view.view or {}).get("store_generation"), "store_generation_now": now}


def describe_model(location: Location) -> Result:
    """Of a model's card what says where it comes from; genes by their number."""
    from streamx.train.card import render

    try:
        card = json.loads(location.read("model.json"))
        return {
            "kind": "model",
            "model": card["model"],
            "id": card["id"],
            "n_genes": len(card["genes"]),
            "n_batches": len(card["batches"]),
            "batch_key": card["batch_key"],
            "norm": card["norm"],
            **card.get("training", {}),  # of a model that was trained on in Python: of several trainings
            "data": card.get("data", {}),  # models made before there was this part have none
            "surgery": [{"name": entry["name"]} | entry["report"] for entry in card.get("surgery", [])],
            "settings": card.get("settings", {}),
            "metrics": card.get("metrics", {}),
            "network": card["network"],
            "versions": card["versions"],
            "files": card["files"],
            "card": render(card),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise BadFileError(
            f"is no model card: {error}", where=f"{location}/model.json", fix="train it again"
        ) from None


def show(result: Result) -> str:
    """Names and values; batches below each other; the view's recipe only with --json; of a model its card."""
    if result["kind"] == "model":
        return str(result["card"])
    text = columns(
        {key: value for key, value in result.items() if key not in ("batches", "view", "predicted")}
    )
    if isinstance(result.get("batches"), dict) and result["batches"]:
        rows = [{"batch": name, "cells": cells} for name, cells in result["batches"].items()]
        text += "\n" + columns({"batches": rows})
    now, then = result.get("store_generation_now"), result.get("store_generation")
    if now is not None and then is not None and now > then:
        text += f"\nview at generation {then}, store at {now}: streamx preprocess --update {result['path']}"
    return text


VERB = Verb(
    name="info",
    help="describe a store, view or model: cells, genes, batches, dtypes, bytes per cell, generation",
    example="  streamx info atlas\n  streamx info view --json",
    add_arguments=add_arguments,
    run=run,
    show=show,
)
