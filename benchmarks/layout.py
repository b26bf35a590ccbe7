"""UMAP from a sketch: does it show as much as one of all cells, and what does it cost?

    python benchmarks/layout.py --size 40000 --sketch 8000

Trustworthiness (sklearn, 15 neighbours; 1 = whoever is near in the picture is near in the latent) of a sample
of cells that no sketch held: of a UMAP fitted on all cells, of ours fitted on a sketch with the rest placed,
of the plain weighted mean of the same neighbours, and of umap-learn's own transform. Prints a JSON line each,
with the seconds that fitting and placing took.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent / "peers"))

from clock import clock, peak_rss_mb, since
from metrics import read, simulate
from provenance import commit, machine

RESULTS = Path(__file__).parent / "results" / "layout.jsonl"
SCORED, NEIGHBORS = 4000, 15


def ways(latent: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """What makes coordinates of all cells, by name; each returns them and the seconds of fitting."""
    from streamx.neighbors import nearest
    from streamx.plots import layout, umap

    def fitted() -> tuple[np.ndarray, dict[str, float]]:
        start = clock()
        return umap(latent[rows], seed=0), since(start)

    def all_cells() -> Any:
        start = clock()
        return umap(latent, sketch=len(latent), seed=0), since(start)

    def ours() -> Any:
        xy, spent = fitted()
        return layout.place(latent, latent[rows], xy), spent

    def plain_mean() -> Any:
        xy, spent = fitted()
        found = nearest(latent[rows], latent, layout.PLACED_BY)
        weights = np.exp(-found.distances_nm / found.distances_nm.mean(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("nm,nmd->nd", weights, xy[found.indices_nm]), spent

    def transform() -> Any:
        import umap as learn

        start = clock()
        model = learn.UMAP(n_neighbors=30, min_dist=0.1, random_state=0).fit(latent[rows])
        spent = since(start)
        return model.transform(latent), spent

    return {"all cells": all_cells, "ours": ours, "plain mean": plain_mean, "umap transform": transform}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=40_000)
    parser.add_argument("--dimensions", type=int, default=10)
    parser.add_argument("--sketch", type=int, default=8_000)
    parser.add_argument("--ways", nargs="+", help="some of: all cells, ours, plain mean, umap transform")
    parser.add_argument("--folder", type=Path, help="where data stay for the next time (default: removed)")
    parser.add_argument("--no-record", action="store_true", help="print lines only")
    args = parser.parse_args()
    from sklearn.manifold import trustworthiness

    from streamx.plots.layout import sketch_rows

    warnings.simplefilter("ignore")
    about = {"commit": commit(), "machine": machine(), "time": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / f"{args.size}x{args.dimensions}"
        if not (folder / "batch.npy").exists():
            simulate(folder, args.size, args.dimensions)
        latent, batch, label = read(folder)
        latent = np.asarray(latent)
        rows = sketch_rows(latent, args.sketch, label * (batch.max() + 1) + batch)
        made = ways(latent, rows)
        others = np.setdiff1d(np.arange(args.size), rows)
        scored = np.random.default_rng(1).choice(others, min(SCORED, len(others)), replace=False)
        for name in args.ways or made:
            start = clock()
            xy, fit = made[name]()
            line = {"way": name, "n_cells": args.size, "sketch": args.sketch, "fit": fit, "all": since(start)}
            score = trustworthiness(latent[scored], xy[scored], n_neighbors=NEIGHBORS)
            line |= {"trustworthiness": round(float(score), 4), "peak_rss_mb": peak_rss_mb(), **about}
            print(json.dumps(line), flush=True)
            if not args.no_record:
                with RESULTS.open("a") as stream:
                    stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
