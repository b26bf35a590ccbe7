"""Training on a GPU: cells per second, how long the GPU idles, and whether its numbers are the CPU's.

    python benchmarks/gpu.py --device cuda --out gpu.jsonl

Needs torch, numpy, scipy, pandas, zarr, numcodecs, numba, safetensors, tqdm and google-crc32c, nothing from a
network. scalex and scvi-tools run beside us where they are installed, and are named as missing where not.
``--device cpu`` runs the same as a test of the script. One JSON line per measurement, each on its own: what
fails is reported and the rest goes on.

* numerics: losses of 20 equal steps on the CPU (sparse path) and on the device, and latents of one model.
* train: our loop from a simulated narrow view on disk, and from minibatches that lie on the device already;
  each also with the step recorded as a CUDA graph. ``busy`` is the share of the wall clock in which kernels
  ran, by torch.profiler over some steps (which slows the host: idle shares are upper limits).
* peers: SCALEX's network, loop as in its package, and SCVI, both fed from memory on the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "peers")]

from streamx.models.scalex import Scalex  # noqa: E402
from streamx.store.collection import Collection, open_collection  # noqa: E402
from streamx.store.pack import Content, write_part  # noqa: E402
from streamx.store.spill import Slab  # noqa: E402
from streamx.train.early_stopping import EarlyStopping  # noqa: E402
from streamx.train.feed import make_loader, training_inputs  # noqa: E402
from streamx.train.fit import State, fit, make_optimizer  # noqa: E402
from streamx.train.graph import RecordedStep  # noqa: E402
from streamx.train.latent import latents  # noqa: E402
from streamx.train.scalex import named_losses  # noqa: E402

N_GENES, N_BATCHES, N_TYPES, VALUES = 2_000, 8, 24, 170
TRANSFORM = {"binarize": False, "target_sum": 1e4, "total": "view_total", "log1p": True, "scale": "batch"}


# -- data --------------------------------------------------------------------------------------------------


def simulated(folder: Path, n_cells: int) -> Collection:
    """A view of cells of several types in several batches, about 170 values of 2,000 genes each."""
    path = folder / f"view-{n_cells}"
    if not path.exists():
        rng = np.random.default_rng(0)
        profile_tg = rng.lognormal(0, 1.5, (N_TYPES, N_GENES)) * rng.lognormal(0, 0.3, N_GENES)
        cumulative_tg = np.cumsum(profile_tg / profile_tg.sum(1, keepdims=True), axis=1)
        batch_n = np.arange(n_cells) * N_BATCHES // n_cells
        parts = []
        for low in range(0, n_cells, 20_000):
            n = min(20_000, n_cells - low)
            depth_n = np.clip(rng.lognormal(np.log(1.6 * VALUES), 0.3, n), 20, 2000).astype(np.int64)
            type_n = rng.integers(N_TYPES, size=n)
            gene_v = np.empty(depth_n.sum(), np.int64)
            row_v, type_v = np.repeat(np.arange(n), depth_n), np.repeat(type_n, depth_n)
            for kind in range(N_TYPES):
                of_kind = type_v == kind
                drawn = np.searchsorted(cumulative_tg[kind], rng.random(of_kind.sum()))
                gene_v[of_kind] = drawn.clip(max=N_GENES - 1)
            ones = np.ones(len(gene_v), np.float32)
            parts.append(sparse.csr_matrix((ones, (row_v, gene_v)), shape=(n, N_GENES)))
        write_view(path, sparse.vstack(parts, format="csr"), batch_n)
    return open_collection(path)


def write_view(path: Path, x_ng: sparse.csr_matrix, batch_n: np.ndarray) -> None:
    """As ``streamx preprocess`` writes it."""
    total_n = np.asarray(x_ng.sum(1)).ravel()
    y_ng = x_ng.copy()
    y_ng.data = np.log1p(y_ng.data * np.repeat(1e4 / total_n, np.diff(y_ng.indptr))).astype(np.float32)
    maxima = [y_ng[batch_n == b].max(0).toarray().ravel() for b in range(N_BATCHES)]
    scale_bg = np.stack(maxima)
    names = [f"batch{b}" for b in range(N_BATCHES)]
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical.from_codes(batch_n, names),
            "_streamx_total": total_n.astype(np.float64),
            "_streamx_row": np.arange(len(batch_n)),
        },
        index=[f"cell{i}" for i in range(len(batch_n))],
    )
    content = Content(
        kind="view",
        obs=obs,
        var=pd.DataFrame(index=[f"GENE{g}" for g in range(N_GENES)]),
        batch_key="batch",
        fingerprint={"benchmark": len(batch_n)},
        obsm={},
        tables={"scale_bg": np.where(scale_bg == 0, 1, scale_bg).astype(np.float32)},
        view={
            "store": "store",
            "store_generation": 1,
            "transform": TRANSFORM,
            "parameters": {"profile": "RNA"},
            "recipe": {"min_features": 0, "drop": [], "total": "kept"},
        },
    )
    write_part(path, [Slab("all", np.arange(len(batch_n)), lambda: (x_ng, {}))], content)


# -- measuring ---------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(step: Callable[[], Any], cells: int, n: int, device: torch.device) -> dict[str, float]:
    """Cells per second of n steps, after some to warm up."""
    for _ in range(10):
        step()
    wait(device)
    start = time.perf_counter()
    for _ in range(n):
        step()
    wait(device)
    seconds = time.perf_counter() - start
    return {"cells_per_second": round(cells * n / seconds), "ms_per_step": round(1e3 * seconds / n, 4)}


def busy(step: Callable[[], Any], n: int, device: torch.device) -> dict[str, float]:
    """Time in which kernels ran, of n steps under the profiler."""
    if device.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    wait(device)
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        for _ in range(n):
            step()
        wait(device)
        seconds = time.perf_counter() - start
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    ran, until = 0.0, 0.0
    for begin, end in spans:  # kernels of several streams overlap
        ran += max(0.0, end - max(begin, until))
        until = max(until, end)
    return {
        "gpu_ms_per_step": round(ran / 1e3 / n, 4),
        "busy_under_profiler": round(ran / 1e6 / seconds, 3),
        "kernels_per_step": round(len(spans) / n, 1),
    }


def measured(step: Callable[[], Any], cells: int, n: int, device: torch.device) -> dict[str, float]:
    """Rate, kernel time, and the idle share that follows from both."""
    found = rate(step, cells, n, device)
    found |= busy(step, min(n, 100), device)
    if "gpu_ms_per_step" in found:
        found["idle"] = round(max(0.0, 1 - found["gpu_ms_per_step"] / found["ms_per_step"]), 3)
    return found


# -- ours --------------------------------------------------------------------------------------------------


def endless(loader: Any, seed: int = 0) -> Iterator[tuple[Any, ...]]:
    epoch = 0
    while True:
        yield from training_inputs(loader, 10, seed, epoch, 0)
        epoch += 1


def our_step(view: Collection, device: torch.device, recorded: bool) -> Callable[..., Any]:
    """One step of our loop on a minibatch."""
    module = Scalex(view.n_vars, len(view.batches)).to(device).train()
    optimizer, loss = make_optimizer(module, 2e-4, 5e-4), named_losses(module)
    if recorded:
        return RecordedStep(optimizer, loss, nullcontext())

    def step(*minibatch: Any) -> None:
        optimizer.zero_grad()
        loss(*minibatch)["loss"].backward()
        optimizer.step()

    return step


def ours(view: Collection, device: torch.device, size: int, n: int) -> Iterator[dict[str, Any]]:
    for recorded in (False, True) if device.type == "cuda" else (False,):
        loader = make_loader(view, size, device=device, drop_last=True, threads=2)
        ready = list(islice(endless(loader), 64))
        for source, minibatches in (("disk", endless(loader)), ("device", cycle(ready))):
            step = our_step(view, device, recorded)
            found = measured(lambda m=minibatches, s=step: s(*next(m)), size, n, device)
            yield {"way": f"streamx from {source}", "recorded": recorded, "minibatch": size, **found}


def compiled(view: Collection, device: torch.device, size: int, n: int) -> dict[str, Any]:
    """The same network through torch.compile, from the device."""
    loader = make_loader(view, size, device=device, drop_last=True)
    ready = cycle(list(islice(endless(loader), 64)))
    module = Scalex(view.n_vars, len(view.batches)).to(device).train()
    optimizer = make_optimizer(module, 2e-4, 5e-4)
    loss = torch.compile(lambda *minibatch: module.loss(*minibatch).total)

    def step() -> None:
        optimizer.zero_grad()
        loss(*next(ready)).backward()
        optimizer.step()

    return {"way": "streamx from device, compiled", "minibatch": size, **measured(step, size, n, device)}


def numerics(view: Collection, device: torch.device) -> dict[str, Any]:
    """20 equal steps, and latents of equal weights, on the CPU and on the device."""
    losses, modules = {}, {}
    for where in (torch.device("cpu"), device):
        module = Scalex(view.n_vars, len(view.batches), generator=torch.Generator().manual_seed(1)).to(where)
        loader = make_loader(view, 64, device=where, drop_last=True, seed=3)
        optimizer, seen = make_optimizer(module, 2e-4, 5e-4), []
        module.train()
        for minibatch in islice(training_inputs(loader, 10, 3, 0, 0), 20):
            optimizer.zero_grad()
            loss = module.loss(*minibatch).total
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
        losses[str(where)], modules[str(where)] = torch.stack(seen).cpu().double(), module.eval()
    own = modules[str(device)]
    there = latents(own, view, "running")
    here = latents(own.to("cpu"), view, "running")
    a, b = losses["cpu"], losses[str(device)]
    return {
        "measure": "numerics",
        "loss_first": float(a[0]),
        "largest_relative_difference_of_losses": float(((a - b).abs() / a).max()),
        "largest_difference_of_latents": float(np.abs(there - here).max()),
        "latents_sd": float(here.std()),
    }


def whole_run(view: Collection, device: torch.device, recorded: bool) -> dict[str, Any]:
    """One epoch through ``fit`` itself: its loss, and the rate with all that belongs to it."""
    module = Scalex(view.n_vars, len(view.batches), generator=torch.Generator().manual_seed(1)).to(device)
    loader = make_loader(view, 64, device=device, drop_last=True, seed=3, threads=2)
    optimizer, loss = make_optimizer(module, 2e-4, 5e-4), named_losses(module)
    start = time.perf_counter()
    state = fit(
        module,
        optimizer,
        partial(training_inputs, loader, 10, 3),
        loss,
        n_epochs=2,
        state=State(0, [], EarlyStopping(10)),
        whole_step=RecordedStep(optimizer, loss, nullcontext()) if recorded else None,
        progress=False,
    )
    seconds = time.perf_counter() - start
    return {
        "measure": "fit, two epochs",
        "recorded": recorded,
        "losses": [row["loss"] for row in state.history],
        "cells_per_second": round(2 * len(loader) * 64 / seconds),
    }


# -- peers -------------------------------------------------------------------------------------------------


def dense_minibatches(view: Collection, device: torch.device, size: int) -> Iterator[tuple[Any, Any]]:
    """Random rows of a dense matrix on the device."""
    loader = make_loader(view, 4096, device=device, order="sequential", rows=(0, min(view.n_obs, 65_536)))
    parts = [(mb.x_ng, mb.batch_n) for mb in loader.at(0)]
    dense = [x if isinstance(x, torch.Tensor) else torch.from_numpy(x.dense()) for x, _ in parts]
    x_ng, batch_n = torch.cat(dense), torch.cat([torch.as_tensor(b) for _, b in parts])
    while True:
        order = torch.randperm(len(x_ng), device=x_ng.device)
        for rows in order.split(size)[:-1]:
            yield x_ng[rows], batch_n[rows]


def scalex(view: Collection, device: torch.device, size: int, n: int) -> dict[str, Any]:
    from scalex_peer import lend_names

    lend_names()
    from scalex.net.loss import kl_div
    from scalex.net.vae import VAE

    encoder, decoder = [["fc", 1024, 1, "relu"], ["fc", 10, "", ""]], [["fc", N_GENES, N_BATCHES, "sigmoid"]]
    model = VAE(encoder, decoder, n_domain=N_BATCHES).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, weight_decay=5e-4)
    minibatches = dense_minibatches(view, device, size)

    def step() -> None:  # as the loop of VAE.fit
        x_ng, batch_n = next(minibatches)
        z, mu, var = model.encoder(x_ng)
        reconstructed = model.decoder(z, batch_n)
        target = x_ng.clamp(max=1)
        reconstruction = torch.nn.functional.binary_cross_entropy(reconstructed, target) * N_GENES
        kl = kl_div(mu, var)
        optimizer.zero_grad()
        (reconstruction + 0.5 * kl).backward()
        optimizer.step()
        (reconstruction.item(), kl.item())

    return {"way": "scalex from device", "minibatch": size, **measured(step, size, n, device)}


def scvi(view: Collection, device: torch.device, size: int, n: int) -> dict[str, Any]:
    import anndata as ad
    import scvi as package

    rows = min(view.n_obs, 65_536)
    codes = view.batch_codes[:rows]
    adata = ad.AnnData(view.read(0, rows), obs=pd.DataFrame({"batch": pd.Categorical(codes)}))
    adata.obs_names = adata.obs_names.astype(str)
    package.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = package.model.SCVI(adata)
    settings = {
        "batch_size": size,
        "train_size": 1.0,
        "enable_progress_bar": False,
        "accelerator": device.type,
    }
    if device.type == "cpu":
        settings["accelerator"] = "cpu"
    model.train(max_epochs=1, **settings)
    epochs = max(1, n * size // rows)
    start = time.perf_counter()
    model.train(max_epochs=epochs, **settings)
    wait(device)
    seconds = time.perf_counter() - start
    return {"way": "scvi from memory", "minibatch": size, "cells_per_second": round(epochs * rows / seconds)}


# -- all ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--minibatch", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--work", type=Path, help="where the view stays for the next time")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--compile", action="store_true", help="also torch.compile (needs a C compiler)")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = {"device": name, "torch": torch.__version__, "cells": args.cells}

    def say(line: dict[str, Any]) -> None:
        text = json.dumps(line | about)
        print(text, flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(text + "\n")

    def attempt(what: str, make: Callable[[], Any]) -> None:
        try:
            found = make()
            for line in found if isinstance(found, Iterator) else [found]:
                say(line)
        except Exception as error:  # a peer that is missing, or a path that this machine can't run
            traceback.print_exc(limit=5)
            say({"way": what, "failed": f"{type(error).__name__}: {str(error)[:300]}"})

    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        view = simulated(args.work or Path(temporary), args.cells)
        say({"measure": "data", "seconds": round(time.perf_counter() - start, 1), "nnz": view.nnz})
        attempt("numerics", lambda: numerics(view, device))
        for recorded in (False, True) if device.type == "cuda" else (False,):
            attempt(f"fit, recorded {recorded}", lambda r=recorded: whole_run(view, device, r))
        for size in args.minibatch:
            attempt("streamx", lambda s=size: ours(view, device, s, args.steps))
            attempt("scalex", lambda s=size: scalex(view, device, s, args.steps))
            attempt("scvi", lambda s=size: scvi(view, device, s, args.steps))
            if args.compile:
                attempt("compile", lambda s=size: compiled(view, device, s, args.steps))


if __name__ == "__main__":
    main()
