"""What `report` and `plot` cost: CPU seconds, anonymous peak and what they write, by queries and cells.

    python benchmarks/page.py --sizes 20000x100x2000 1000000x100x10000

References (8 batches) and queries are simulated latents (10 dimensions, 20 labels) as `map` leaves them on
disk, without metrics of each query. A size is cells of the reference x queries x cells of each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from provenance import commit, machine
from surgery import run

import streamx as sx
from streamx.store.latents import write_latents

N_LABELS, N_LATENT, N_BATCHES = 20, 10, 8
WAYS = {
    "report": ["report", "{out}", "-o", "{place}/page.html"],
    "report without metrics": ["report", "{out}", "-o", "{place}/page.html", "--no-metrics"],
    "plot": ["plot", "{model}", "{out}", "-o", "{place}/figures", "--label-key", "kind"],
    "plot, UMAP fitted on 10,000": [
        *("plot", "{model}", "{out}", "-o", "{place}/figures", "--label-key", "kind"),
        *("--max-cells", "10000"),
    ],
}


def cells(rng: np.random.Generator, n: int) -> tuple[np.ndarray, pd.Series]:
    """Latents around one place per label, and the labels."""
    label_n = rng.integers(N_LABELS, size=n)
    place = np.random.default_rng(0).normal(size=(N_LABELS, N_LATENT)) * 3
    names = pd.Index([f"type {at:02}" for at in range(N_LABELS)])
    latent_nk = (place[label_n] + rng.normal(size=(n, N_LATENT))).astype(np.float32)
    return latent_nk, pd.Series(pd.Categorical.from_codes(label_n, names))


def write_job(folder: Path, n_reference: int, n_queries: int, n_each: int) -> None:
    rng = np.random.default_rng(1)
    latent_nk, label_n = cells(rng, n_reference)
    batches = pd.Index([f"study {at}" for at in range(N_BATCHES)])
    batch_n = pd.Categorical.from_codes(rng.integers(N_BATCHES, size=n_reference), batches)
    obs = pd.DataFrame({"kind": label_n, "study": batch_n})
    obs.index = obs.index.astype(str)
    about = {"streamx": {"model": "m", "batch_key": "study"}}
    write_latents(folder / "model/reference.zarr", obs, {"X_scalex": latent_nk}, about)
    (folder / "model/model.json").write_text(json.dumps({"model": "scalex", "id": "m"}))
    (folder / "model/history.csv").write_text("epoch,loss\n1,2.0\n2,1.0\n")
    names = [f"query{at:03}" for at in range(n_queries)]
    for part in ("records", "timings"):
        (folder / "out" / part).mkdir(parents=True)
    for name in names:
        latent_nk, label_n = cells(rng, n_each)
        wrong = rng.random(n_each) < 0.1
        guess = label_n.cat.codes.to_numpy(copy=True)
        guess[wrong] = rng.integers(N_LABELS, size=wrong.sum())
        obs = pd.DataFrame({"kind": label_n, "kind_uncertainty": rng.random(n_each).astype(np.float32)})
        obs["kind_pred"] = pd.Categorical.from_codes(guess, label_n.cat.categories)
        obs.index = obs.index.astype(str)
        about = {"streamx": {"model": "m", "gene_overlap": 1.0}}
        write_latents(folder / f"out/{name}.zarr", obs, {"X_scalex": latent_nk}, about)
        (folder / f"out/records/{name}.json").write_text(json.dumps({"name": name, "error": None}))
        (folder / f"out/timings/{name}.json").write_text(json.dumps({"seconds": 1.0}))
    plan: dict[str, Any] = {"reference": {"path": "../model"}, "settings": {"label_key": "kind"}}
    plan["queries"] = [{"name": name, "source": []} for name in names]
    (folder / "out/map.json").write_text(json.dumps(plan))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", default="benchmarks/results/page.jsonl", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["20000x1x2000", "20000x100x2000", "1000000x100x10000"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["report", "report without metrics"])
    args = parser.parse_args()
    for size in args.sizes:
        n_reference, n_queries, n_each = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_job(folder, n_reference, n_queries, n_each)
            for way in args.ways:
                places = {"model": folder / "model", "out": folder / "out", "place": folder / way}
                (folder / way).mkdir()
                row: dict[str, Any] = {"benchmark": "page", "way": way, "n_reference": n_reference}
                row |= {"n_queries": n_queries, "n_each": n_each}
                found = run(*(word.format(**places) for word in WAYS[way]))
                row |= {name: found[name] for name in ("cpu_s", "wall_s", "anonymous_peak_bytes")}
                row["bytes"] = sum(p.stat().st_size for p in (folder / way).rglob("*.*") if p.is_file())
                row |= {"commit": commit(), "machine": machine(), "streamx": sx.__version__}
                print(json.dumps(row), flush=True)
                args.output.parent.mkdir(parents=True, exist_ok=True)
                with args.output.open("a") as rows:
                    rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
