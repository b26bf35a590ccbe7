"""Settings of stores and views: convert, simulate, preprocess, activity; of buckets, and of sharing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamx.config.options import option


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
    checksum: str | None = option(
        None, "that the archive must have: md5:... or sha256:... (default: the one that Zenodo says)"
    )
    limit: str = option("50GB", "bytes that the archive may have, and the unpacked model")
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
