"""How ``project`` normalises a query: whole queries and queries of one cell type, every norm and scale.

    python benchmarks/norm.py --seeds 0 1 2

A query's batch norm statistics and its largest value per gene can come from the reference or from the
query. What comes from the query removes a batch effect, and what sets its composition apart with it. So
every way is scored twice: on whole queries, and on the cells of each type alone, mapped as if they were the
whole query. For every way the reference's latents are made in the same way. Models are those of
``quality.py`` (same folder). Prints one JSON line per model and way, appends it to ``results/norm.jsonl``,
and ends with a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

from clock import pin_threads  # noqa: E402

pin_threads()

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
from quality import ITERATIONS, commit, machine, models_of, run_ours, source_crc  # noqa: E402
from scoring import batch_entropy_mixing, label_scores, labelled, neighbours, vote  # noqa: E402
from sets import CELLBENCH, SETS, BenchSet, write_inputs  # noqa: E402

import streamx as sx  # noqa: E402
from streamx.train.latent import latents  # noqa: E402
from streamx.train.model import load_model  # noqa: E402

RESULTS = HERE / "results" / "norm.jsonl"
CASES = {"pbmc": SETS["pbmc_map"], "symphony": SETS["symphony_map"], "cellbench": CELLBENCH}
# norm, scale, and the least number of cells for statistics of their own (None: streamx's default)
WAYS = (
    ("matched", "reference", None),
    ("matched", "query", None),
    ("running", "reference", None),
    ("running", "query", None),
    ("domain", "reference", 1),
    ("domain", "query", 1),
    ("minibatch", "query", 1),
)
FEWEST = 20  # cells of a type that are mapped alone
SCORES = ("accuracy", "balanced_accuracy", "ebm")


def train(bench: BenchSet, seed: int, args: argparse.Namespace) -> tuple[Path, Path, dict[str, Path]]:
    """Folders of the view and the model, made unless they are there, and the files they came from."""
    paths = write_inputs(bench, args.work / "data" / bench.name)
    key = {"method": "streamx", "set": bench.name, "seed": seed, "max_iteration": args.max_iteration}
    out = args.work / "streamx" / f"{bench.name}-s{seed}-i{args.max_iteration}-{source_crc()}"
    run_ours(bench, paths, key, out, args)
    folder = models_of(bench, args)
    return folder / "view", folder / f"model-{seed}-i{args.max_iteration}", paths


def mapped(model: Any, cells: ad.AnnData, norm: str, scale: str, least: int | None) -> np.ndarray:
    """Latents of cells as a query of their own."""
    settings: dict[str, Any] = {"norm": norm, "scale": scale, "device": "cpu", "threads": 1}
    if least is not None:
        settings["min_query_cells"] = least
    with tempfile.TemporaryDirectory() as folder:
        sx.project(model, {"query": cells}, folder, progress=False, **settings)
        return np.asarray(ad.read_zarr(Path(folder) / "query.zarr").obsm["X_scalex"])


def evaluate(
    view: Any, model: Any, paths: dict[str, Path], bench: BenchSet, norm: str, scale: str, least: int | None
) -> dict[str, Any]:
    """Scores per query: whole, and per type (cells, share right in the whole, share right alone)."""
    reference = latents(model.module, view, norm, seed=model.card["settings"]["train"]["seed"])
    batches = view.obs_column("batch").to_numpy(dtype=str)
    labels = view.obs_column("cell_type").to_numpy(dtype=str)
    found: dict[str, Any] = {}
    for name in bench.queries:
        cells = ad.read_h5ad(paths[name])
        truth = cells.obs["cell_type"].to_numpy(dtype=str)
        latent = mapped(model, cells, norm, scale, least)
        predicted = vote(reference, labels, latent)
        _, index = neighbours(np.concatenate([reference, latent]), 100)
        mixing = batch_entropy_mixing(index, np.append(batches, np.full(len(cells), "query: " + name)))
        types = {}
        for kind in np.unique(truth[labelled(truth)]):
            own = truth == kind
            if own.sum() >= FEWEST:
                alone = vote(reference, labels, mapped(model, cells[own].copy(), norm, scale, least))
                types[str(kind)] = (
                    int(own.sum()),
                    float((predicted[own] == kind).mean()),
                    float((alone == kind).mean()),
                )
        found[name] = label_scores(truth, predicted) | {"ebm": mixing, "types": types}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds; the type that loses most when it is mapped alone."""
    lines = [
        "| query | norm | scale | seeds | acc | bal acc | EBM | largest loss of a type alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for query in dict.fromkeys(name for row in rows for name in row["queries"]):
        for way in dict.fromkeys((row["norm"], row["scale"]) for row in rows):
            own = [
                row["queries"][query]
                for row in rows
                if (row["norm"], row["scale"]) == way and query in row["queries"]
            ]
            kinds = own[0]["types"]
            change = {
                kind: (
                    np.mean([run["types"][kind][1] for run in own]),
                    np.mean([run["types"][kind][2] for run in own]),
                )
                for kind in kinds
            }
            worst = min(change, key=lambda kind: change[kind][1] - change[kind][0])
            means = [np.mean([run[score] for run in own]) for score in SCORES]
            lines.append(
                f"| {query} | {way[0]} | {way[1]} | {len(own)} | "
                + " | ".join(f"{mean:.3f}" for mean in means)
                + f" | {change[worst][1] - change[worst][0]:+.3f}: {kinds[worst][0]} {worst} "
                f"{change[worst][0]:.2f} -> {change[worst][1]:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-iteration", type=int, default=ITERATIONS)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "quality")
    parser.add_argument("--models", type=Path, help="use streamx's views and models of this folder")
    args = parser.parse_args()
    rows = []
    for case in args.cases:
        for seed in args.seeds:
            at, folder, paths = train(CASES[case], seed, args)
            view, model = sx.open(at), load_model(folder)
            for norm, scale, least in WAYS:
                row = {
                    "case": case,
                    "seed": seed,
                    "norm": norm,
                    "scale": scale,
                    "min_query_cells": least,
                    "max_iteration": args.max_iteration,
                    "source_crc": source_crc(),
                    "commit": commit(),
                    "machine": machine(),
                    "queries": evaluate(view, model, paths, CASES[case], norm, scale, least),
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(row) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
