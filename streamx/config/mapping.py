"""Settings of what is done with a trained model: project, transfer, metrics, map, plot, report, integrate."""

from __future__ import annotations

from dataclasses import dataclass

from streamx.config.data import ConvertConfig, PreprocessConfig
from streamx.config.options import UNLABELED, option
from streamx.config.training import TRAINING, TrainConfig


@dataclass(frozen=True)
class ProjectConfig:
    layer: str | None = option(None, "what holds the counts: X (default), raw, or the name of a layer")
    modality: str | None = option(None, "modality of an h5mu file that holds the counts")
    obsm: str | None = option(
        None, "use this obsm matrix of the query as its features instead of X, for a reference made of such"
    )
    batch_key: str | None = option(
        None, "obs column of the query that names its batches (default: each query is one batch)"
    )
    min_features: int | None = option(None, "cells below it get no latent (default: the reference's)")
    norm: str | None = option(
        None,
        "statistics of the encoder's batch norm: matched (each query batch moved to what the reference has "
        "at its composition), running (the reference's), domain (its own), minibatch (the original's) "
        "(default: matched; minibatch for a checkpoint of SCALEX)",
        choices=("matched", "running", "domain", "minibatch"),
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
    threads: int = option(0, "threads (0: one per core)", least=0)


@dataclass(frozen=True)
class TransferConfig:
    label_key: str = option("cell_type", "obs column of the reference that holds the labels")
    within: tuple[str, ...] = option(
        (),
        "obs columns with coarser labels, coarsest first: transferred too, and a label lies within them",
        many=True,
    )
    method: str = option(
        "vote", "uniform vote (SCALEX) or distance-weighted k-NN (scArches)", choices=("vote", "weighted")
    )
    n_neighbors: int | None = option(None, "neighbours per cell (vote 5, weighted 50)")
    threshold: float | None = option(None, "uncertainty above which a cell stays Unknown")
    keep: float | None = option(
        None, "instead of a threshold: the share of held-out reference cells that shall keep a label"
    )
    max_error: float | None = option(
        None, "instead of a threshold: the share of wrong ones that held-out reference cells may have"
    )
    novelty: bool = option(False, "also write how strange each cell is to the reference, 0 to 1")
    unlabeled: tuple[str, ...] = option(
        UNLABELED, "labels that mean none (missing ones always do)", many=True
    )
    index: str = option("auto", "neighbour search", choices=("auto", "exact", "ivf", "nndescent"))
    probabilities: bool = option(False, "also write the probability of every label")
    truth_key: str | None = option(None, "obs column of the query with the true labels: report accuracy")
    seed: int = option(0, "seed of the neighbour index and of the recall sample", least=0)
    memory: str = option("4GB", "memory that the work may use")
    threads: int = option(0, "threads (0: one per core)", least=0)


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
    max_cells: int = option(
        50_000, "above this many cells metrics are sampled, with a confidence interval", least=10
    )
    resolution: str = option(
        "best", "Leiden resolution for NMI and ARI, or best: of 0.1, 0.2, ..., 2.0 the one with the best NMI"
    )
    card: bool = option(
        False, "keep the reference's scores in the model's card, which `info` shows and `publish` takes along"
    )
    seed: int = option(0, "seed of all sampling", least=0)
    threads: int = option(0, "threads (0: one per core)", least=0)


@dataclass(frozen=True)
class MapConfig:
    """A mapping job; what its steps do is said by the settings of each."""

    label_key: str | None = option(
        None, "obs column of the reference whose labels every query gets (default: none)"
    )
    surgery: str = option(
        "none",
        "none (project the queries), per-query (first extend the reference by the batches of each query, one "
        "model per query) or incremental (by all queries in order, one model)",
        choices=("none", "per-query", "incremental"),
    )
    metrics: bool = option(True, "score how each query mixes with the reference")
    workers: int = option(1, "processes that work at once", least=1)
    memory: str = option("4GB", "memory that each of them may use")
    threads: int = option(1, "threads of each of them (0: one per core)", least=0)


@dataclass(frozen=True)
class PlotConfig:
    color: tuple[str, ...] = option(
        (), "obs columns to colour the cells by (default: the batch, and the labels where given)", many=True
    )
    label_key: str | None = option(
        None, "obs column with labels: also the confusion of <label key>_pred, and correlations of meta-cells"
    )
    batch_key: str | None = option(
        None, "obs column with batches (default: the one that the store was made with)"
    )
    format: str = option("png", "format of the figures", choices=("png", "pdf", "svg"))
    n_neighbors: int = option(30, "neighbours in the graph that the UMAP is made from", least=2)
    min_dist: float = option(0.1, "how closely the UMAP packs cells", least=0)
    umap: str = option(
        "reference",
        "fit the UMAP on the reference, whose picture then stays as it is while queries are placed into it; "
        "or on all cells together (joint), which shows what no reference cell is like",
        choices=("reference", "joint"),
    )
    max_cells: int = option(
        100_000,
        "the UMAP is fitted on at most this many cells, drawn by batch and label; the others are placed "
        "from their neighbours",
        least=10,
    )
    seed: int = option(0, "seed of the UMAP and of the sketch that it is fitted on", least=0)
    threads: int = option(0, "threads (0: one per core)", least=0)


@dataclass(frozen=True)
class ReportConfig:
    model: str | None = option(
        None, "folder of the reference (default: where the job of `map` says that it is)"
    )
    label_key: str | None = option(None, "the labels that were transferred (default: those that there are)")
    truth_key: str | None = option(
        None, "obs column of the queries with the given labels (default: the label key, where they have it)"
    )
    batch_key: str | None = option(
        None, "obs column with batches (default: the one that the store was made with)"
    )
    metrics: bool = option(True, "score mixing and labels of the reference and all queries together")
    max_cells: int = option(30_000, "draw at most this many cells, half of them of the reference", least=100)
    seed: int = option(0, "seed of the cells that are drawn, of the UMAP, and of sampled metrics", least=0)
    threads: int = option(0, "threads (0: one per core)", least=0)


@dataclass(frozen=True)
class IntegrateConfig:
    """SCALEX's one call, in its own words and with its own defaults (documented signature)."""

    batch_categories: tuple[str, ...] | None = option(
        None, "names of the batches, one per file (default: 0, 1, ...)", many=True
    )
    profile: str = option(PreprocessConfig.profile, "kind of data", choices=("RNA", "ATAC"))
    batch_name: str = option(
        "batch", "obs column that holds the batches, or several joined by commas; copied into `batch`"
    )
    min_features: int | None = option(
        600, "keep cells with at least this many features (ATAC, if not given: 100)"
    )
    min_cells: int = option(PreprocessConfig.min_cells, "keep features seen in at least this many cells")
    target_sum: float | None = option(None, "total that each cell is scaled to (10000)")
    n_top_features: str | None = option(
        None, "number of variable features (RNA 2000, ATAC 100000; 0 keeps all), or a file with one per line"
    )
    join: str = option(ConvertConfig.join, "genes of all files, or of any", choices=("inner", "outer"))
    batch_key: str = option("batch", "obs column under which the files are recorded when they are joined")
    processed: bool = option(False, "the data are preprocessed already: only scale them")
    fraction: float | None = option(None, "take this share of the cells, at random")
    n_obs: int | None = option(None, "take this many cells, at random")
    use_layer: str = option("X", "layer or obsm matrix to use instead of X; it is only scaled")
    backed: bool = option(False, "accepted; data are always streamed")
    batch_size: int = option(TRAINING["scalex"]["minibatch_size"], "cells per training step", least=1)
    lr: float = option(TRAINING["scalex"]["lr"], "learning rate")
    max_iteration: int = option(TRAINING["scalex"]["max_iteration"], "training steps", least=1)
    seed: int = option(TrainConfig.seed, "seed")
    gpu: int = option(0, "number of the GPU, if there is one")
    outdir: str | None = option(None, "folder for the results")
    projection: str | None = option(None, "folder of a finished run: map the data onto it without training")
    repeat: bool = option(False, "with projection: return the new cells alone, without the reference's")
    impute: str | None = option(None, "batch as which expression is imputed into layers['impute']")
    chunk_size: int = option(20_000, "cells that are read at a time")
    ignore_umap: bool = option(False, "no UMAP, no Leiden clusters, no figure")
    verbose: bool = option(False, "say more")
    assess: bool = option(False, "score batch mixing and, with obs celltype, silhouette on the UMAP")
    show: bool = option(True, "show the figure (only in a notebook)")
    eval: bool = option(False, "latents by the batch norm's running statistics, as in evaluation mode")
    num_workers: int = option(4, "accepted; threads prefetch")
