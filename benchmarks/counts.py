"""How fast a training step of scVI, scANVI and totalVI is on one CPU thread: scvi-tools' module and ours.

    python benchmarks/counts.py --repeats 5        # with the extra `peer`: both packages in one process

The same minibatches of made-up counts (12 % of them not zero; 128 cells and 2,000 genes, of totalVI 256 and
4,000, and 14 proteins) lie ready in memory; a step is loss, gradients and Adam. scvi-tools steps as its
trainer does, but without Lightning around it. Ways alternate; CPU seconds are what to compare on a shared
machine. One JSON line: medians of the rates, and least, median and largest ratio of neighbouring runs; also
appended to ``results/counts.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE / "peers"))

from clock import pin_threads  # noqa: E402
from provenance import commit, machine  # noqa: E402

RESULTS = HERE / "results" / "counts.jsonl"
N_BATCHES, N_LABELS, N_PROTEINS = 8, 10, 14
LR, EPS, DECAY, KL_WEIGHT = 1e-3, 0.01, 1e-6, 0.3
# What scvi-tools 1.4.2's totalVI does and older releases' does not.
NEWEST = {"input_transform": "scaled", "per_batch_efficiency": True, "protein_warmup": True}
Step = Callable[[int], None]


@dataclass(frozen=True)
class Case:
    model: str
    likelihood: str
    n: int = 128
    n_genes: int = 2_000


CASES = {
    "scvi zinb": Case("scvi", "zinb"),
    "scvi nb": Case("scvi", "nb"),
    "scanvi zinb": Case("scanvi", "zinb"),
    "totalvi nb": Case("totalvi", "nb", 256, 4_000),
    "totalvi zinb": Case("totalvi", "zinb", 256, 4_000),
}


def made_up(case: Case, n_minibatches: int = 8) -> list[Any]:
    import numpy as np
    import torch

    from streamx.models.cells import Cells

    rng = np.random.default_rng(0)
    n, n_genes = case.n, case.n_genes
    share_g = rng.gamma(0.15, 1, (1, n_genes))
    share_g /= share_g.sum()
    found = []
    for _ in range(n_minibatches):
        rate_ng = share_g * rng.gamma(2, n_genes * 0.15, (n, 1)) * rng.gamma(1, 1, (n, n_genes))
        x_ng = torch.as_tensor(rng.poisson(rate_ng).astype(np.float32))
        batch_n, label_n = (torch.as_tensor(rng.integers(0, k, n)) for k in (N_BATCHES, N_LABELS))
        y_np = torch.as_tensor(rng.poisson(rng.gamma(1, 50, (n, N_PROTEINS))).astype(np.float32))
        found.append(Cells(x_ng, batch_n, label_n, protein_np=y_np))
    return found


def network(case: Case) -> Any:
    from streamx.config import ScanviConfig, ScviConfig, TotalviConfig
    from streamx.models.scanvi import from_scvi
    from streamx.models.scvi import Scvi
    from streamx.models.totalvi import Totalvi

    if case.model == "totalvi":
        config = TotalviConfig(gene_likelihood=case.likelihood, **NEWEST)
        return Totalvi(case.n_genes, N_BATCHES, config, n_proteins=N_PROTEINS)
    vae = Scvi(case.n_genes, N_BATCHES, ScviConfig(gene_likelihood=case.likelihood))
    if case.model == "scvi":
        return vae
    return from_scvi(vae, N_LABELS, ScanviConfig(gene_likelihood=case.likelihood))


def ours(minibatches: list[Any], case: Case) -> Step:
    from scipy import sparse

    from streamx.models.sparse import Rows
    from streamx.train.adam import Adam

    module = network(case).train()
    optimiser = Adam(module, LR, DECAY, eps=EPS)
    matrices = [sparse.csr_matrix(cells.x_ng.numpy()) for cells in minibatches]

    def step(number: int) -> None:
        at = number % len(minibatches)
        cells = replace(minibatches[at], x_ng=Rows.of(matrices[at]))  # anew: what it keeps is not kept
        optimiser.zero_grad()
        loss = module.loss(cells, KL_WEIGHT, **({"labelled": cells} if case.model == "scanvi" else {}))
        loss["loss"].backward()
        optimiser.step()

    return step


def scvi_tools(minibatches: list[Any], case: Case) -> Step:
    import torch
    from scvi.module import SCANVAE, TOTALVAE, VAE

    sizes = {"n_batch": N_BATCHES, "n_labels": N_LABELS, "gene_likelihood": case.likelihood}
    if case.model == "totalvi":
        module = TOTALVAE(case.n_genes, N_PROTEINS, n_panel=N_BATCHES, **sizes).train()
    else:
        module = {"scvi": VAE, "scanvi": SCANVAE}[case.model](case.n_genes, **sizes).train()
    optimiser = torch.optim.Adam(module.parameters(), lr=LR, eps=EPS, weight_decay=DECAY)

    def step(number: int) -> None:
        cells = minibatches[number % len(minibatches)]
        given = {"X": cells.x_ng, "batch": cells.batch_n[:, None], "labels": cells.label_n[:, None]}
        scanvi = case.model == "scanvi"
        more = {"labelled_tensors": given, "classification_ratio": 50} if scanvi else {}
        if case.model == "totalvi":
            given["proteins"] = cells.protein_np
        optimiser.zero_grad()
        module(given, loss_kwargs={"kl_weight": KL_WEIGHT, **more})[2].loss.backward()
        optimiser.step()

    return step


def cpu_seconds(step: Step, n_steps: int) -> float:
    start = time.process_time()
    for number in range(n_steps):
        step(number)
    return (time.process_time() - start) / n_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=tuple(CASES))
    args = parser.parse_args()
    pin_threads()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in args.cases:
        case = CASES[name]
        minibatches = made_up(case)
        ways = {"streamx": ours(minibatches, case), "scvi-tools": scvi_tools(minibatches, case)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for step in ways.values():
            cpu_seconds(step, 3)  # compiles, and fills caches
        for _ in range(args.repeats):
            for way, step in ways.items():
                seconds[way].append(cpu_seconds(step, args.steps))
        rates = {way: round(case.n / statistics.median(taken)) for way, taken in seconds.items()}
        ratios = [b / a for a, b in zip(seconds["streamx"], seconds["scvi-tools"], strict=True)]
        spread = [round(f(ratios), 2) for f in (min, statistics.median, max)]
        found[name] = {
            "minibatch": case.n,
            "genes": case.n_genes,
            "cells_per_cpu_s": rates,
            "ratio": spread,
        }
    line = json.dumps({"benchmark": "counts", **found, "commit": commit(), "machine": machine()})
    print(line)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
