"""Count models that map by surgery: what runs, with which settings, beside which release of which package.

Ours (``ours_counts.py``), scvi-tools' SCVI and SCANVI (``peers/scvi_peer.py``) and scArches' TRVAE
(``peers/trvae_peer.py``) get the same cells, the same genes (2,000 variable ones of the reference, chosen by
streamx), labels of the query hidden, minibatches of 128 and the same epochs. scVI and scANVI have scArches'
settings of the network on both sides, trVAE its documented defaults. scANVI begins from the scVI of the same
seed. Every query is mapped on its own, so that each has its own epochs: one pass of surgery for all queries
together would take more steps for each.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from sets import BenchSet

PEERS = {"streamx scVI": "scVI", "streamx scANVI": "scANVI", "streamx trVAE": "trVAE"}
METHODS = tuple(method for pair in PEERS.items() for method in reversed(pair))
PACKAGES = {
    "scVI": ("scvi-tools", "1.4.2"),
    "scANVI": ("scvi-tools", "1.4.2"),
    "trVAE": ("scArches", "0.6.1"),
}
MINIBATCH = 128
GENES = "genes.txt"
N_GENES = 2000


def genes_of(reference: Path, folder: Path) -> Path:
    """File with the variable genes of the reference, one per line (all genes, where it has no more)."""
    file = folder / GENES
    if not file.exists():
        import streamx as sx

        store = sx.convert([str(reference)], folder / "store", batch_key="batch", threads=1)
        n_top = N_GENES if store.n_vars > N_GENES else 0  # all: a trend over few genes can't be fitted
        view = sx.preprocess(
            store, folder / "view", profile="counts", flavor="seurat_v3", n_top_features=n_top, threads=1
        )
        partial = file.with_suffix(".tmp")
        partial.write_text("\n".join(view.var_names) + "\n")
        partial.rename(file)
    return file


def key_of(bench: BenchSet, method: str, seed: int, data: str, genes: Path, source: str) -> dict[str, Any]:
    """What a result depends on; ``source``: checksum of the files of ours that can change a latent."""
    assert bench.epochs is not None
    base, labelled, mapped = bench.epochs
    key: dict[str, Any] = {
        "set": bench.name,
        "method": method,
        "seed": seed,
        "epochs": [base, labelled, mapped] if method.endswith("scANVI") else [base, mapped],
        "minibatch_size": MINIBATCH,
        "genes_crc": f"{zlib.crc32(genes.read_bytes()):08x}",
        "data_crc": data,
    }
    if method in PEERS:
        return key | {"source_crc": source}
    package, release = PACKAGES[method]
    return key | {package: release}


def arguments(key: dict[str, Any], genes: Path) -> list[str]:
    """Of ``ours_counts.py`` and of the peers' scripts."""
    kind = key["method"].removeprefix("streamx ").lower()
    asked = [f"--kind={kind}", f"--genes={genes}", f"--minibatch-size={key['minibatch_size']}"]
    return [*asked, f"--epochs={key['epochs'][0]}", f"--query-epochs={key['epochs'][-1]}"] + (
        [f"--labelled-epochs={key['epochs'][1]}"] if kind == "scanvi" else []
    )


def script(method: str) -> str:
    """The peer's script."""
    return "trvae_peer.py" if method == "trVAE" else "scvi_peer.py"


def check_versions(versions: dict[str, str]) -> None:
    """Refuse a peer of another release than the comparison is with."""
    for package, release in PACKAGES.values():
        if versions.get(package, release) != release:
            raise SystemExit(f"{package} {versions[package]} is installed, not {release}")
