"""SCALEX 1.0.4 on cells that are prepared already, in a process of its own: how fast it trains, projects.

Needs only the peer's packages. Called by ``training.py``; prints one JSON line. ``--way own`` is the package
as it is: its dataset, torch's DataLoader in this process, its loop. ``--way patched`` lends it minibatches of
a dense matrix in memory and a fused Adam, so that the network alone is left.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

from clock import clock, peak_rss_mb, pin_threads, since

pin_threads()

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from scalex_peer import lend_names  # noqa: E402
from scipy import sparse  # noqa: E402

MINIBATCH = 64


class DenseMinibatches:
    """What a DataLoader gives, shuffled, from one dense float32 matrix."""

    def __init__(self, x_ng: np.ndarray, code_n: np.ndarray) -> None:
        self.x, self.y = torch.from_numpy(x_ng), torch.from_numpy(code_n)

    def __len__(self) -> int:
        return len(self.x) // MINIBATCH

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        order = torch.randperm(len(self.x))
        for i in range(len(self)):
            rows = order[i * MINIBATCH : (i + 1) * MINIBATCH]
            yield self.x[rows], self.y[rows], rows


def minibatches(way: str, adata: ad.AnnData) -> Any:
    from scalex.data import SingleCellDataset
    from torch.utils.data import DataLoader

    if way == "own":
        return DataLoader(
            SingleCellDataset(adata), batch_size=MINIBATCH, drop_last=True, shuffle=True, num_workers=0
        )
    return DenseMinibatches(adata.X.toarray(), adata.obs["batch"].cat.codes.to_numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="npz: indptr, indices, data, n_genes, batch")
    parser.add_argument("--way", choices=("own", "patched", "project"), required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--cells", type=int, help="only so many (of project)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    lend_names()
    from scalex.data import BatchSampler, SingleCellDataset
    from scalex.net.utils import EarlyStopping
    from scalex.net.vae import VAE
    from torch.utils.data import DataLoader

    given = np.load(args.data)
    code_n = given["batch"].astype(np.int64)
    shape = (len(code_n), int(given["n_genes"]))
    adata = ad.AnnData(
        sparse.csr_matrix((given["data"], given["indices"], given["indptr"]), shape=shape),
        obs=pd.DataFrame({"batch": pd.Categorical(code_n)}, index=[f"c{i}" for i in range(len(code_n))]),
    )
    n_domain = len(adata.obs["batch"].cat.categories)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002 - the package draws from it
    model = VAE(
        [["fc", 1024, 1, "relu"], ["fc", 10, "", ""]],
        [["fc", shape[1], n_domain, "sigmoid"]],
        n_domain=n_domain,
    )
    result: dict[str, Any] = {"way": f"scalex {args.way}", "seed": args.seed}
    if args.way == "project":
        part = adata[: args.cells].copy() if args.cells else adata
        sampler = BatchSampler(MINIBATCH, part.obs["batch"], drop_last=False)
        loader = DataLoader(SingleCellDataset(part), batch_sampler=sampler, num_workers=0)
        start = clock()
        model.encodeBatch(loader, device="cpu")
        result |= {"cells": part.n_obs, "losses": []}
    else:
        if args.way == "patched":
            torch.optim.Adam = partial(torch.optim.Adam, fused=True)
        loader = minibatches(args.way, adata)
        losses: list[float] = []
        EarlyStopping.__call__ = lambda self, loss, model: losses.append(float(loss))
        with tempfile.TemporaryDirectory() as folder:
            stopping = EarlyStopping(patience=10**6, checkpoint_file=f"{folder}/model.pt")
            start = clock()
            model.fit(loader, max_iteration=args.epochs * len(loader), early_stopping=stopping, device="cpu")
        result |= {"cells": args.epochs * len(loader) * MINIBATCH, "losses": losses}
    packages = ("scalex", "torch", "numpy", "scipy", "anndata")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    print(json.dumps(result | since(start) | {"peak_rss_mb": peak_rss_mb(), "versions": versions}))


if __name__ == "__main__":
    main()
