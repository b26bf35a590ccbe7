"""False discoveries and power of differential expression, where the changes are known.

    python benchmarks/de.py --seeds 0 1 2 3 4 --peer-python PEER/bin/python

Cells of two groups and two batches, negative binomial counts of 200 genes (means 0.5 to 15); 20 genes change,
by 2 or 4 times, up or down at random or all up; or none does. scVI is trained on them by ours; every way
below then calls genes at a target of .05 on the same weights, and so does scvi-tools 1.4.2
(``peers/scvi_de.py``), with scanpy's Wilcoxon test beside them, which needs no model.

What is true depends on the question. A model's scales are shares of a cell's total: where some genes rise,
the shares of all others fall. "false" counts calls of genes whose true share changes by less than delta; ways
that are relative to the median gene are judged by true changes relative to the median gene. "unchanged"
counts calls of genes that the simulation did not touch, whatever their share. "power" is the share of the 20
that is called. Means over seeds; one JSON line per case and seed, also appended to ``results/de.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

from clock import pin_threads  # noqa: E402

pin_threads()

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from provenance import commit, machine  # noqa: E402

RESULTS = HERE / "results" / "de.jsonl"
N_GENES, N_CHANGED = 200, 20
TARGET = 0.05
MEANS: dict[str, Any] = {"relative_to": "median", "cells_per_draw": 100}
OURS: dict[str, dict[str, Any]] = {
    "as documented": {"delta": 0.25},
    "delta .5": {"delta": 0.5},
    "median gene": {"delta": 0.25, "relative_to": "median"},
    "median gene, delta .5": {"delta": 0.5, "relative_to": "median"},
    "means of 100 cells, median gene": {"delta": 0.25, **MEANS},
    "means of 100 cells, median gene, delta .5": {"delta": 0.5, **MEANS},
}
PEERS: dict[str, dict[str, Any]] = {
    "scvi-tools": {"delta": 0.25},
    "scvi-tools, delta .5": {"delta": 0.5},
    "scanpy, Wilcoxon": {},
}


@dataclass(frozen=True)
class Case:
    """Size of the changes (log2), share of them that are rises, and number of cells."""

    change: float
    up: float
    n_cells: int = 1000


CASES = (Case(2, 0.5), Case(2, 1), Case(1, 0.5), Case(1, 1, 4000), Case(0, 1))


def simulated(case: Case, seed: int) -> tuple[ad.AnnData, np.ndarray]:
    """Cells, and the true changes of shares, log2, (n_genes,); ``var["change"]``: what was put in."""
    rng = np.random.default_rng(seed)
    mean_g = rng.gamma(2, 2, N_GENES) + 0.5
    group_n, batch_n = rng.integers(2, size=(2, case.n_cells))
    changed_g = rng.permutation(N_GENES) < N_CHANGED
    change_g = np.where(changed_g, np.where(rng.random(N_GENES) < case.up, case.change, -case.change), 0.0)
    mean_bg = mean_g * rng.lognormal(0, 0.3, (2, N_GENES))
    depth_n = rng.lognormal(0, 0.2, case.n_cells)
    mu_ng = mean_bg[batch_n] * 2.0 ** (change_g * group_n[:, None]) * depth_n[:, None]
    x_ng = rng.poisson(mu_ng * rng.gamma(5, 1 / 5, mu_ng.shape)).astype(np.float32)
    obs = pd.DataFrame({"study": np.array(["a", "b"])[batch_n], "group": np.array(["x", "y"])[group_n]})
    obs.index = [f"cell{n}" for n in range(case.n_cells)]
    var = pd.DataFrame({"change": change_g}, index=[f"g{g}" for g in range(N_GENES)])
    total_b = [(mean_bg * 2.0**c_g).sum(1) for c_g in (0 * change_g, change_g)]
    return ad.AnnData(x_ng, obs, var), change_g - np.log2(total_b[1] / total_b[0]).mean()


def judged(called_g: np.ndarray, change_g: np.ndarray, share_g: np.ndarray, delta: float) -> dict[str, Any]:
    """Numbers of calls, of false and of unchanged ones among them, and the power."""
    false_g, untouched_g = np.abs(share_g) < delta, change_g == 0
    n = {"called": called_g.sum(), "false": (called_g & false_g).sum()}
    n["unchanged"] = (called_g & untouched_g).sum()
    power = None if untouched_g.all() else float(called_g[~untouched_g].mean())
    return {name: int(count) for name, count in n.items()} | {"power": power}


def run(case: Case, seed: int, peer_python: str | None) -> dict[str, Any]:
    """Every way on the cells of one seed."""
    import streamx as sx

    adata, share_g = simulated(case, seed)
    change_g = adata.var["change"].to_numpy()
    model = sx.SCVI(adata, batch_key="study", gene_likelihood="nb", n_hidden=64, n_latent=5)
    # as many steps for more cells
    epochs = round(150 * 1000 / case.n_cells)
    options: dict[str, Any] = {"progress": False, "use_early_stopping": False, "seed": seed}
    model.train(epochs, lr=2e-3, n_epochs_kl_warmup=epochs // 3, **options)
    groups = {"groupby": "group", "group1": "y", "group2": "x", "fdr_target": TARGET}
    ways = {}
    for name, settings in OURS.items():
        table = model.differential_expression(**groups, **settings, batch_correction=True)
        called_g = table.loc[adata.var_names, f"is_de_fdr_{TARGET}"].to_numpy()
        relative = "relative_to" in settings
        truth_g = share_g - np.median(share_g) if relative else share_g
        ways[name] = judged(called_g, change_g, truth_g, settings["delta"])
    if peer_python is not None:
        for name, called_g in peers_calls(model, adata, peer_python).items():
            ways[name] = judged(called_g, change_g, share_g, PEERS[name].get("delta", 0.0))
    return {"case": asdict(case), "seed": seed, "shift": round(float(np.median(share_g)), 3), "ways": ways}


def peers_calls(model: Any, adata: ad.AnnData, python: str) -> dict[str, np.ndarray]:
    """What scvi-tools calls with the same weights, and scanpy without any."""
    import streamx as sx

    with tempfile.TemporaryDirectory() as folder:
        sx.export(model, Path(folder) / "model")
        adata.write_h5ad(Path(folder) / "cells.h5ad")
        command = [python, "-W", "ignore", str(HERE / "peers" / "scvi_de.py"), folder, json.dumps(PEERS)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the peers ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        return {name: np.array(calls) for name, calls in json.loads(done.stdout.splitlines()[-1]).items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, a block per case."""
    lines = []
    for case in dict.fromkeys(json.dumps(row["case"]) for row in rows):
        of_case = [row for row in rows if json.dumps(row["case"]) == case]
        lines += ["", case, "| way | seeds | called | false share | most | unchanged share | power |"]
        for name in (*OURS, *PEERS):
            ways = [row["ways"][name] for row in of_case if name in row["ways"]]
            if not ways:
                continue
            share = {c: [w[c] / max(w["called"], 1) for w in ways] for c in ("false", "unchanged")}
            numbers = [np.mean(share["false"]), max(share["false"]), np.mean(share["unchanged"])]
            numbers += [np.mean([np.nan if w["power"] is None else w["power"] for w in ways])]
            called = np.mean([w["called"] for w in ways])
            lines.append(
                f"| {name} | {len(ways)} | {called:.1f} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--peer-python", help="python with scvi-tools 1.4.2 and scanpy (default: no peer)")
    args = parser.parse_args()
    about = {"commit": commit(), "machine": machine()}
    rows = []
    for case in CASES:
        for seed in args.seeds:
            rows.append({**run(case, seed, args.peer_python), **about})
            print(json.dumps(rows[-1]), flush=True)
            with open(RESULTS, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
