"""Settings of training and surgery, with every model's own defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamx.config.options import option

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


def _defaults(name: str) -> str:
    """How a setting's defaults read in its help."""
    found = {model: values[name] for model, values in TRAINING.items() if values.get(name) is not None}
    if len(set(found.values())) == 1:
        return f"default: {next(iter(found.values()))}" + ("" if len(found) > 1 else f", {next(iter(found))}")
    return "default: " + ", ".join(f"{model} {value:g}" for model, value in found.items())


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
