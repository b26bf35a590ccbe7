"""Gene activity: the counts of the peaks in a gene's body and upstream of it, added up; store -> store.

Which peak counts for which gene is a sparse matrix, decided from names alone; the counts then stream through
it. With genes instead of peaks, ATAC cells can be integrated with RNA (SCALEX's recipe for two modalities).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from streamx.config import ActivityConfig, build, parse_bytes
from streamx.errors import GeneError, UsageError, warn
from streamx.memory import steady_memory
from streamx.preprocess.annotation import (
    Regions,
    chromosome_key,
    peak_key,
    read_annotation,
    read_gene_peaks,
    read_peaks,
)
from streamx.preprocess.view import view_modalities
from streamx.store import genes as gene_axis
from streamx.store.collection import Collection, open_collection
from streamx.store.columns import gathered, lay_collection
from streamx.store.journal import Journal
from streamx.store.location import Location, crc32c, open_location
from streamx.store.manifest import FORMAT
from streamx.store.needs import Needs, Sample, needs_of
from streamx.store.order import row_order
from streamx.store.pack import Content, start, write_part
from streamx.store.spill import Slab
from streamx.threads import thread_count

log = logging.getLogger("streamx")

BYTES_PER_VALUE = 48  # of a slab while it is read, and per value that it becomes
MAX_SLAB_ROWS = 1 << 13
# what an append to a store asks of the settings that it was made with
_OF_STORE = ("batch_key", "batches_are_files", "preset", "seed", "strip_versions")


# -- which peak counts for which gene --------------------------------------------------------------------


@dataclass(frozen=True)
class Links:
    """Peaks of genes.

    Attributes
    ----------
    map_pg
        int64 (n_peaks, n_genes), 1 where a peak counts for a gene.
    genes
        Their names, each with a peak at least, in the order of the annotation and then of the table.
    n_without
        Genes that were left out because they have no peak.
    """

    map_pg: csr_matrix
    genes: list[str]
    n_without: int

    @property
    def n_linked(self) -> int:
        """Peaks that count for a gene."""
        return int(np.count_nonzero(np.diff(self.map_pg.indptr)))


def make_links(n_peaks: int, gene_names: Sequence[str], peak_l: np.ndarray, region_l: np.ndarray) -> Links:
    """Pairs of a peak and a gene's region -> the map.

    Regions of one name are one gene: a peak that lies in two of them, or is listed twice, counts once.

    Parameters
    ----------
    gene_names
        Of each region.
    peak_l, region_l
        The pairs, int64.
    """
    known = list(dict.fromkeys(gene_names))
    position = {name: g for g, name in enumerate(known)}
    gene_r = np.array([position[name] for name in gene_names], dtype=np.int64)
    pairs = np.unique(np.stack([peak_l, gene_r[region_l]]), axis=1)
    found = np.unique(pairs[1])
    place_g = np.full(len(known), -1, dtype=np.int64)
    place_g[found] = np.arange(len(found))
    ones = np.ones(pairs.shape[1], dtype=np.int64)
    map_pg = csr_matrix((ones, (pairs[0], place_g[pairs[1]])), shape=(n_peaks, len(found)))
    return Links(map_pg, [known[g] for g in found.tolist()], len(known) - len(found))


def gene_regions(genes: Regions, *, upstream: int, body: bool) -> Regions:
    """Where a peak counts for a gene: `upstream` bases before its start, by strand, and its body.

    A gene without a strand is taken as one of the forward strand. Nothing lies below 0.
    """
    backward = np.array([strand == "-" for strand in genes.strands])
    start_r = np.where(backward, genes.start_r if body else genes.end_r, genes.start_r - upstream)
    end_r = np.where(backward, genes.end_r + upstream, genes.end_r if body else genes.start_r)
    return replace(genes, start_r=np.maximum(start_r, 0), end_r=end_r)


def overlaps(peaks: Regions, regions: Regions) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of peak and region that share a base, int64 each; what only touches shares none.

    Raises
    ------
    GeneError
        If no chromosome is in both. ``chr1`` and ``1`` are the same one.
    """
    peak_c, region_c = _by_chromosome(peaks), _by_chromosome(regions)
    shared = [key for key in region_c if key in peak_c]
    if not shared:
        raise GeneError(
            f"genes lie on {', '.join(dict.fromkeys(regions.chromosomes[:1000]))[:60]}, peaks on "
            f"{', '.join(dict.fromkeys(peaks.chromosomes[:1000]))[:60]}: no chromosome is in both",
            fix="an annotation of the same genome that names chromosomes as the peaks do (a leading chr does "
            "not matter)",
        )
    found = [_overlaps_within(peaks, peak_c[key], regions, region_c[key]) for key in shared]
    peak_l, region_l = (np.concatenate(pairs) for pairs in zip(*found, strict=True))
    return peak_l, region_l


def _by_chromosome(regions: Regions) -> dict[str, np.ndarray]:
    code_r, keys = pd.factorize(np.array([chromosome_key(name) for name in regions.chromosomes], object))
    order = np.argsort(code_r, kind="stable")
    return dict(zip(map(str, keys), np.split(order, np.cumsum(np.bincount(code_r))[:-1]), strict=True))


def _overlaps_within(
    peaks: Regions, peak_i: np.ndarray, regions: Regions, region_i: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs on one chromosome; peaks may overlap and contain each other."""
    peak_i = peak_i[np.argsort(peaks.start_r[peak_i], kind="stable")]
    start_p, end_p = peaks.start_r[peak_i], peaks.end_r[peak_i]
    start_r, end_r = regions.start_r[region_i], regions.end_r[region_i]
    # before `low` all peaks end too early, from `high` on all begin too late
    low_r = np.searchsorted(np.maximum.accumulate(end_p), start_r, side="right")
    n_r = np.maximum(np.searchsorted(start_p, end_r, side="left") - low_r, 0)
    n_r[start_r >= end_r] = 0  # neither body nor upstream
    region_l = np.repeat(np.arange(len(region_i)), n_r)
    peak_l = np.arange(len(region_l)) - np.repeat(np.cumsum(n_r) - n_r, n_r) + low_r[region_l]
    keep = end_p[peak_l] > start_r[region_l]
    return peak_i[peak_l[keep]], region_i[region_l[keep]]


def listed_pairs(peak_names: Sequence[str], table: pd.DataFrame, where: str) -> tuple[list[str], np.ndarray]:
    """Genes of a table's rows, and the peak of each, -1 for one that is not there.

    Names of peaks may be written in another of the known ways than the store's.

    Raises
    ------
    GeneError
        If none of the peaks is there.
    """
    place = {peak_key(name): p for p, name in enumerate(peak_names)}
    peak_l = np.array([place.get(peak_key(name), -1) for name in table["peak"]], dtype=np.int64)
    if (peak_l < 0).all():
        raise GeneError(
            f"names none of the peaks (it has {', '.join(table['peak'][:3])}; the store "
            f"{', '.join(list(peak_names)[:3])})",
            where=where,
            fix="a table of this store's peaks",
        )
    if (peak_l < 0).any():
        warn(
            f"{np.count_nonzero(peak_l < 0)} of its {len(peak_l)} rows name no peak of the store", where=where
        )
    return list(table["gene"]), peak_l


def find_links(peak_names: Sequence[str], config: ActivityConfig) -> Links:
    """The map that the settings ask for.

    Raises
    ------
    UsageError
        If neither an annotation nor a table is given, or settings leave no region.
    GeneError
        If no peak counts for any gene.
    """
    if config.genes is None and config.peak_genes is None:
        raise UsageError(
            "which peaks belong to which gene?",
            fix="--genes annotation.gtf.gz (or .bed), or --peak-genes table.tsv with columns gene and peak",
        )
    if not config.body and not config.upstream:
        raise UsageError("neither body nor upstream: no peak can count", fix="--upstream 2000")
    names: list[str] = []
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    if config.genes is not None:
        genes = read_annotation(config.genes, config.attribute)
        unstranded = genes.strands.count(".")
        if unstranded and config.upstream:
            warn(
                f"{unstranded} of {len(genes)} genes have no strand, and are taken as forward",
                where=config.genes,
                fix="strands in column 6 of the BED file, or --upstream 0",
            )
        regions = gene_regions(genes, upstream=config.upstream, body=config.body)
        pairs.append(overlaps(read_peaks(peak_names), regions))
        names += genes.names
    if config.peak_genes is not None:
        listed, peak_l = listed_pairs(peak_names, read_gene_peaks(config.peak_genes), config.peak_genes)
        there = np.flatnonzero(peak_l >= 0)
        pairs.append((peak_l[there], len(names) + there))
        names += listed
    peak_l, region_l = (np.concatenate(found) for found in zip(*pairs, strict=True))
    if not len(peak_l):
        raise GeneError(
            f"none of {len(peak_names)} peaks lies in or before any of {len(set(names))} genes",
            where=config.genes,
            fix="an annotation of the assembly that the peaks were called on; or a larger --upstream",
        )
    return make_links(len(peak_names), names, peak_l, region_l)


# -- store -> store --------------------------------------------------------------------------------------


def gene_activity(
    store: Collection | str | Path, output: str | Path | Location, **settings: Any
) -> Collection:
    """Add up the counts of each gene's peaks: a store of peaks -> a store of genes.

    A peak counts for every gene in whose body, or upstream of whose start, a base of it lies (as the gene
    activity of Signac, Stuart 2021, counts fragments; there 2,000 bases upstream too), or that a table lists
    it for. Genes without a peak are left out. Killed at any point, the same call goes on, and ends with the
    same bytes.

    Parameters
    ----------
    store
        A store of peaks, or its path or URL.
    output
        Folder of the new store, or ``s3://bucket/prefix``; RNA can be appended to it (``convert --append``).
    **settings
        Fields of :class:`streamx.config.ActivityConfig`; ``genes`` or ``peak_genes`` is needed.

    Returns
    -------
    Collection
        The store of genes: cells, obs and batches of the other one; counts, integers; in var `n_peaks`. A
        gene counts as measured in a file if one of its peaks is.

    Raises
    ------
    UsageError
        If neither genes nor a table are given, or `store` is a view.
    BadFileError
        If the annotation can't be read; names the line.
    GeneError
        If peaks are not named as places, or none belongs to any gene.
    """
    return activity_store(store, output, **settings)[0]


def activity_store(
    store: Collection | str | Path, output: str | Path | Location, **settings: Any
) -> tuple[Collection, Links, Needs | None]:
    """Like :func:`gene_activity`; also which peaks count, and what writing was predicted to take."""
    store = store if isinstance(store, Collection) else open_collection(store)
    if store.kind != "store":
        raise UsageError("is a view; activity is made from stores", where=str(store.path))
    config: ActivityConfig = build(ActivityConfig, settings)
    steady_memory()
    links = find_links([str(name) for name in store.var_names], config)
    log.info(
        "%d of %d peaks count for %d genes; %d genes have no peak",
        links.n_linked, store.n_vars, len(links.genes), links.n_without,
    )  # fmt: skip
    location = open_location(output)
    fingerprint = _fingerprint(store, links)
    with Journal(location) as journal:
        finished = start(journal, fingerprint, append=False)
        if finished is not None:
            return finished, links, None
        content, slabs = _plan(store, links, config, fingerprint, journal.rows)
        written = write_part(
            location,
            slabs,
            content,
            preset=fingerprint["settings"]["preset"],
            memory=config.memory,
            threads=config.threads,
            journal=journal,
        )
    return written, links, content.needs


def _fingerprint(store: Collection, links: Links) -> dict[str, Any]:
    """What decides the bytes: the store, and which peaks count for which gene."""
    before = store.manifest.fingerprint["settings"]
    linked = [links.map_pg.indptr.astype("<i8"), links.map_pg.indices.astype("<i8")]
    digest = crc32c(b"".join(values.tobytes() for values in linked) + "\n".join(links.genes).encode())
    activity = {
        "links": digest,
        "store_generation": store.generation,
        "store_parts": [part["crc32c"] for part in store.manifest.parts],
    }
    kept = {name: before[name] for name in _OF_STORE}
    return {"format": FORMAT, "settings": kept | {"activity": activity}, "inputs": {}}


def _plan(
    store: Collection, links: Links, config: ActivityConfig, fingerprint: dict[str, Any], folder: Path
) -> tuple[Content, list[Slab]]:
    """Cells in their order, and the reading that is left to do."""
    memory, threads = parse_bytes(config.memory), thread_count(config.threads)
    n = store.n_obs
    order_n, place_n = np.arange(n), np.arange(n)
    if len(store.manifest.parts) > 1:  # rows of a batch that came later would lie apart
        seed = fingerprint["settings"]["seed"]
        order_n, place_n = row_order(store.batch_codes, [0], [""], [n], seed, folder)
    names, columns = lay_collection(store, store.obs_columns, folder)
    obs = gathered(order_n, names, columns, store.manifest.obs_schema)
    obsm = view_modalities(store, store.batches)
    slabs = _slabs(store, links, place_n, memory, threads)
    seen = [
        _activity(store, links, low, min(low + 64, n))
        for low in np.unique(np.linspace(0, max(n - 64, 0), 8).astype(int)).tolist()
    ]
    some = vstack(seen, format="csr")
    dense = 4 * sum(len(measured) for measured, _ in obsm.values())
    sample = Sample(some, int(some.nnz / max(1, some.shape[0]) * n), dense)
    preset = fingerprint["settings"]["preset"]
    n_peaks = np.bincount(links.map_pg.indices, minlength=len(links.genes))
    content = Content(
        kind="store",
        obs=obs,
        var=pd.DataFrame({"n_peaks": n_peaks}, index=pd.Index(links.genes, dtype=object)),
        batch_key=store.batch_key,
        fingerprint=fingerprint,
        obsm=obsm,
        uns={"batch_key": store.batch_key},
        sources=_sources(store, links),
        needs=needs_of(sample, obs, slabs, preset=preset, memory=memory, threads=threads),
    )
    return content, slabs


def _sources(store: Collection, links: Links) -> list[dict[str, Any]]:
    """What is known of the store's files, in genes instead of peaks."""
    entries = []
    for part in store.parts:
        for source in part.sources:
            peaks = gene_axis.unpack_mask(source["measured"], store.n_vars)
            measured = links.map_pg.T @ peaks.astype(np.int64) > 0
            entries.append(dict(source) | {"measured": gene_axis.pack_mask(measured)})
    return entries


def _slabs(store: Collection, links: Links, place_n: np.ndarray, memory: int, threads: int) -> list[Slab]:
    """Ranges of rows that all threads can hold at once."""
    widened = 1 + links.map_pg.nnz / max(1, store.n_vars)
    dense = 16 * sum(len(modality["names"]) for modality in store.modalities.values())
    per_row = store.nnz / max(1, store.n_obs) * BYTES_PER_VALUE * widened + dense + 256
    size = int(np.clip(memory / 2 / max(1, threads) / per_row, 64, MAX_SLAB_ROWS))
    return [
        Slab(f"{low:012d}-{high:012d}", place_n[low:high], partial(_read_slab, store, links, low, high))
        for low, high in store.iter_rows(size)
    ]


def _read_slab(
    store: Collection, links: Links, low: int, high: int
) -> tuple[csr_matrix, dict[str, np.ndarray]]:
    dense = {name: store.read_obsm(name, low, high) for name in store.modalities}
    return _activity(store, links, low, high), dense


def _activity(store: Collection, links: Links, low: int, high: int) -> csr_matrix:
    """Genes of some cells, int64; of values that are no counts float32."""
    x_np = store.read(low, high, dtype="stored")
    wide = np.float64 if x_np.dtype.kind == "f" else np.int64  # sums of small integers wrap
    x_ng = csr_matrix(x_np.astype(wide) @ links.map_pg)
    return x_ng if wide is np.int64 else x_ng.astype(np.float32)
