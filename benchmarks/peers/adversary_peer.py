"""What scvi-tools' classifier of batches does in totalVI's surgery, on a part of PBMC10k and PBMC5k.

    python benchmarks/peers/adversary_peer.py --seeds 0 1 2

``train(adversarial_classifier=None)`` turns it on where a batch of the query lacks proteins; here it is on or
off. The reference: 2,000 cells of PBMC10k with proteins, 1,000 of PBMC5k without. Queries of 800 further
cells of PBMC10k: "none", one batch without proteins; "half", two batches, one of them with. Scored: mean
Pearson correlation of proteins decoded as PBMC10k (of cells without proteins, as ``proteins.py``), batch
entropy of these cells with PBMC10k's reference, and of the query's batches with each other. One JSON line
each, appended to results/adversary.jsonl. Needs scvi-tools 1.4.2.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from clock import pin_threads  # noqa: E402

pin_threads()

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
import scvi  # noqa: E402
import torch  # noqa: E402
from provenance import machine  # noqa: E402
from scoring import batch_entropy_mixing, neighbours  # noqa: E402
from sets import data_dir  # noqa: E402

RESULTS = HERE.parent / "results" / "adversary.jsonl"
KEY, MEASURED = "protein_expression", "PBMC10k"
N_MEASURED, N_OTHER, N_QUERY, N_GENES = 2000, 1000, 800, 1000
EPOCHS, QUERY_EPOCHS = 100, 100
FIT = {"batch_size": 128, "enable_progress_bar": False, "accelerator": "cpu"}


def parts(seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Reference and query, on the genes with the largest variance of ln(1 + count)."""
    whole = ad.read_h5ad(data_dir() / "pbmc_cite_10k_5k.h5ad")
    batches, rng = whole.obs["batch"].to_numpy(dtype=str), np.random.default_rng(seed)
    log_ng = whole.X.log1p()
    spread_g = np.asarray(log_ng.multiply(log_ng).mean(0) - np.square(log_ng.mean(0))).ravel()
    whole = whole[:, np.sort(np.argsort(spread_g)[-N_GENES:])]
    measured = rng.permutation(np.flatnonzero(batches == MEASURED))[: N_MEASURED + N_QUERY]
    other = rng.permutation(np.flatnonzero(batches != MEASURED))[:N_OTHER]
    cells = []
    for rows in (np.append(measured[:N_MEASURED], other), measured[N_MEASURED:]):
        part = whole[rows].copy()
        cells.append(ad.AnnData(part.X, obs=part.obs[["batch"]].astype(str), var=part.var[[]]))
        cells[-1].obsm[KEY] = part.obsm[KEY]
    return cells[0], cells[1]


def query_of(query: ad.AnnData, kind: str) -> ad.AnnData:
    """The query as one batch without proteins ("none"), or as one without and one with ("half")."""
    made = query.copy()
    lacks = np.ones(len(made), bool) if kind == "none" else np.arange(len(made)) % 2 == 0
    made.obs["batch"] = np.where(lacks, "new without", "new with")
    made.obsm[KEY] = made.obsm[KEY].mul(~lacks, axis=0)
    return made


def entropy(parts: list[np.ndarray]) -> float:
    """Batch entropy mixing of latents, each a batch."""
    _, index = neighbours(np.concatenate(parts), 100)
    return batch_entropy_mixing(index, np.repeat(np.arange(len(parts)), [len(part) for part in parts]))


def scores(model: Any, reference: ad.AnnData, query: ad.AnnData, truth_np: np.ndarray) -> dict[str, Any]:
    """Of a model that has learnt the query."""
    lacks = (query.obs["batch"] == "new without").to_numpy()
    _, found = model.get_normalized_expression(
        query, n_samples=25, return_mean=True, transform_batch=[MEASURED]
    )
    pairs = zip(np.log1p(found.to_numpy())[lacks].T, np.log1p(truth_np)[lacks].T, strict=True)
    z_nk = model.get_latent_representation(query)
    z_rk = model.get_latent_representation(reference[(reference.obs["batch"] == MEASURED).to_numpy()].copy())
    own = entropy([z_nk[lacks], z_nk[~lacks]]) if not lacks.all() else None
    return {
        "pearson": float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])),
        "ebm_with_reference": entropy([z_rk, z_nk[lacks]]),
        "ebm_within_query": own,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for seed in args.seeds:
        reference, query = parts(seed)
        truth_np = query.obsm[KEY].to_numpy(np.float32)
        scvi.settings.seed = seed
        scvi.model.TOTALVI.setup_anndata(reference, protein_expression_obsm_key=KEY, batch_key="batch")
        model = scvi.model.TOTALVI(reference)
        model.train(EPOCHS, **FIT)
        for kind in ("none", "half"):
            for adversary in (True, False):
                cells = query_of(query, kind)
                scvi.settings.seed = seed
                mapped = scvi.model.TOTALVI.load_query_data(cells, model, accelerator="cpu")
                weights = {"weight_decay": 0.0}
                mapped.train(QUERY_EPOCHS, adversarial_classifier=adversary, plan_kwargs=weights, **FIT)
                row = {"benchmark": "adversary", "machine": machine(), "scvi-tools": scvi.__version__}
                row |= {"seed": seed, "query": kind, "adversary": adversary}
                row |= {"epochs": [EPOCHS, QUERY_EPOCHS]}
                row |= {"scores": scores(mapped, reference, cells, truth_np)}
                print(json.dumps(row), flush=True)
                with open(args.out, "a") as out:
                    out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
