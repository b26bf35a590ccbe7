"""Query files that lack genes: surgery that takes them as zero, and surgery with ``--mask-missing``.

    python benchmarks/missing_genes.py                 # two sets, two models, three seeds

For each set and seed scVI and scANVI (scArches' settings; epochs of ``sets.py``) are trained on the
reference, and each query is added by surgery three times: as it is, and without a share of the genes, drawn
anew for each seed, as zero and masked. Labels of the query are hidden. Scored (``scoring.py``): the vote's
accuracies; batch entropy of all cells; and how far a cell's latent lies from the one that it has with all
genes, as a share of the latents' spread (root mean squares over cells). The encoder sees a missing gene as
zero in both ways. One JSON line each, appended to results/missing_genes.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

from clock import clock, pin_threads, since  # noqa: E402

pin_threads()

import anndata as ad  # noqa: E402
import arches  # noqa: E402
import numpy as np  # noqa: E402
from ours_counts import DEVICE, trained  # noqa: E402
from provenance import commit, machine  # noqa: E402
from scoring import batch_entropy_mixing, label_scores, neighbours, vote  # noqa: E402
from sets import SETS, BenchSet, write_inputs  # noqa: E402

import streamx as sx  # noqa: E402

RESULTS = HERE / "results" / "missing_genes.jsonl"
WAYS = ("all genes", "zeros", "masked")
SCORES = ("accuracy", "balanced_accuracy", "ebm", "shift")


def reference(
    bench: BenchSet, kind: str, seed: int, paths: dict[str, Path], folder: Path
) -> tuple[Path, Any]:
    """A trained reference, made unless it is there, and its view."""
    assert bench.epochs is not None
    genes = arches.genes_of(paths["reference"], folder / "data")
    if not (folder / "counts" / "streamx.json").exists():
        store = sx.convert([str(paths["reference"])], folder / "store", batch_key="batch", threads=1)
        sx.preprocess(store, folder / "counts", profile="counts", genes=str(genes), threads=1)
    view = sx.open(folder / "counts")
    asked = argparse.Namespace(
        kind=kind,
        seed=seed,
        minibatch_size=arches.MINIBATCH,
        epochs=bench.epochs[0],
        labelled_epochs=bench.epochs[1],
    )
    return trained(asked, view, folder)[0], view


def latents_of(
    model: Path, kind: str, query: ad.AnnData, epochs: int, seed: int, out: Path, mask_missing: bool
) -> np.ndarray:
    """Latents of a query's cells after surgery, in their order."""
    settings: dict[str, Any] = {
        "max_epochs": epochs,
        "minibatch_size": arches.MINIBATCH,
        "seed": seed,
    } | DEVICE
    shutil.rmtree(out, ignore_errors=True)
    sx.surgery(model, {"query": query}, out, mask_missing=mask_missing, **settings)
    found = ad.read_zarr(out / "added" / "query.zarr")
    assert list(found.obs_names) == list(query.obs_names)
    return np.asarray(found.obsm[f"X_{kind}"])


def scores(
    z_nk: np.ndarray, whole_nk: np.ndarray, truth: np.ndarray, reference: ad.AnnData, key: str
) -> dict[str, float]:
    """Of a query's latents; ``whole_nk``: those with all genes."""
    z_rk = np.asarray(reference.obsm[key])
    predicted = vote(z_rk, reference.obs["cell_type"].to_numpy(dtype=str), z_nk)
    batches = np.append(reference.obs["batch"].to_numpy(dtype=str), np.full(len(z_nk), "the query"))
    _, index = neighbours(np.concatenate([z_rk, z_nk]), 100)
    spread = np.square(whole_nk - whole_nk.mean(0)).sum(1).mean()
    return label_scores(truth, predicted) | {
        "ebm": batch_entropy_mixing(index, batches),
        "shift": float(np.sqrt(np.square(z_nk - whole_nk).sum(1).mean() / spread)),
    }


def run(bench: BenchSet, kind: str, seed: int, share: float, work: Path) -> list[dict[str, Any]]:
    """A row for every query and way."""
    assert bench.epochs is not None
    folder = work / bench.name
    paths = write_inputs(bench, folder / "data")
    model, view = reference(bench, kind, seed, paths, folder)
    known, rows = ad.read_zarr(model / "reference.zarr"), []
    genes = np.array(view.var_names)
    rng = np.random.default_rng(seed)
    lost = set(rng.choice(genes, round(share * len(genes)), replace=False))
    for name in bench.queries:
        query = ad.read_h5ad(paths[name])
        truth = query.obs.pop("cell_type").to_numpy(dtype=str)
        without = query[:, [gene not in lost for gene in query.var_names]].copy()
        whole_nk = None
        for way in WAYS:
            start = clock()
            cells = query if way == "all genes" else without
            out = folder / "updated"
            z_nk = latents_of(model, kind, cells, bench.epochs[2], seed, out, mask_missing=way == "masked")
            whole_nk = z_nk if whole_nk is None else whole_nk
            row: dict[str, Any] = {"set": bench.name, "query": name, "kind": kind, "seed": seed, "way": way}
            row |= {"share_lost": share, "n_genes": len(genes), "surgery": since(start)}
            rows.append(row | {"scores": scores(z_nk, whole_nk, truth, known, f"X_{kind}")})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over queries and seeds."""
    lines = ["| set | model | way | " + " | ".join(SCORES) + " |", "|---|---|---|" + "---|" * len(SCORES)]
    for name, kind, way in dict.fromkeys((row["set"], row["kind"], row["way"]) for row in rows):
        own = [row["scores"] for row in rows if (row["set"], row["kind"], row["way"]) == (name, kind, way)]
        means = " | ".join(f"{np.mean([scored[score] for scored in own]):.3f}" for score in SCORES)
        lines.append(f"| {name} | {kind} | {way} | {means} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", default=["symphony_map", "kang_map"], choices=list(SETS))
    parser.add_argument("--kinds", nargs="+", default=["scvi", "scanvi"], choices=["scvi", "scanvi"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.2, help="of the genes, that the query lacks")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "missing_genes")
    args = parser.parse_args()
    about = {"benchmark": "missing_genes", "commit": commit(), "machine": machine()}
    found = []
    for name in args.sets:
        for seed in args.seeds:
            for kind in args.kinds:
                for row in run(SETS[name], kind, seed, args.share, args.work):
                    found.append(about | row)
                    print(json.dumps(found[-1]), flush=True)
                    with open(RESULTS, "a") as out:
                        out.write(json.dumps(found[-1]) + "\n")
    print("\n" + table(found))


if __name__ == "__main__":
    main()
