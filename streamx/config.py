"""Every setting that a user can change, with its default and its help: the one place where they live.

The command line is generated from these classes; the Python functions take them field by field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from streamx.errors import UsageError

UNLABELED = ("", "unknown", "Unknown")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    many: bool = False,
    least: float | None = None,
) -> Any:
    """A dataclass field that carries its help, what it may be, and whether the command line takes several."""
    return field(default=default, metadata={"help": help, "choices": choices, "many": many, "least": least})


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
        "for a single file its column `batch`; _streamx_file: one per file also then)",
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
    seed: int = option(0, "seed of the order of rows inside each batch", least=0)
    memory: str = option("4GB", "memory that the work may use")
    threads: int = option(0, "threads (0: one per core)", least=0)


@dataclass(frozen=True)
class SimulateConfig:
    n_cells: int = option(100_000, "number of cells")
    n_genes: int = option(2000, "number of genes (or peaks)")
    n_batches: int = option(8, "number of batches")
    n_types: int = option(12, "number of cell types")
    batch_effect: float = option(
        0.3, "standard deviation of a batch's factor per gene, in logarithms; 0 for none"
    )
    depth: int = option(260, "median transcripts (fragments) per cell; the tail is long")
    features: str = option(
        "genes", "genes; or peaks of the same cells, for the same seed", choices=("genes", "peaks")
    )
    n_proteins: int = option(0, "number of surface proteins, in obsm protein_expression")
    n_columns: int = option(0, "number of further obs columns, of random numbers and texts")
    format: str = option(
        "store", "one streamx store, or a folder with one h5ad per batch", choices=("store", "h5ad")
    )
    shard_rows: int = option(ConvertConfig.shard_rows, "cells per shard, at most")
    seed: int = option(0, "seed; with the other settings above it decides every count")
    memory: str = option("4GB", "memory that the work may use")
    threads: int = option(0, "threads (0: one per core)")


@dataclass(frozen=True)
class ActivityConfig:
    genes: str | None = option(
        None, "annotation of the genes: .gtf, .gff3 or .bed (name in column 4, strand in 6), plain or .gz"
    )
    peak_genes: str | None = option(
        None, "table with columns gene and peak (tsv or csv, plain or .gz), instead of --genes or beside it"
    )
    upstream: int = option(
        2000, "bases before a gene's start, by its strand, whose peaks count for it", least=0
    )
    body: bool = option(True, "peaks in the gene's body count too")
    attribute: str = option(
        "gene_name", "attribute of GTF or GFF3 that names a gene (gene_id where it is absent)"
    )
    memory: str = option("4GB", "memory that the work may use")
    threads: int = option(0, "threads (0: one per core)", least=0)


@dataclass(frozen=True)
class PreprocessConfig:
    profile: str = option(
        "RNA",
        "RNA, ATAC, ADT (proteins: each cell's centred log ratio), or counts (select features, no transform)",
        choices=("RNA", "ATAC", "ADT", "counts"),
    )
    min_features: int | None = option(
        None, "keep cells with at least this many features (RNA 600, ATAC 100, others 0)"
    )
    min_cells: int = option(3, "keep features seen in at least this many cells")
    target_sum: float = option(10_000.0, "total that each cell is scaled to")
    n_top_features: int | None = option(
        None, "number of variable features (RNA 2000, ATAC 100000, others all; 0 keeps all)"
    )
    genes: str | None = option(
        None, "file with one feature per line to use instead of variable features (absent ones are zero)"
    )
    flavor: str = option(
        "seurat", "how variable features are found", choices=("seurat", "cell_ranger", "seurat_v3")
    )
    hvg_batch: bool = option(True, "rank variable features within each batch, then combine")
    atac: str = option(
        "0.2.0",
        "which of SCALEX's ATAC recipes, by release: 0.2.0 (ones, peaks open in half of the cells, scaled "
        "per cell), 1.0.2 (ones), 1.0.4 (log-normalised)",
        choices=("0.2.0", "1.0.2", "1.0.4"),
    )
    scale: str | None = option(
        None,
        "divide each feature by its maximum within the batch, over all cells, or not at all (default: batch; "
        "global with processed, obsm and ATAC 1.0.4)",
        choices=("batch", "global", "none"),
    )
    keep_mt: bool = option(False, "keep mitochondrial genes (MT-, mt-); ERCC spike-ins are always dropped")
    processed: bool = option(
        False, "the values are normalised already: no filter, no transform but the scaling"
    )
    obsm: str | None = option(
        None,
        "use this obsm matrix as the features instead of X (no preprocessing but the scaling; but ADT's)",
    )
    batches: tuple[str, ...] | None = option(None, "only these batches", many=True)
    where: str | None = option(
        None, "only cells for which this holds, such as \"study in ['pbmc3k', 'donorA']\""
    )
    allow_unmeasured: bool = option(False, "let a gene that some batch did not measure be a variable feature")
    memory: str = option("4GB", "memory that the work may use")
    threads: int = option(0, "threads (0: one per core)", least=0)


@dataclass(frozen=True)
class ScalexConfig:
    """SCALEX: network and loss (Xiong 2022; defaults as documented)."""

    n_latent: int = option(10, "dimensions of the latent")
    n_hidden: int = option(1024, "units of the encoder's hidden layer")
    kl_weight: float = option(0.5, "weight of the KL divergence")


# What a training setting that is left out means, model by model. The count models' values are those that
# scvi-tools and scArches document; of epochs, "by size" is min(400, round(20000 / cells x 400)).
TRAINING: dict[str, dict[str, Any]] = {
    "scalex": {
        "max_iteration": 30_000,
        "max_epochs": None,
        "minibatch_size": 64,
        "lr": 2e-4,
        "weight_decay": 5e-4,
        "patience": 10,
        "norm": "matched",
    },
    "scvi": {
        "max_iteration": None,
        "max_epochs": None,  # by size
        "minibatch_size": 128,
        "lr": 1e-3,
        "eps": 0.01,
        "weight_decay": 1e-6,
        "patience": 0,
        "threshold": 0.0,
        "lr_patience": 0,
        "lr_factor": 0.5,
        "train_size": 0.9,
        "warmup_epochs": 400,
        "warmup_steps": None,
        "sampling": "shuffled",
    },
}
TRAINING["scanvi"] = TRAINING["scvi"] | {"base_epochs": None}
TRAINING["totalvi"] = TRAINING["scvi"] | {
    "max_epochs": 400,
    "minibatch_size": 256,
    "lr": 4e-3,
    "patience": 45,
    "lr_patience": 30,
    "lr_factor": 0.6,
    "warmup_epochs": None,  # by steps: three quarters of the number of cells
}
TRAINING["trvae"] = TRAINING["scvi"] | {
    "max_epochs": 400,
    "weight_decay": 0.04,
    "patience": 20,
    "lr_patience": 7,
    "lr_factor": 0.1,
    "warmup_epochs": 0,
    "sampling": "balanced",
}
# What scArches sets so that a reference can be extended by surgery (scvi, scanvi).
ARCHES: dict[str, Any] = {
    "n_layers": 2,
    "encode_covariates": True,
    "deeply_inject_covariates": False,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}


def _defaults(name: str) -> str:
    """How a setting's defaults read in its help."""
    found = {model: values[name] for model, values in TRAINING.items() if values.get(name) is not None}
    if len(set(found.values())) == 1:
        return f"default: {next(iter(found.values()))}" + ("" if len(found) > 1 else f", {next(iter(found))}")
    return "default: " + ", ".join(f"{model} {value:g}" for model, value in found.items())


@dataclass(frozen=True)
class ScviConfig:
    """scVI: network and loss (Lopez 2018; names and defaults as scvi-tools documents them)."""

    n_hidden: int = option(128, "units of each hidden layer", least=1)
    n_latent: int = option(10, "dimensions of the latent", least=1)
    n_layers: int = option(1, "hidden layers of the encoder and of the decoder", least=1)
    dropout_rate: float = option(0.1, "share of the encoder's units dropped while training", least=0)
    dispersion: str = option(
        "gene",
        "inverse dispersion: one per gene, per gene and batch, per gene and label, or for each value",
        choices=("gene", "gene-batch", "gene-label", "gene-cell"),
    )
    gene_likelihood: str = option("zinb", "distribution of the counts", choices=("zinb", "nb", "poisson"))
    latent_distribution: str = option(
        "normal", "latent: normal, or its softmax (ln)", choices=("normal", "ln")
    )
    log_variational: bool = option(True, "the encoder sees ln(1 + x)")
    encode_covariates: bool = option(False, "the encoder sees the batch and the covariates too")
    deeply_inject_covariates: bool = option(True, "covariates enter every layer, not the first alone")
    use_batch_norm: str = option(
        "both", "where batch norm is", choices=("both", "encoder", "decoder", "none")
    )
    use_layer_norm: str = option(
        "none", "where layer norm is", choices=("both", "encoder", "decoder", "none")
    )
    use_observed_lib_size: bool = option(True, "a cell's library size is its sum, not a latent variable")


@dataclass(frozen=True)
class TotalviConfig:
    """totalVI: network and loss (Gayoso 2021; names and sizes as scvi-tools documents them).

    The last four settings are what releases of scvi-tools differ in; a checkpoint's release decides them.
    """

    n_latent: int = option(20, "dimensions of the latent", least=1)
    n_hidden: int = option(256, "units of every hidden layer", least=1)
    n_layers_encoder: int = option(2, "hidden layers of the encoder", least=1)
    n_layers_decoder: int = option(1, "hidden layers of each part of the decoder", least=1)
    dropout_rate_encoder: float = option(0.2, "share of hidden units dropped in the encoder", least=0)
    dropout_rate_decoder: float = option(0.2, "share of hidden units dropped in the decoder", least=0)
    gene_dispersion: str = option(
        "gene", "what a gene's dispersion depends on", choices=("gene", "gene-batch", "gene-label")
    )
    protein_dispersion: str = option(
        "protein",
        "what a protein's dispersion depends on",
        choices=("protein", "protein-batch", "protein-label"),
    )
    gene_likelihood: str = option("nb", "distribution of gene counts", choices=("nb", "zinb"))
    latent_distribution: str = option("normal", "normal, or logistic normal", choices=("normal", "ln"))
    encode_covariates: bool = option(True, "the encoder sees the batch and other covariates")
    use_observed_lib_size: bool = option(True, "a cell's library is its total, not a latent variable")
    log_variational: bool = option(True, "the encoder takes logarithms, ln(1 + x)")
    use_batch_norm: str = option(
        "both", "where hidden layers have a batch norm", choices=("encoder", "decoder", "none", "both")
    )
    use_layer_norm: str = option(
        "none", "where hidden layers have a layer norm", choices=("encoder", "decoder", "none", "both")
    )
    input_transform: str = option(
        "log1p",
        "what the encoder sees of counts x: log1p (ln(1 + x)), or scaled (x over 1 + the cell's mean first; "
        "scvi-tools from 1.3.1 on)",
        choices=("log1p", "scaled"),
    )
    background_activation: str = option(
        "softplus",
        "what makes the background's standard deviation positive: softplus, or exp (scvi-tools before 1.2)",
        choices=("softplus", "exp"),
    )
    per_batch_efficiency: bool = option(
        False, "a factor per protein and batch on the protein means (scvi-tools from 1.3.1 on)"
    )
    protein_warmup: bool = option(
        False, "the weight of the KL divergence also weights the protein counts (scvi-tools from 1.3.1 on)"
    )


@dataclass(frozen=True)
class ScanviConfig(ScviConfig):
    """scANVI: scVI's settings, and what it adds (Xu 2021; names and defaults as scvi-tools has them)."""

    linear_classifier: bool = option(False, "the classifier of labels is a single linear layer")
    classification_ratio: float = option(50.0, "weight of the classification in the loss", least=0)
    logits: bool = option(
        True,
        "the classifier gives logits; without, as before scvi-tools 1.1, the cross-entropy takes the softmax "
        "of probabilities",
    )


@dataclass(frozen=True)
class DifferentialConfig:
    """Differential expression by a model (Lopez 2018, Boyeau 2019; defaults as documented)."""

    mode: str = option(
        "change",
        "change (fold changes of at least delta) or vanilla (more in the first group)",
        choices=("change", "vanilla"),
    )
    delta: float | None = option(
        0.25, "log2 fold change that counts as one (none: found from the changes' distribution)", least=0
    )
    pseudocount: float | None = option(
        0.0,
        "added to scales before fold changes are taken (none: found from genes without counts, as scvi-tools "
        "does from 1.0 on)",
        least=0,
    )
    silent_below: float = option(0.01, "mean count below which a gene has no counts", least=0)
    test_mode: str = option(
        "two",
        "either direction counts together, or the more probable of the two (three; scvi-tools from 1.0 on)",
        choices=("two", "three"),
    )
    n_samples: int = option(5000, "posterior draws per group", least=2)
    m_permutation: int | None = option(
        None, "random pairs of draws (default: the draws as they came)", least=1
    )
    fdr_target: float = option(0.05, "expected share of false discoveries among the called", least=0)
    intervals: tuple[float, ...] = option(
        (), "levels of highest-density intervals of fold changes", many=True
    )
    batch_correction: bool = option(False, "decode the cells of both groups as the same batches")
    relative_to: str = option(
        "total",
        "what a gene's expression is relative to: total (its share of the cell, as documented), or median "
        "(the median gene's change counts as none: a large rise of some is no fall of all others)",
        choices=("total", "median"),
    )
    cells_per_draw: int = option(
        1, "1: cells are compared one by one, as documented; more: means of so many", least=1
    )
    seed: int = option(0, "seed of draws and pairs", least=0)


@dataclass(frozen=True)
class FreezeConfig:
    """What stays as it is while a reference model learns new batches (scArches; defaults as scvi-tools')."""

    unfrozen: bool = option(False, "nothing stays: all weights move, whatever the other options say")
    freeze_dropout: bool = option(False, "no dropout while training")
    freeze_expression: bool = option(True, "the encoder's weights on genes stay")
    freeze_decoder_first_layer: bool = option(True, "the decoder's first layer stays")
    freeze_batchnorm_encoder: bool = option(True, "the encoder's batch norms stay")
    freeze_batchnorm_decoder: bool = option(False, "the decoder's batch norms stay")
    freeze_classifier: bool = option(True, "the classifier of labels stays (scANVI)")
    freeze_dispersion: bool = option(
        False, "a new batch's dispersion stays as drawn, as in scvi-tools (gene-batch only)"
    )


@dataclass(frozen=True)
class TrvaeConfig:
    """trVAE's network, in the words of scArches (documented signature)."""

    hidden_layer_sizes: tuple[int, ...] = option(
        (256, 64), "units of the encoder's layers; the decoder's are the same backwards", many=True
    )
    latent_dim: int = option(10, "dimensions of the latent space", least=1)
    dr_rate: float = option(0.05, "share of units dropped while training", least=0)
    use_mmd: bool = option(True, "draw the batches together by their maximum mean discrepancy")
    mmd_on: str = option(
        "z", "discrepancy of the latents (z) or of the decoder's first layer (y)", choices=("z", "y")
    )
    mmd_boundary: int | None = option(
        None, "compare the first so many batches with the later ones only (default: all pairs)", least=1
    )
    recon_loss: str = option(
        "nb",
        "likelihood of the counts: nb, zinb; or mse (squared error of ln(1 + x)), for normalised values too",
        choices=("mse", "nb", "zinb"),
    )
    beta: float = option(1.0, "weight of the discrepancy", least=0)
    use_bn: bool = option(False, "batch norm after each layer, instead of layer norm")
    use_ln: bool = option(True, "layer norm after each layer")
    size_factor: str = option(
        "sum",
        "a cell's size factor: sum of its counts, or (log_sum) its logarithm as in scArches of December 2020",
        choices=("sum", "log_sum"),
    )
    log_input: bool = option(
        True, "with mse: take ln(1 + x); off, x is fitted as it is, as by scArches since 2021"
    )


@dataclass(frozen=True)
class TrvaeFreezeConfig:
    """What stays as it is while a trVAE model learns new batches (scArches' ``load_query_data``)."""

    freeze: bool = option(True, "all weights but the batches' own stay; off, all move")
    freeze_expression: bool = option(True, "the first layers' weights, but for the batches' own, stay too")
    remove_dropout: bool = option(True, "no dropout while training")


@dataclass(frozen=True)
class TrainConfig:
    # Typed as they are once `train` has filled in what was left out.
    model: str = option("scalex", "which model", choices=tuple(TRAINING))
    label_key: str | None = option(None, "obs column with labels (scanvi; scvi with dispersion gene-label)")
    unlabeled: str = option("Unknown", "label that means none (missing ones always do)")
    category_keys: tuple[str, ...] = option((), "further categorical covariates: obs columns", many=True)
    continuous_keys: tuple[str, ...] = option((), "continuous covariates: obs columns", many=True)
    protein_key: str = option("protein_expression", "obsm matrix of protein counts (totalvi)")
    empirical_prior: bool | None = option(
        None,
        "totalvi: begin the prior of the proteins' background from mixtures fitted to a few cells (default: "
        "with more than ten proteins)",
    )
    arches: bool = option(
        False,
        "scArches' settings of the network, for references that surgery extends: two layers, layer norm, "
        "the encoder sees the batch (scvi, scanvi)",
    )
    init: str | None = option(
        None, "a model to begin from: scanvi from a trained scvi, any model from one of its own kind"
    )
    max_iteration: int | None = option(
        None,
        "training steps; epochs = ceil(max_iteration / steps per epoch) (default: scalex 30000, "
        "others by --max-epochs)",
        least=1,
    )
    max_epochs: int | None = option(
        None,
        "epochs (default: totalvi, trvae 400; scvi by size: 400 up to 20,000 cells; scanvi 10, or a third of "
        "the base's)",
        least=1,
    )
    lr: float = option(None, f"learning rate of Adam ({_defaults('lr')})")
    eps: float | None = option(None, "eps of Adam (count models; default: 0.01)")
    weight_decay: float = option(None, f"weight decay of Adam (L2) ({_defaults('weight_decay')})")
    minibatch_size: int = option(None, f"cells per minibatch ({_defaults('minibatch_size')})")
    accumulate: int = option(1, "minibatches per step; a step follows their mean gradient")
    patience: int = option(
        None,
        "stop after this many epochs without a lower loss, and restore the best epoch; 0: train all epochs, "
        f"keep the last ({_defaults('patience')}). Count models go by the validation cells' loss",
        least=0,
    )
    threshold: float | None = option(None, "a loss is lower if lower by more than this (default: 0)", least=0)
    lr_patience: int | None = option(
        None,
        "lower the learning rate after more than so many epochs without (0: never; "
        f"{_defaults('lr_patience')})",
    )
    lr_factor: float | None = option(None, f"... by this factor ({_defaults('lr_factor')})")
    train_size: float | None = option(
        None, "share of the cells to train on; the others validate (default: scalex 1, others 0.9)"
    )
    warmup_epochs: int | None = option(
        None, f"epochs in which the weight of the KL divergence rises to 1 ({_defaults('warmup_epochs')})"
    )
    warmup_steps: int | None = option(
        None, "... or steps (default: totalvi three quarters of the number of cells)"
    )
    sampling: str | None = option(
        None,
        "shuffled: every cell once per epoch; balanced: every batch equally often, with replacement "
        "(default: trvae balanced, others shuffled)",
        choices=("shuffled", "balanced"),
    )
    base_epochs: int | None = option(
        None, "epochs of scVI that come before scANVI's own (default: by size; 0 or --init: none)", least=0
    )
    seed: int = option(124, "seed of weights, order and noise")
    checkpoint_seconds: float = option(30.0, "seconds between checkpoints, at least")
    device: str = option("auto", "cpu, cuda, cuda:1, or auto")
    precision: str = option(
        "float32",
        "arithmetic of the network: float32, or on a GPU bfloat16 (weights and losses stay float32)",
        choices=("float32", "bfloat16"),
    )
    graph: str = option(
        "auto",
        "record a training step once and replay it, which spares the host launching its operations: auto "
        "(with one process on a GPU; all models but trvae), on, off",
        choices=("auto", "on", "off"),
    )
    norm: str | None = option(
        None,
        "of SCALEX, statistics of the encoder's batch norm for the latents: matched (each batch moved to "
        "what the reference has at its composition), running, domain (each batch's own, exact), minibatch "
        "(the original's) (default: matched)",
        choices=("matched", "running", "domain", "minibatch"),
    )
    memory: str = option("4GB", "memory that the loader may use")
    threads: int = option(0, "threads that read ahead (0: one per core); training itself uses one", least=0)


@dataclass(frozen=True)
class SurgeryConfig:
    batch_key: str | None = option(
        None, "obs column of the query that names its batches (default: each file is one batch)"
    )
    layer: str | None = option(None, "what holds the counts: X (default), raw, or the name of a layer")
    modality: str | None = option(None, "modality of an h5mu file that holds the counts")
    min_features: int | None = option(None, "cells below it are left out (default: the reference's)", least=0)
    new_labels: str = option(
        "refuse",
        "labels of the query that the reference does not know (where it knows any): refuse, or keep them in "
        "obs, unlabelled for the classifier",
        choices=("refuse", "keep"),
    )
    mask_missing: bool = option(
        False,
        "leave genes that a file lacks out of its likelihood, instead of taking them as zero (as scArches "
        "does); to be recommended: latents come out a seventh nearer to those with all genes. The encoder "
        "takes them as zero either way",
    )
    refit: bool = option(
        False,
        "a batch that was added before is learnt anew, on all its cells so far (default: its new cells are "
        "only projected)",
    )
    max_epochs: int | None = option(
        None, "epochs for each new batch (default: by its size, 400 up to 20,000 cells)", least=1
    )
    lr: float = option(None, "learning rate of Adam (default: the model's)")
    minibatch_size: int = option(None, "cells per minibatch (default: the model's)", least=1)
    patience: int = option(None, "of early stopping (default: the model's)", least=0)
    train_size: float | None = option(None, "share of the cells to train on (default: the model's)")
    warmup_epochs: int | None = option(None, "of the KL divergence (default: the model's)", least=0)
    strip_versions: bool = option(False, "drop the version from Ensembl ids")
    duplicate_genes: str = option(
        "error",
        "what to do with a gene name that occurs twice in a file",
        choices=("error", "first", "sum", "unique"),
    )
    on_error: str = option("stop", "a broken file stops the run, or is left out", choices=("stop", "skip"))
    seed: int = option(124, "seed of the new weights, order and noise", least=0)
    checkpoint_seconds: float = option(30.0, "seconds between checkpoints, at least")
    device: str = option("auto", "cpu, cuda, cuda:1, or auto")
    memory: str = option("4GB", "memory that the work may use")
    threads: int = option(0, "threads (0: one per core); training itself uses one", least=0)


# The settings of each model's network.
NETWORKS: dict[str, type] = {
    "scalex": ScalexConfig,
    "scvi": ScviConfig,
    "scanvi": ScanviConfig,
    "totalvi": TotalviConfig,
    "trvae": TrvaeConfig,
}


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
        50_000, "above this many cells metrics are sampled, with a confidence interval", least=1
    )
    resolution: str = option(
        "best", "Leiden resolution for NMI and ARI, or best: of 0.1, 0.2, ..., 2.0 the one with the best NMI"
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
    metrics: bool = option(True, "score mixing and labels, unless the job has scored each query")
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
    batch_size: int = option(TRAINING["scalex"]["minibatch_size"], "cells per training step")
    lr: float = option(TRAINING["scalex"]["lr"], "learning rate")
    max_iteration: int = option(TRAINING["scalex"]["max_iteration"], "training steps")
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


@dataclass(frozen=True)
class PublishConfig:
    sandbox: bool = option(False, "Zenodo's sandbox, where records may be tried out")
    draft: bool = option(False, "stop before publishing, which can't be undone")
    name: str | None = option(None, "name of the archive (default: the folder's)")
    title: str | None = option(None, "title of the record (default: name and kind of the model)")
    description: str | None = option(None, "description, HTML (default: the model's card)")
    creator: tuple[str, ...] = option((), 'who made it, such as "Doe, Jane"', many=True)
    license: str = option("cc-by-4.0", "licence, by its name on Zenodo")
    upload_type: str = option(
        "dataset", "what Zenodo files it as", choices=("dataset", "software", "publication", "other")
    )
    token_file: str | None = option(
        None,
        "file with the access token (default: ZENODO_TOKEN or ZENODO_SANDBOX_TOKEN in the environment)",
    )
    timeout: float = option(60.0, "seconds without an answer or another byte", least=0.1)
    retry_seconds: float = option(
        120.0, "seconds for which a failing request is repeated, ever more slowly", least=0
    )


@dataclass(frozen=True)
class FetchConfig:
    sandbox: bool = option(PublishConfig.sandbox, "the DOI or number is of Zenodo's sandbox")
    file: str | None = option(None, "the record's file that holds the model (default: its only archive)")
    limit: str = option("50GB", "bytes that the unpacked model may have")
    token_file: str | None = option(
        None, "file that holds the access token, for records that are not open (default: the environment's)"
    )
    timeout: float = option(PublishConfig.timeout, "seconds without an answer or another byte", least=0.1)
    retry_seconds: float = option(
        PublishConfig.retry_seconds, "seconds for which a failing request is repeated", least=0
    )


@dataclass(frozen=True)
class BucketConfig:
    """How to reach a bucket; what is None is taken from the usual environment variables."""

    endpoint: str | None = option(None, "URL of the service, where it is not the provider's own")
    region: str | None = option(None, "region of the bucket (S3)")
    anonymous: bool | None = option(None, "send no credentials: public buckets")
    allow_http: bool | None = option(None, "without TLS (default: where the endpoint says http://)")
    timeout: float = option(60.0, "seconds without an answer or another byte (of an upload: five times that)")
    retry_seconds: float = option(120.0, "seconds for which a failing request is repeated, ever more slowly")
    concurrency: int = option(16, "requests of one read that are under way at once")
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)  # obstore's own, such as keys


def build(cls: Callable[..., Any], settings: dict[str, Any]) -> Any:
    """``cls(**settings)``; an unknown name or choice, or a number too small, is a :class:`UsageError`.

    A single text for a setting of many is one of them, and not its letters.
    """
    fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    many = [name for name, value in settings.items() if isinstance(value, str) and name in fields]
    many = [name for name in many if fields[name].metadata.get("many")]
    settings = settings | {name: (settings[name],) for name in many}
    for name, value in settings.items():
        if name not in fields:
            raise UsageError(f"unknown setting {name!r}", fix=f"one of {', '.join(sorted(fields))}")
        choices = fields[name].metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise UsageError(f"{name} = {value!r}", fix=f"one of {', '.join(choices)}")
        least = fields[name].metadata.get("least")
        if isinstance(value, float) and not isfinite(value):
            raise UsageError(f"{name} = {value}", fix="a finite number")
        if least is not None and value is not None and value < least:
            raise UsageError(f"{name} = {value}", fix=f"at least {least:g}")
    return cls(**settings)
