"""A training loop of one's own over a view: the loader gives minibatches in a reproducible order.

    python examples/04_own_loop.py -o results/loop

Runs on the cells that come with streamx (lung cancer cell lines, `streamx/demo/data/SOURCE.md`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import streamx as sx
from streamx.demo import DATA

parser = argparse.ArgumentParser()
parser.add_argument("-o", "--output", default="results/loop", type=Path)
parser.add_argument("--quick", action="store_true", help="one epoch: shows that it runs")


def main() -> None:
    args = parser.parse_args()
    store = sx.convert(sorted(DATA.glob("sc_celseq2*.h5ad")), args.output / "store")
    view = sx.preprocess(store, args.output / "view", n_top_features=1_000)

    # a linear autoencoder: PCA by gradient descent
    torch.manual_seed(0)
    down = torch.nn.Linear(view.n_vars, 10, bias=False)
    optimiser = torch.optim.Adam(down.parameters(), lr=1e-3)
    loader = sx.Loader(view, minibatch_size=64, seed=0, drop_last=True, device="cpu")
    for epoch in range(1 if args.quick else 20):
        losses = []
        for minibatch in loader:  # the same minibatches for any number of threads or memory limit
            x_ng = minibatch.x_ng
            loss = torch.nn.functional.mse_loss(down(x_ng) @ down.weight, x_ng)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}")


if __name__ == "__main__":
    main()
