"""What the scripts of count models are asked, and how they save latents; needs numpy and anndata alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

UNKNOWN = "unknown"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of ``ours_counts.py``, ``scvi_peer.py`` and ``trvae_peer.py``."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    found.add_argument("--kind", choices=("scvi", "scanvi", "trvae"), required=True)
    found.add_argument("--reference", required=True)
    found.add_argument(
        "--query",
        action="append",
        default=[],
        type=lambda item: item.partition("=")[::2],
        help="NAME=FILE, any number of times",
    )
    found.add_argument("--genes", required=True, help="file with one gene per line")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--epochs", type=int, required=True, help="of scVI or trVAE, on the reference")
    found.add_argument("--labelled-epochs", type=int, default=0, help="of scANVI, after scVI's")
    found.add_argument("--query-epochs", type=int, required=True, help="of surgery, for each query")
    found.add_argument("--minibatch-size", type=int, default=128)
    found.add_argument("--models", required=True, help="folder of trained models of this data set")
    found.add_argument("--out", required=True)
    return found


def proteins_parser(doc: str | None) -> argparse.ArgumentParser:
    """Of ``ours_proteins.py`` and ``totalvi_peer.py``."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name in ("--reference", "--query", "--out"):
        found.add_argument(name, required=True)
    found.add_argument("--batch", required=True, help="batch that the query is decoded as")
    for name in ("--seed", "--epochs", "--query-epochs", "--minibatch-size", "--draws"):
        found.add_argument(name, type=int, required=True)
    return found


def save(path: Path, latent: Any, names: Iterable[str], source: str) -> None:
    """Latents of the cells of a file as plain arrays, with the batch and label that the file gives them."""
    obs = ad.read_h5ad(source, backed="r").obs
    cells = np.asarray(list(names), dtype=str)
    rows = obs.index.get_indexer(cells)
    assert len(cells) == len(obs) == len(np.unique(rows))
    assert (rows >= 0).all()
    obs = obs.iloc[rows]
    np.savez_compressed(
        path,
        latent=np.asarray(latent, dtype=np.float32),
        cell=cells,
        batch=obs["batch"].to_numpy(dtype=str),
        cell_type=obs["cell_type"].to_numpy(dtype=str),
    )
