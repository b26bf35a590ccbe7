"""What a report costs: CPU seconds, peak memory and size of the page, by queries and cells.

    python benchmarks/page.py -o benchmarks/results/page.jsonl

References and queries are simulated latents (10 dimensions, 20 labels) as `map` leaves them on disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from provenance import commit, machine

import streamx as sx
from streamx.store.latents import write_latents

parser = argparse.ArgumentParser()
parser.add_argument("-o", "--output", default="benchmarks/results/page.jsonl", type=Path)
parser.add_argument("--sizes", nargs="+", default=["20000x1x2000", "20000x100x2000", "1000000x100x10000"])
N_LABELS, N_LATENT = 20, 10


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
    obs = pd.DataFrame({"kind": label_n})
    obs.index = obs.index.astype(str)
    write_latents(folder / "model/reference.zarr", obs, {"X_scalex": latent_nk}, {"streamx": {"model": "m"}})
    (folder / "model/model.json").write_text(json.dumps({"model": "scalex", "id": "m"}))
    names = [f"query{at:03}" for at in range(n_queries)]
    for name in names:
        latent_nk, label_n = cells(rng, n_each)
        wrong = rng.random(n_each) < 0.1
        guess = label_n.cat.codes.to_numpy(copy=True)
        guess[wrong] = rng.integers(N_LABELS, size=wrong.sum())
        obs = pd.DataFrame({"kind": label_n, "kind_uncertainty": rng.random(n_each).astype(np.float32)})
        obs["kind_pred"] = pd.Categorical.from_codes(guess, label_n.cat.categories)
        obs.index = obs.index.astype(str)
        about = {"model": "m", "gene_overlap": 1.0}
        write_latents(folder / f"out/{name}.zarr", obs, {"X_scalex": latent_nk}, {"streamx": about})
    plan = {"reference": {"path": "../model"}, "settings": {"label_key": "kind"}}
    plan["queries"] = [{"name": name, "source": []} for name in names]  # type: ignore[assignment]
    (folder / "out/map.json").write_text(json.dumps(plan))


MEASURED = """
import json, resource, sys
import streamx as sx
from streamx.cli.main import peak_rss_bytes
found = sx.report(sys.argv[1], sys.argv[2], progress=False)
usage = resource.getrusage(resource.RUSAGE_SELF)
found |= {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1), "peak_rss_bytes": peak_rss_bytes()}
print(json.dumps(found))
"""


def main() -> None:
    args = parser.parse_args()
    for size in args.sizes:
        n_reference, n_queries, n_each = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_job(folder, n_reference, n_queries, n_each)
            command = [sys.executable, "-c", MEASURED, str(folder / "out"), str(folder / "page.html")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = {"benchmark": "page", "n_reference": n_reference, "n_queries": n_queries, "n_each": n_each}
        row |= json.loads(done.stdout) | {"commit": commit(), "machine": machine(), "streamx": sx.__version__}
        row.pop("page")
        print(json.dumps(row), flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("a") as rows:
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
