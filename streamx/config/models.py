"""Settings of the networks, of what surgery may move in them, and of what they are asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamx.config.options import option


@dataclass(frozen=True)
class ScalexConfig:
    """SCALEX: network and loss (Xiong 2022; defaults as documented)."""

    n_latent: int = option(10, "dimensions of the latent")
    n_hidden: int = option(1024, "units of the encoder's hidden layer")
    kl_weight: float = option(0.5, "weight of the KL divergence")


# What scArches sets so that a reference can be extended by surgery (scvi, scanvi).
ARCHES: dict[str, Any] = {
    "n_layers": 2,
    "encode_covariates": True,
    "deeply_inject_covariates": False,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}


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


# The settings of each model's network.
NETWORKS: dict[str, type] = {
    "scalex": ScalexConfig,
    "scvi": ScviConfig,
    "scanvi": ScanviConfig,
    "totalvi": TotalviConfig,
    "trvae": TrvaeConfig,
}
