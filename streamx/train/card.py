"""The model's card for people: ``README.md`` beside ``model.json``, rendered from it and nothing else.

It holds no time and no path, so a run that was killed and went on ends with the same bytes. Names from the
data (batches, labels) are text, whatever they hold: marks of Markdown and HTML are escaped.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from streamx.errors import UsageError
from streamx.store.collection import Collection
from streamx.store.location import Location
from streamx.store.manifest import dump
from streamx.train.model import CARD, read_card, seal

README = "README.md"
MOST_ROWS = 200  # of a table: the rest is in model.json
LONGEST_NAME = 200  # letters of a name that are shown


def data_of(view: Collection, label_key: str | None) -> dict[str, Any]:
    """What a model was trained on: cells per batch and label, and which store and view these were.

    Returns
    -------
    ``n_cells, n_genes, batches`` (name -> cells), ``labels`` (name -> cells; without a label key there are
    none), ``store`` (generation, and SHA-256 of its parts' checksums; None where a store was trained on).
    """
    counts = view.batch_sizes.tolist() if view.batches else []
    found: dict[str, Any] = {
        "n_cells": view.n_obs,
        "n_genes": view.n_vars,
        "batches": dict(zip(view.batches, counts, strict=True)),
        "labels": {},
        "store": None,
    }
    if label_key is not None:
        labels = view.obs_column(label_key).astype("category")
        sizes = np.bincount(labels.cat.codes + 1, minlength=len(labels.cat.categories) + 1)
        named = {str(name): int(n) for name, n in zip(labels.cat.categories, sizes[1:], strict=True) if n}
        found["labels"] = named | ({"(none)": int(sizes[0])} if sizes[0] else {})
    if view.view is not None and "store_parts" in view.view:
        parts = hashlib.sha256(dump(view.view["store_parts"])).hexdigest()
        found["store"] = {"generation": view.view["store_generation"], "sha256": parts}
    return found


def portable(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card without a path of the machine that it was made on: of ``init`` its last part."""
    settings = dict(card.get("settings") or {})
    begun = settings.get("train", {}).get("init")
    if begun is None:
        return dict(card)
    name = str(begun).rstrip("/").rpartition("/")[2]
    return {**card, "settings": settings | {"train": settings["train"] | {"init": name}}}


def write_card(location: Location, card: dict[str, Any]) -> None:
    """The card for people, then the one that makes the folder a model."""
    location.write(README, render(card).encode())
    location.write(CARD, seal(card))


def add_scores(location: Location, scores: Mapping[str, Any], of: Mapping[str, Any]) -> None:
    """Metrics of the reference's latents into both cards; they show until surgery adds cells.

    Parameters
    ----------
    scores
        As :meth:`streamx.metrics.Scores.to_json` gives them.
    of
        By which settings.

    Raises
    ------
    UsageError
        If the model has no card of ours.
    """
    card = read_card(location)
    if card is None:
        raise UsageError("has no card: another tool wrote it", where=str(location), fix="without --card")
    details = scores["details"]
    values = {name: {"value": scores[name]} | dict(details[name]) for name in details}
    here = {"id": card["id"], "added": card.get("added", [])}
    write_card(location, card | {"metrics": {"model": here, "settings": dict(of), "values": values}})


def _scores(card: Mapping[str, Any]) -> dict[str, str]:
    """The metrics, with their intervals, if they are of the model as it is now."""
    found = card.get("metrics") or {}
    if found.get("model") != {"id": card["id"], "added": card.get("added", [])}:
        return {}
    known = {name: of for name, of in found["values"].items() if of["value"] is not None}
    texts = {name: f"{of['value']:.4f}" for name, of in known.items()}
    for name, of in known.items():
        if of.get("ci95"):
            texts[name] += " (sampled: {:.4f} to {:.4f})".format(*of["ci95"])
    return {name: value for name, value in found["settings"].items() if value is not None} | texts


def escaped(value: Any) -> str:
    """Any text as Markdown that shows it, on one line."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+", " ", str(value)).strip()
    if len(text) > LONGEST_NAME:
        text = text[:LONGEST_NAME] + "..."
    text = re.sub(r"([\\`*\[\]|~#!])|(?<!\w)_|_(?!\w)", lambda mark: "\\" + mark[0], text)
    return html.escape(text, quote=False)


def render(card: Mapping[str, Any]) -> str:
    """``model.json`` as Markdown."""
    card = portable(card)
    data, training = card.get("data") or {}, card.get("training") or {}
    lines = [f"# {escaped(card['model'])} model", ""]
    lines += ["Written by streamx. `streamx project` maps new cells with it, `streamx transfer` labels them."]
    lines += _section("Data", _facts(card, data))
    lines += _counts("Batches", card.get("batch_key"), data.get("batches", {}))
    lines += _counts("Labels", card.get("label_key"), data.get("labels", {}))
    if card.get("surgery"):
        lines += _added(card["surgery"])
    lines += _section("Training", training)
    lines += _section("Metrics of the reference's latents", _scores(card))
    settings = card.get("settings") or {}
    lines += _section("Settings of the training", _flat(settings.get("train", {})))
    lines += _section("Network", _flat(card.get("network", {})))
    lines += _section("Preprocessing", _flat((card.get("preprocessing") or {}).get("parameters", {})))
    lines += _section("Versions", card.get("versions", {}))
    files = {name: f"{of[0]:,} bytes, crc32 {of[1]}" for name, of in card.get("files", {}).items()}
    lines += _section("Files", {"SHA-256 of weights and tables": card["id"], **files})
    return "\n".join(lines) + "\n"


def _facts(card: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """What it was trained on, without the tables."""
    view = card.get("view") or (card.get("settings") or {}).get("view") or {}
    store = data.get("store") or {}
    return {
        "cells": data.get("n_cells"),
        "genes": len(card.get("genes", ())),
        "proteins": len(card.get("proteins", ())) or None,
        "batches": len(card.get("batches", ())),
        "labels": len(card.get("labels", ())) or None,
        "view": f"generation {view['generation']}, SHA-256 {view['sha256']}" if view else None,
        "store": f"generation {store['generation']}, SHA-256 {store['sha256']}" if store else None,
        "reference before surgery": card["origin"] if card.get("surgery") else None,
    }


def _section(title: str, facts: Mapping[str, Any]) -> list[str]:
    """A heading and a list, without what is not known."""
    known = [
        f"* {escaped(name)}: {escaped(_shown(value))}" for name, value in facts.items() if value is not None
    ]
    return ["", f"## {title}", "", *known] if known else []


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value)) or "none"
    return str(value)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, those within others as ``outer.inner``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": item for inner, item in _flat(value).items()}
        else:
            found[name] = value
    return found


def _counts(title: str, key: Any, counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    rows = [[name, f"{n:,}"] for name, n in counts.items()]
    named = f" (`{escaped(key)}`)" if key else ""
    return ["", f"## {title}{named}", "", *_table(("name", "cells"), rows)]


def _added(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Files that surgery added."""
    rows = []
    for entry in entries:
        report = entry["report"]
        batches = [*report["learnt"], *report["projected"]]
        rows.append([entry["name"], f"{report['n_cells']:,}", ", ".join(map(str, batches))])
    return ["", "## Added by surgery", "", *_table(("file", "cells", "batches"), rows)]


def _table(names: Iterable[str], rows: list[list[str]]) -> list[str]:
    names = list(names)
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(map(escaped, row))} |" for row in rows[:MOST_ROWS]]
    return lines + (["", f"... and {len(rows) - MOST_ROWS:,} more"] if len(rows) > MOST_ROWS else [])
