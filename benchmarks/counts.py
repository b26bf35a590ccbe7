"""How fast a training step of scVI and scANVI is on one CPU thread: scvi-tools' module and ours.

    python benchmarks/counts.py --repeats 5        # with the extra `peer`: both packages in one process

The same minibatches of made-up counts (128 cells, 2,000 genes, 12 % of them not zero) lie ready in memory; a
step is loss, gradients and Adam. scvi-tools steps as its trainer does, but without Lightning around it. Ways
alternate; CPU seconds are what to compare on a shared machine. One JSON line: medians of the rates, and
least, median and largest ratio of neighbouring runs; also appended to ``results/counts.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE / "peers"))

from clock import pin_threads  # noqa: E402
from provenance import commit, machine  # noqa: E402

RESULTS = HERE / "results" / "counts.jsonl"
N, N_GENES, N_BATCHES, N_LABELS = 128, 2_000, 8, 10
LR, EPS, DECAY, KL_WEIGHT = 1e-3, 0.01, 1e-6, 0.3
Step = Callable[[int], None]


def made_up(n_minibatches: int = 8) -> list[Any]:
    import numpy as np
    import torch

    from streamx.models.cells import Cells

    rng = np.random.default_rng(0)
    share_g = rng.gamma(0.15, 1, (1, N_GENES))
    share_g /= share_g.sum()
    found = []
    for _ in range(n_minibatches):
        rate_ng = share_g * rng.gamma(2, 300, (N, 1)) * rng.gamma(1, 1, (N, N_GENES))
        x_ng = torch.as_tensor(rng.poisson(rate_ng).astype(np.float32))
        batch_n, label_n = (torch.as_tensor(rng.integers(0, k, N)) for k in (N_BATCHES, N_LABELS))
        found.append(Cells(x_ng, batch_n, label_n))
    return found


def ours(minibatches: list[Any], likelihood: str, scanvi: bool) -> Step:
    from scipy import sparse

    from streamx.config import ScanviConfig, ScviConfig
    from streamx.models.scanvi import from_scvi
    from streamx.models.scvi import Scvi
    from streamx.models.sparse import Rows
    from streamx.train.adam import Adam

    module: Any = Scvi(N_GENES, N_BATCHES, ScviConfig(gene_likelihood=likelihood))
    if scanvi:
        module = from_scvi(module, N_LABELS, ScanviConfig(gene_likelihood=likelihood))
    optimiser = Adam(module, LR, DECAY, eps=EPS)
    matrices = [sparse.csr_matrix(cells.x_ng.numpy()) for cells in minibatches]

    def step(number: int) -> None:
        at = number % len(minibatches)
        cells = replace(minibatches[at], x_ng=Rows.of(matrices[at]))  # anew: what it keeps is not kept
        optimiser.zero_grad()
        loss = module.loss(cells, KL_WEIGHT, **({"labelled": cells} if scanvi else {}))
        loss["loss"].backward()
        optimiser.step()

    return step


def scvi_tools(minibatches: list[Any], likelihood: str, scanvi: bool) -> Step:
    import torch
    from scvi.module import SCANVAE, VAE

    sizes = {"n_batch": N_BATCHES, "n_labels": N_LABELS, "gene_likelihood": likelihood}
    module = (SCANVAE if scanvi else VAE)(N_GENES, **sizes).train()
    optimiser = torch.optim.Adam(module.parameters(), lr=LR, eps=EPS, weight_decay=DECAY)

    def step(number: int) -> None:
        cells = minibatches[number % len(minibatches)]
        given = {"X": cells.x_ng, "batch": cells.batch_n[:, None], "labels": cells.label_n[:, None]}
        more = {"labelled_tensors": given, "classification_ratio": 50} if scanvi else {}
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
    args = parser.parse_args()
    pin_threads()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    minibatches = made_up()
    found: dict[str, Any] = {}
    for name, *case in (
        ("scvi zinb", "zinb", False),
        ("scvi nb", "nb", False),
        ("scanvi zinb", "zinb", True),
    ):
        ways = {"streamx": ours(minibatches, *case), "scvi-tools": scvi_tools(minibatches, *case)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for step in ways.values():
            cpu_seconds(step, 3)  # compiles, and fills caches
        for _ in range(args.repeats):
            for way, step in ways.items():
                seconds[way].append(cpu_seconds(step, args.steps))
        rates = {way: round(N / statistics.median(taken)) for way, taken in seconds.items()}
        ratios = [b / a for a, b in zip(seconds["streamx"], seconds["scvi-tools"], strict=True)]
        spread = [round(f(ratios), 2) for f in (min, statistics.median, max)]
        found[name] = {"cells_per_cpu_s": rates, "ratio": spread}
    line = json.dumps(
        {
            "benchmark": "counts",
            "minibatch": N,
            "genes": N_GENES,
            **found,
            "commit": commit(),
            "machine": machine(),
        }
    )
    print(line)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
