"""RNA and ATAC of a mouse cortex as two batches of one feature space: ours beside SCALEX 1.0.4, PCA, CCA.

    python benchmarks/cross_modality.py --peer-python PYTHON_WITH_SCALEX

10,309 cells of which both were measured (SNARE-seq, Chen 2019): the pairs, which no method sees, are the
truth. ATAC becomes gene activity by `sx.gene_activity`; the same matrix goes to every method, with SCALEX's
recipe for two modalities (no cell and no gene filtered). Scored by FOSCTTM (0 perfect, chance .5), labels
transferred both ways (15 nearest, uniform vote), and mixing. Every run is a process of its own with one
thread, and one JSON line in ``results/cross_modality.jsonl``; runs whose latents are in the work folder are
scored again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
from provenance import commit, machine  # noqa: E402
from quality import run_apart, source_crc  # noqa: E402
from scipy.sparse.linalg import LinearOperator, svds  # noqa: E402
from scoring import label_scores, mixing_scores, vote  # noqa: E402
from sets import data_dir  # noqa: E402

import streamx as sx  # noqa: E402
from streamx.metrics.foscttm import foscttm  # noqa: E402
from streamx.transfer import directions  # noqa: E402

RESULTS = HERE / "results" / "cross_modality.jsonl"
METHODS = ("PCA", "CCA", "SCALEX", "streamx")
NO_FILTER = ("--min-features=0", "--min-cells=0")
# of streamx: the one that fits batches of the same cells, trained with; and what it does unasked
NORM, DEFAULT = "domain", "matched"
N_COMPONENTS = 30


def prepare(work: Path) -> Path:
    """One h5ad with RNA and gene activity as the batches RNA and ATAC, unless it is there."""
    path, data = work / "both.h5ad", data_dir()
    if path.exists():
        return path
    work.mkdir(parents=True, exist_ok=True)
    sx.convert(data / "mop_snare_atac.h5ad", work / "peaks", batch_key="_streamx_file", threads=1)
    pairs = data / "mop_snare_gene_peaks.tsv.gz"
    activity = sx.gene_activity(work / "peaks", work / "genes", peak_genes=str(pairs), threads=1).to_anndata()
    activity.obs_names = activity.obs["_streamx_name"].astype(str)
    rna = ad.read_h5ad(data / "mop_snare_rna.h5ad")
    activity = activity[rna.obs_names].copy()
    for adata, name in ((rna, "RNA"), (activity, "ATAC")):
        adata.obs = adata.obs[["cell_type"]].assign(batch=name)
        adata.obs_names = f"{name}_" + adata.obs_names
    both = ad.concat([rna, activity], join="inner")
    both.obs["batch"] = both.obs["batch"].astype("category")
    both.write_h5ad(path)
    return path


def logged(adata: ad.AnnData) -> np.ndarray:
    """log1p of counts per 10,000, float32 (n_cells, n_genes)."""
    x_ng = adata.X.toarray()
    return np.log1p(x_ng / np.maximum(x_ng.sum(axis=1, keepdims=True), 1) * 1e4).astype(np.float32)


def standard(x_ng: np.ndarray) -> np.ndarray:
    """Genes of mean 0 and variance 1."""
    return (x_ng - x_ng.mean(axis=0)) / np.maximum(x_ng.std(axis=0), 1e-6)


def pca(x_ng: np.ndarray, is_rna: np.ndarray) -> np.ndarray:
    """Of all cells, genes scaled within each modality: what costs nothing."""
    x_ng = x_ng.copy()
    for mine in (is_rna, ~is_rna):
        x_ng[mine] = standard(x_ng[mine])
    left, size, _ = svds(x_ng, k=N_COMPONENTS, random_state=0)
    return left * size


def cca(x_ng: np.ndarray, is_rna: np.ndarray) -> np.ndarray:
    """Diagonal CCA (Butler 2018): singular vectors of the product of both scaled matrices, length 1."""
    a_ng, b_ng = standard(x_ng[is_rna]), standard(x_ng[~is_rna])

    def product(v: np.ndarray) -> np.ndarray:
        return a_ng @ (b_ng.T @ v)

    def transposed(v: np.ndarray) -> np.ndarray:
        return b_ng @ (a_ng.T @ v)

    shape = (len(a_ng), len(b_ng))
    operator = LinearOperator(shape, matvec=product, rmatvec=transposed, dtype=np.float32)
    left, _, right = svds(operator, k=N_COMPONENTS, random_state=0)
    latent = np.empty((len(x_ng), N_COMPONENTS), np.float32)
    latent[is_rna], latent[~is_rna] = left, right.T
    return latent / np.maximum(np.linalg.norm(latent, axis=1, keepdims=True), 1e-12)


def run(
    method: str, seed: int, path: Path, args: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], ad.AnnData]]:
    """What a run says of itself, and its latents in obsm, cells in the file's order. Ours: by both norms."""
    both = ad.read_h5ad(path)
    if method in ("PCA", "CCA"):
        embed = {"PCA": pca, "CCA": cca}[method]
        both.obsm["latent"] = embed(logged(both), (both.obs["batch"] == "RNA").to_numpy())
        yield {"key": {"method": method}}, both
        return
    steps = args.max_iteration
    key: dict[str, Any] = {"set": "mop_snare", "method": method, "seed": seed, "max_iteration": steps}
    out = args.work / method / f"s{seed}-i{steps}"
    script = [sys.executable, "-W", "ignore", str(HERE / "ours.py")]
    if method == "streamx":
        key["source_crc"] = source_crc()
        models = args.work / "models" / key["source_crc"]
        out = out.with_name(f"{out.name}-{key['source_crc']}")
        script += ["--models", str(models), f"--norm={NORM}", "--also", DEFAULT]
        if args.n_latent != 10:
            key["n_latent"] = args.n_latent
            script += [f"--n-latent={args.n_latent}"]
            out = out.with_name(f"{out.name}-k{args.n_latent}")
    else:
        script = [args.peer_python, "-W", "ignore", str(HERE / "peers" / "scalex_peer.py")]
    ran = run_apart([*script, f"--max-iteration={steps}", *NO_FILTER], {"reference": path}, key, out)
    files: dict[str, dict[str, str]] = {"reference": {}}
    if method == "streamx":
        files = {"reference": {"norm": NORM}, DEFAULT: {"norm": DEFAULT}}
    for name, norm in files.items():
        found = np.load(out / f"{name}.npz")
        place = {cell: i for i, cell in enumerate(found["cell"].tolist())}
        both.obsm["latent"] = found["latent"][[place[cell] for cell in both.obs_names]]
        yield {"key": key | norm, **ran}, both


def scores(both: ad.AnnData) -> dict[str, Any]:
    """Pairs, labels both ways, mixing; pairs and labels also of :func:`streamx.transfer.directions`."""
    is_rna = (both.obs["batch"] == "RNA").to_numpy()
    latent, label = np.asarray(both.obsm["latent"]), both.obs["cell_type"].to_numpy(str)
    rna, atac = latent[is_rna], latent[~is_rna]
    assert (both.obs_names[is_rna].str[4:] == both.obs_names[~is_rna].str[5:]).all()
    assert (label[is_rna] == label[~is_rna]).all()
    turned = directions(latent, both.obs["batch"])
    return {
        **pair_scores(rna, atac, label[is_rna]),
        "mixing": mixing_scores(latent, both.obs["batch"].to_numpy(str), label),
        "directions": pair_scores(turned[is_rna], turned[~is_rna], label[is_rna]),
    }


def pair_scores(rna: np.ndarray, atac: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """How near a cell's two halves are, and labels both ways; row by row the same cells."""
    return {
        "foscttm": foscttm(rna, atac),
        "rna_to_atac": label_scores(label, vote(rna, label, atac)),
        "atac_to_rna": label_scores(label, vote(atac, label, rna)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-iteration", type=int, default=30_000, help="of SCALEX and of streamx")
    parser.add_argument("--n-latent", type=int, default=10, help="of streamx")
    parser.add_argument("--peer-python", default=sys.executable, help="python that has scalex 1.0.4")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "cross_modality")
    args = parser.parse_args()
    path = prepare(args.work)
    for method in args.methods:
        for seed in args.seeds if method in ("SCALEX", "streamx") else [0]:
            for ran, both in run(method, seed, path, args):
                row = {**ran, "commit": commit(), "machine": machine(), "scores": scores(both)}
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
