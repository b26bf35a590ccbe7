"""The data sets of the quality comparison: which files, which batch column, which queries.

Every method gets the same h5ad files, written once by :func:`write_inputs`: the reference as one
concatenation (inner join of genes), and each query as its own file with its own genes, as a user would hand
it over.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np

UNLABELED = ("unknown", "undefined", "unmatched", "", "Unknown")
UNKNOWN = "unknown"  # what they are called in the inputs
PBMC_REFERENCE = ("pbmc3k", "zheng_facs", "frozen_donorA", "kang_ctrl")
PBMC_QUERIES = ("pbmc4k", "kang_stim")


@dataclass(frozen=True)
class BenchSet:
    """One data set and split.

    ``mode`` "map": trained on the reference, queries added afterwards. "int": trained on every batch;
    the queries are then only the batches whose labels are hidden and predicted. ``epochs`` of count models:
    of scVI and trVAE on the reference, of scANVI on top of that scVI, of surgery; None: they don't run on it.
    ``scalex``: whether SCALEX does.
    """

    name: str
    mode: str
    files: tuple[str, ...]
    batch_key: str
    reference: tuple[str, ...]
    queries: tuple[str, ...]
    label_key: str = "cell_type"
    epochs: tuple[int, int, int] | None = None
    scalex: bool = True


SETS = {
    "pbmc_map": BenchSet(
        "pbmc_map",
        "map",
        tuple(f"pbmc/{name}.h5ad" for name in PBMC_REFERENCE + PBMC_QUERIES),
        "study",
        PBMC_REFERENCE,
        PBMC_QUERIES,
        epochs=(60, 12, 50),
    ),
    "symphony_map": BenchSet(
        "symphony_map",
        "map",
        ("symphony_pbmc_1200.h5ad",),
        "batch",
        ("3pv1", "3pv2"),
        ("5p",),
        epochs=(150, 20, 100),
    ),
    "kang_map": BenchSet(
        "kang_map",
        "map",
        ("kang_muscat_4samples.h5ad",),
        "batch",
        ("ctrl101", "ctrl107"),
        ("stim101", "stim107"),
        epochs=(150, 20, 100),
        scalex=False,
    ),
    "pbmc_int": BenchSet(
        "pbmc_int",
        "int",
        tuple(f"pbmc/{name}.h5ad" for name in PBMC_REFERENCE + PBMC_QUERIES),
        "study",
        PBMC_REFERENCE,
        PBMC_QUERIES,
    ),
}
# The comparison of norms has one more: four CEL-seq2 plates as the reference, Drop-seq as the query.
CELLBENCH = BenchSet(
    "cellbench_map",
    "map",
    ("cellbench_5batch.h5ad",),
    "batch",
    ("sc_celseq2", "sc_celseq2_5cl_p1", "sc_celseq2_5cl_p2", "sc_celseq2_5cl_p3"),
    ("sc_dropseq",),
)


def data_dir() -> Path:
    """Folder of the benchmark's data ($STREAMX_DATA)."""
    path = os.environ.get("STREAMX_DATA")
    if not path:
        raise SystemExit("set STREAMX_DATA to the folder that holds pbmc/*.h5ad and symphony_pbmc_1200.h5ad")
    return Path(path)


def checksum(paths: list[Path]) -> str:
    """crc32 over the bytes of the files, in the order given: part of the key of a cached result."""
    crc = 0
    for path in paths:
        crc = zlib.crc32(path.read_bytes(), crc)
    return f"{crc:08x}"


def by_batch(bench: BenchSet) -> dict[str, ad.AnnData]:
    """Batch name -> its cells with that file's genes; ``obs`` holds ``batch`` and ``cell_type`` (str)."""
    found = {}
    for file in bench.files:
        whole = ad.read_h5ad(data_dir() / file)
        for name in whole.obs[bench.batch_key].astype(str).unique():
            part = whole[(whole.obs[bench.batch_key] == name).to_numpy()].copy()
            labels = part.obs[bench.label_key].astype(str).to_numpy()
            names = np.array([f"{name}:{cell}" for cell in part.obs_names], dtype=object)
            found[name] = ad.AnnData(part.X, var=part.var[[]].copy())
            found[name].obs_names = names
            found[name].obs["batch"] = name
            found[name].obs["cell_type"] = np.where(np.isin(labels, UNLABELED), UNKNOWN, labels)
    return found


def write_inputs(bench: BenchSet, folder: Path) -> dict[str, Path]:
    """Write ``reference.h5ad`` (mode "int": of all batches), and in mode "map" one ``<query>.h5ad`` each.

    Returns
    -------
    dict
        "reference" and every query that is mapped -> file. Files that are there already are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = bench.reference if bench.mode == "map" else bench.reference + bench.queries
    mapped = bench.queries if bench.mode == "map" else ()
    paths = {name: folder / f"{name}.h5ad" for name in ("reference", *mapped)}
    if all(path.exists() for path in paths.values()):
        return paths
    parts = by_batch(bench)
    joined = ad.concat([parts[name] for name in trained], join="inner")
    writers: dict[str, Callable[[], ad.AnnData]] = {"reference": lambda: joined}
    for name in mapped:
        writers[name] = lambda name=name: parts[name]
    for name, make in writers.items():
        partial = paths[name].with_suffix(".tmp")
        make().write_h5ad(partial)
        partial.rename(paths[name])
    return paths
