"""Proteins of cells that have only RNA: totalVI of streamx beside scvi-tools' and 20 nearest neighbours.

    python benchmarks/proteins.py                      # three seeds: an hour on two cores
    python benchmarks/proteins.py --seeds 0 --methods "streamx totalVI"

A fifth of PBMC10k (seed 0, stratified by label) becomes the batch PBMC10k_heldout, whose proteins nobody
sees. The reference is the rest of PBMC10k, and PBMC5k, whose proteins are missing. The held-out cells are
mapped by surgery and decoded as if they were of PBMC10k, 25 draws each: foreground mean x its probability, as
scvi-tools' ``get_normalized_expression`` has it. Score: Pearson correlation per protein of ln(1 + value) with
ln(1 + count). Baseline: mean ln(1 + count) of the 20 nearest reference cells of PBMC10k by 30 principal
components of RNA (``peers/pca.py``). Every run is printed as one JSON line and appended to
``results/proteins.jsonl``; rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
from clock import clock, pin_threads, since  # noqa: E402
from provenance import commit, machine  # noqa: E402
from quality import source_crc  # noqa: E402
from report import TOLERANCE  # noqa: E402
from sets import checksum, data_dir  # noqa: E402

RESULTS = HERE / "results" / "proteins.jsonl"
FILE = "pbmc_cite_10k_5k.h5ad"
KEY = "protein_expression"
MEASURED, HELD_OUT = "PBMC10k", "PBMC10k_heldout"
EPOCHS, QUERY_EPOCHS, MINIBATCH, DRAWS = 80, 50, 256, 25
METHODS = ("20-NN", "totalVI", "streamx totalVI")
NEIGHBOURS = 20
RELEASE = "1.4.2"


def held_out(batches: np.ndarray, labels: np.ndarray, share: float = 0.2, seed: int = 0) -> np.ndarray:
    """Mask of a share of the cells of PBMC10k, of every label alike."""
    rng, mask = np.random.default_rng(seed), np.zeros(len(batches), bool)
    for label in np.unique(labels[batches == MEASURED]):
        cells = np.flatnonzero((batches == MEASURED) & (labels == label))
        mask[rng.permutation(cells)[: round(share * len(cells))]] = True
    return mask


def write_inputs(folder: Path) -> dict[str, Path]:
    """``reference.h5ad``, the query without its proteins, and ``truth.npy`` (n_heldout, n_proteins)."""
    paths = {name: folder / f"{name}.h5ad" for name in ("reference", HELD_OUT)}
    paths["truth"] = folder / "truth.npy"
    if all(path.exists() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    whole = ad.read_h5ad(data_dir() / FILE)
    batches = whole.obs["batch"].to_numpy(dtype=str)
    mask = held_out(batches, whole.obs["cell_type"].to_numpy(dtype=str))
    whole.obs = whole.obs[["cell_type"]].assign(batch=np.where(mask, HELD_OUT, batches))
    whole.obsm = {KEY: whole.obsm[KEY]}
    whole.uns = {}
    query = whole[mask].copy()
    np.save(paths["truth"], np.asarray(query.obsm[KEY], dtype=np.float32))
    del query.obsm[KEY]
    query.write_h5ad(paths[HELD_OUT])
    whole[~mask].copy().write_h5ad(paths["reference"])
    return paths


def neighbours(paths: dict[str, Path]) -> np.ndarray:
    """Mean ln(1 + count) of the nearest cells whose proteins are known, (n_heldout, n_proteins)."""
    import pca
    from sklearn.neighbors import NearestNeighbors

    latent = pca.embed({name: paths[name] for name in ("reference", HELD_OUT)})
    reference = ad.read_h5ad(paths["reference"])
    known = (reference.obs["batch"] == MEASURED).to_numpy()
    search = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(latent["reference"][known])
    nearest = search.kneighbors(latent[HELD_OUT], return_distance=False)
    return np.log1p(np.asarray(reference.obsm[KEY])[known])[nearest].mean(axis=1)


def score(log_np: np.ndarray, truth_np: np.ndarray) -> dict[str, Any]:
    """Pearson correlation with ln(1 + count): per protein, and their mean."""
    columns = zip(log_np.T.astype(np.float64), np.log1p(truth_np).T.astype(np.float64), strict=True)
    found = [float(np.corrcoef(predicted, true)[0, 1]) for predicted, true in columns]
    return {"pearson": float(np.mean(found)), "per_protein": [round(value, 4) for value in found]}


def run_apart(method: str, seed: int, paths: dict[str, Path], out: Path, args: argparse.Namespace) -> Any:
    """One of the two models in a process of its own: its ``run.json``; kept if it is there."""
    done = out / "run.json"
    if not done.exists():
        ours = method.startswith("streamx")
        script = HERE / "ours_proteins.py" if ours else HERE / "peers" / "totalvi_peer.py"
        command = [sys.executable if ours else args.peer_python, "-W", "ignore", str(script)]
        command += [f"--reference={paths['reference']}", f"--query={paths[HELD_OUT]}", f"--out={out}"]
        command += [f"--seed={seed}", f"--epochs={EPOCHS}", f"--query-epochs={QUERY_EPOCHS}"]
        command += [f"--minibatch-size={MINIBATCH}", f"--draws={DRAWS}", f"--batch={MEASURED}"]
        out.mkdir(parents=True, exist_ok=True)
        log = out.with_name(f"{out.name}.log")
        with open(log, "w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            raise SystemExit(f"{method} ended with code {code}:\n{log.read_text()[-2000:]}")
    return json.loads(done.read_text())


def run(method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: its key, provenance, cost and scores."""
    key: dict[str, Any] = {"set": "pbmc_cite", "method": method, "data_crc": checksum([data_dir() / FILE])}
    if method != "20-NN":
        key |= {"seed": seed, "epochs": [EPOCHS, QUERY_EPOCHS], "minibatch_size": MINIBATCH, "draws": DRAWS}
        key |= {"source_crc": source_crc()} if method.startswith("streamx") else {"scvi-tools": RELEASE}
    rows = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    for row in map(json.loads, reversed(rows)):
        if row["key"] == key:
            return row | {"cached": True}
    paths = write_inputs(args.work / "data")
    truth_np = np.load(paths["truth"])
    ran: dict[str, Any] = {}
    if method == "20-NN":
        start = clock()
        log_np = neighbours(paths)
        ran["times"] = {"reference": since(start)}
    else:
        out = args.work / f"{method}-s{seed}-{key.get('source_crc', RELEASE)}"
        ran = run_apart(method, seed, paths, out, args)
        log_np = np.log1p(np.load(out / "proteins.npy"))
    found = {"commit": commit(), "machine": machine(), **ran, "scores": score(log_np, truth_np)}
    return {"key": key} | found | {"cached": False}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--peer-python", default=sys.executable, help="python that has scvi-tools 1.4.2")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "proteins")
    args = parser.parse_args()
    pin_threads()
    means: dict[str, list[float]] = {}
    for method in args.methods:
        for seed in args.seeds if method != "20-NN" else [0]:
            row = run(method, seed, args)
            if not row["cached"]:
                RESULTS.parent.mkdir(exist_ok=True)
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            means.setdefault(method, []).append(row["scores"]["pearson"])
    for method, values in means.items():
        print(f"{method}: {np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
    if not {"totalVI", "streamx totalVI"} <= set(means):
        return 0
    ours, theirs = np.mean(means["streamx totalVI"]), np.mean(means["totalVI"])
    passed = ours >= theirs - TOLERANCE
    print(f"{'PASS' if passed else 'FAIL'} streamx {ours:.3f}, scvi-tools {theirs:.3f}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
