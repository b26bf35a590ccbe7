"""The verbs that read latents, at the size of an atlas: transfer, metrics, plot.

    python benchmarks/atlas.py --sizes 1000000 5000000

A reference and one query of as many cells each (10 dimensions, 20 labels, 8 batches, simulated as for
metrics.py), on disk as `train` and `project` leave them. Each verb is a process of its own: CPU seconds, wall
time, peak of anonymous memory, and the numbers that it says; one JSON line each, in results/atlas.jsonl.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from metrics import read, simulate
from provenance import commit, machine
from surgery import run

from streamx.store.latents import write_latents

RESULTS = Path(__file__).parent / "results" / "atlas.jsonl"
N_LATENT = 10
LABELS = ("--label-key", "kind")
VERBS = {
    "transfer": ("{0}/model", "{0}/out", *LABELS, "--truth-key", "kind"),
    "metrics": ("{0}/model", "{0}/out", *LABELS),
    "plot": ("{0}/model", "{0}/out", "-o", "{0}/figures", *LABELS),
}


def prepare(folder: Path, n: int) -> None:
    """A model with the latents of `n` cells, and a query with as many others."""
    simulate(folder / "cells", 2 * n, N_LATENT)
    latent, batch, label = read(folder / "cells")
    names = [f"type {at:02}" for at in range(label.max() + 1)]
    donors = [f"donor {at}" for at in range(batch.max() + 1)]
    parts = {"model/reference.zarr": slice(0, n), "out/query.zarr": slice(n, 2 * n)}
    for path, part in parts.items():
        obs = pd.DataFrame(
            {
                "kind": pd.Categorical.from_codes(label[part], names),
                "batch": pd.Categorical.from_codes(batch[part], donors),
            }
        )
        obs.index = obs.index.astype(str)
        about = {"model": "m", "gene_overlap": 1.0, "batch_key": "batch"}
        write_latents(folder / path, obs, {"X_scalex": np.asarray(latent[part])}, {"streamx": about})
    (folder / "model/model.json").write_text(json.dumps({"model": "scalex", "id": "m", "batch_key": "batch"}))
    (folder / "model/history.csv").write_text("epoch,loss\n1,2.0\n2,1.0\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 5_000_000], metavar="N")
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    about = {"benchmark": "atlas", "commit": commit(), "machine": machine()}
    for n in args.sizes:
        with tempfile.TemporaryDirectory() as place:
            prepare(Path(place), n)
            for verb in args.verbs:
                said = run(verb, *(word.format(place) for word in VERBS[verb]))
                row = about | {"verb": verb, "n_reference": n, "n_query": n}
                row |= {name: value for name, value in said.items() if isinstance(value, int | float)}
                print(json.dumps(row), flush=True)
                with args.out.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
