"""Every setting that a user can change, with its default and its help: the one place where they live.

The command line is generated from these classes; the Python functions take them field by field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from streamx.errors import UsageError

UNLABELED = ("", "unknown", "Unknown")


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, many: bool = False) -> Any:
    """A dataclass field that carries what the command line needs to know about it."""
    return field(default=default, metadata={"help": help, "choices": choices, "many": many})


def parse_bytes(text: str | int) -> int:
    """``"4GB"``, ``"512 MiB"`` or a number of bytes -> bytes (kB, MB, GB are powers of 1000).

    Raises
    ------
    UsageError
        If the text is no positive size.
    """
    units = {
        "": 1,
        "B": 1,
        "K": 1e3,
        "M": 1e6,
        "G": 1e9,
        "T": 1e12,
        "KI": 2**10,
        "MI": 2**20,
        "GI": 2**30,
        "TI": 2**40,
    }
    raw = str(text).strip().upper()
    number = raw.rstrip("BKMGTI ")
    unit = raw[len(number) :].strip()
    unit = unit[:-1] if unit.endswith("B") and unit != "B" else unit
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise UsageError(f"{text!r} is no size in bytes", fix="write it as 4GB, 512MB or 2GiB")
    return size


@dataclass(frozen=True)
class ConvertConfig:
    batch_key: str | None = option(
        None,
        "obs column that names the batch, or several joined by commas (default: one batch per file; "
        "for a single file its column `batch`)",
    )
    join: str = option(
        "inner", "genes that all files share, or the genes of any file", choices=("inner", "outer")
    )
    layer: str | None = option(None, "what holds the counts: X (default), raw, or the name of a layer")
    modality: str | None = option(None, "modality of an h5mu file that holds the counts, such as rna or atac")
    obsm: tuple[str, ...] = option(
        ("protein_expression",), "dense obsm matrices to carry along where a file has them", many=True
    )
    obs_map: str | None = option(
        None, "JSON file {file key: {its column: our column}} that renames obs columns"
    )
    strip_versions: bool = option(
        False, "drop the version from Ensembl ids: ENSG00000141510.16 -> ENSG00000141510"
    )
    duplicate_genes: str = option(
        "error",
        "what to do with a gene name that occurs twice in a file",
        choices=("error", "first", "sum", "unique"),
    )
    allow_float: bool = option(False, "accept values that are no counts (normalised data)")
    on_error: str = option(
        "stop", "a broken input file stops the run, or is left out", choices=("stop", "skip")
    )
    preset: str = option(
        "default",
        "layout on disk: default (fast, portable), compact, remote (smallest), speed (uncompressed)",
        choices=("default", "compact", "remote", "speed"),
    )
    shard_rows: int = option(1_048_576, "cells per shard, at most")
    seed: int = option(0, "seed of the order of rows inside each batch")
    memory: str = option("4GB", "memory that the work may use")
    threads: int = option(0, "threads (0: one per core)")


@dataclass(frozen=True)
class PreprocessConfig:
    profile: str = option(
        "RNA", "RNA, ATAC, or counts (select features, no transform)", choices=("RNA", "ATAC", "counts")
    )
    min_features: int | None = option(
        None, "keep cells with at least this many features (RNA 600, ATAC 100, counts 0)"
    )
    min_cells: int = option(3, "keep features seen in at least this many cells")
    target_sum: float = option(10_000.0, "total that each cell is scaled to")
    n_top_features: int | None = option(
        None, "number of variable features (RNA 2000, ATAC 100000; 0 keeps all)"
    )
    genes: str | None = option(
        None, "file with one feature per line to use instead of variable features (absent ones are zero)"
    )
    flavor: str = option(
        "seurat", "how variable features are found", choices=("seurat", "cell_ranger", "seurat_v3")
    )
    hvg_batch: bool = option(True, "rank variable features within each batch, then combine")
    scale: str = option(
        "batch",
        "divide each feature by its maximum within the batch, over all cells, or not at all",
        choices=("batch", "global", "none"),
    )
    keep_mt: bool = option(False, "keep mitochondrial genes (MT-, mt-); ERCC spike-ins are always dropped")
    processed: bool = option(
        False, "the values are normalised already: no filter, no transform but the scaling"
    )
    obsm: str | None = option(
        None, "use this obsm matrix as the features instead of X (no preprocessing but the scaling)"
    )
    batches: tuple[str, ...] | None = option(None, "only these batches", many=True)
    where: str | None = option(
        None, "only cells for which this holds, such as \"study in ['pbmc3k', 'donorA']\""
    )
    allow_unmeasured: bool = option(False, "let a gene that some batch did not measure be a variable feature")
    memory: str = option("4GB", "memory that the work may use")
    threads: int = option(0, "threads (0: one per core)")


@dataclass(frozen=True)
class ScalexConfig:
    """SCALEX: network and loss (Xiong 2022; defaults as documented)."""

    n_latent: int = option(10, "dimensions of the latent")
    n_hidden: int = option(1024, "units of the encoder's hidden layer")
    kl_weight: float = option(0.5, "weight of the KL divergence")


@dataclass(frozen=True)
class TrainConfig:
    model: str = option("scalex", "which model", choices=("scalex",))
    max_iteration: int = option(30_000, "training steps; epochs = ceil(max_iteration / steps per epoch)")
    lr: float = option(2e-4, "learning rate of Adam")
    weight_decay: float = option(5e-4, "weight decay of Adam (L2)")
    minibatch_size: int = option(64, "cells per step")
    patience: int = option(10, "stop after this many epochs without a lower loss; the best epoch is restored")
    seed: int = option(124, "seed of weights, order and noise")
    device: str = option("auto", "cpu, cuda, cuda:1, or auto")
    norm: str = option(
        "domain",
        "statistics of the encoder's batch norm for the latents: running, domain (each batch's own, exact), "
        "minibatch (the original's)",
        choices=("running", "domain", "minibatch"),
    )
    memory: str = option("4GB", "memory that the loader may use")
    threads: int = option(0, "threads (0: one per core)")


@dataclass(frozen=True)
class ProjectConfig:
    layer: str | None = option(None, "what holds the counts: X (default), raw, or the name of a layer")
    modality: str | None = option(None, "modality of an h5mu file that holds the counts")
    batch_key: str | None = option(
        None, "obs column of the query that names its batches (default: each query is one batch)"
    )
    min_features: int | None = option(None, "cells below it get no latent (default: the reference's)")
    norm: str = option(
        "running", "statistics of the encoder's batch norm", choices=("running", "domain", "minibatch")
    )
    scale: str = option(
        "reference",
        "maxabs per gene from the reference, or estimated from the query itself",
        choices=("reference", "query"),
    )
    min_query_cells: int = option(200, "a query batch with fewer cells takes the reference's statistics")
    drop_filtered: bool = option(
        False, "leave cells below min_features out, instead of giving them a NaN latent"
    )
    strip_versions: bool = option(False, "drop the version from Ensembl ids")
    duplicate_genes: str = option(
        "error",
        "what to do with a gene name that occurs twice in a file",
        choices=("error", "first", "sum", "unique"),
    )
    allow_float: bool = option(False, "accept values that are no counts (normalised data)")
    on_error: str = option("stop", "a broken query stops the run, or is left out", choices=("stop", "skip"))
    device: str = option("auto", "cpu, cuda, cuda:1, or auto")
    memory: str = option("4GB", "memory that the work may use")
    threads: int = option(0, "threads (0: one per core)")


@dataclass(frozen=True)
class TransferConfig:
    label_key: str = option("cell_type", "obs column of the reference that holds the labels")
    method: str = option(
        "vote", "uniform vote (SCALEX) or distance-weighted k-NN (scArches)", choices=("vote", "weighted")
    )
    n_neighbors: int | None = option(None, "neighbours per cell (vote 5, weighted 50)")
    threshold: float | None = option(None, "uncertainty above which a cell stays Unknown")
    unlabeled: tuple[str, ...] = option(
        UNLABELED, "labels that mean none (missing ones always do)", many=True
    )
    index: str = option("auto", "neighbour search", choices=("auto", "exact", "nndescent"))
    probabilities: bool = option(False, "also write the probability of every label")
    truth_key: str | None = option(None, "obs column of the query with the true labels: report accuracy")
    seed: int = option(0, "seed of the neighbour index and of the recall sample")
    memory: str = option("4GB", "memory that the work may use")
    threads: int = option(0, "threads (0: one per core)")


@dataclass(frozen=True)
class MetricsConfig:
    label_key: str | None = option(None, "obs column with labels")
    batch_key: str | None = option(
        None, "obs column with batches (default: the one that the store was made with)"
    )
    truth_key: str | None = option(None, "obs column with true labels: accuracy of <label key>_pred")
    unlabeled: tuple[str, ...] = option(
        UNLABELED, "labels that mean none (missing ones always do)", many=True
    )
    max_cells: int = option(40_000, "above this many cells metrics are sampled, with a confidence interval")
    seed: int = option(0, "seed of all sampling")
    threads: int = option(0, "threads (0: one per core)")


def build(cls: Callable[..., Any], settings: dict[str, Any]) -> Any:
    """``cls(**settings)``, with an unknown name or choice as a :class:`UsageError`."""
    fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    for name, value in settings.items():
        if name not in fields:
            raise UsageError(f"unknown setting {name!r}", fix=f"one of {', '.join(sorted(fields))}")
        choices = fields[name].metadata.get("choices")
        if choices and value not in choices:
            raise UsageError(f"{name} = {value!r}", fix=f"one of {', '.join(choices)}")
    return cls(**settings)
