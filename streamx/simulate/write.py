"""``streamx simulate`` and ``sx.simulate``: a synthetic atlas, as a store or as h5ad files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from streamx.config import SimulateConfig, build, parse_bytes
from streamx.errors import UsageError
from streamx.memory import steady_memory
from streamx.simulate.atlas import Atlas, make_atlas
from streamx.store import genes
from streamx.store.collection import Collection
from streamx.store.location import open_location
from streamx.store.manifest import FORMAT
from streamx.store.needs import Sample, needs_of
from streamx.store.obs import Obs, Piece, as_obs
from streamx.store.pack import Content, write_part
from streamx.store.spill import Slab
from streamx.store.text import Text, text_of
from streamx.threads import run_all, thread_count

PROTEIN = "protein_expression"
MADE_BY = "streamx-simulate"  # attribute of an h5ad file
MAX_ROWS = 1 << 15  # of a block
BYTES_PER_GENE_DRAWN = 64  # of a block while it is drawn and laid down
EXTRA_VALUES = 100  # different texts in an extra column of texts


def simulate(output: str | Path, **settings: Any) -> Collection | list[Path]:
    """Write a synthetic atlas: batches of cells of several types, with batch effects.

    A batch has a composition of cell types, a factor per gene (``batch_effect``) and a depth. A cell has a
    type and a log-normal number of transcripts, drawn from its type's abundances times the batch's factors.
    Every cell follows from (seed, batch, number) alone: what is written is the same for any memory, any
    number of threads, and in any format. Nothing is held: ten million cells take as much memory as ten
    thousand.

    Parameters
    ----------
    output
        Folder of the store, or (``format="h5ad"``) for one file per batch.
    **settings
        Fields of :class:`streamx.config.SimulateConfig`.

    Returns
    -------
    Collection or list of Path
        The store, or the files. In obs: `batch`, `cell_type` (the truth), `depth` (transcripts drawn) and
        `extra0`, ... (every other one of numbers, of texts). Counts are integers; with ``n_proteins`` there
        is ``obsm["protein_expression"]``, float32. The same seed with ``features="peaks"`` gives the same
        cells: two modalities of one atlas.

    Raises
    ------
    UsageError
        For settings that can't be.
    """
    config: SimulateConfig = build(SimulateConfig, settings)
    steady_memory()
    atlas = make_atlas(config)
    if config.format == "h5ad":
        return write_files(Path(output), atlas, config)
    return write_store(output, atlas, config)


def write_store(output: str | Path, atlas: Atlas, config: SimulateConfig) -> Collection:
    """The atlas as a store, through the same writer as a conversion's."""
    settings = _decisive(config)
    names = {PROTEIN: (atlas.protein_names, _measured(atlas))} if config.n_proteins else {}
    content = Content(
        kind="store",
        obs=obs_of(atlas),
        var=pd.DataFrame(index=pd.Index(atlas.gene_names, dtype=object)),
        batch_key="batch",
        fingerprint={"format": FORMAT, "settings": {"simulate": settings} | _as_converted(), "inputs": {}},
        obsm=names,
        uns={"batch_key": "batch", "simulated": settings},
        sources=[_source(atlas)],
    )
    threads = thread_count(config.threads)
    slabs = [
        Slab(f"{b}-{start}-{stop}", first + np.arange(stop - start), partial(_read, atlas, b, start, stop))
        for b, start, stop, first in _blocks(atlas, config, threads)
    ]
    some, _ = _read(atlas, 0, 0, min(512, int(atlas.size_b[0])))
    sample = Sample(some, int(some.nnz / some.shape[0] * config.n_cells), 4 * config.n_proteins)
    needs = needs_of(
        sample, obs_of(atlas), slabs, shard_rows=config.shard_rows, memory=parse_bytes(config.memory),
        threads=threads,
    )  # fmt: skip
    return write_part(
        open_location(output),
        slabs,
        replace(content, needs=needs),
        shard_rows=config.shard_rows,
        memory=config.memory,
        threads=threads,
    )


def _decisive(config: SimulateConfig) -> dict[str, Any]:
    """Settings that decide what is written."""
    free = ("memory", "threads", "format")
    return {name: value for name, value in asdict(config).items() if name not in free}


def _as_converted() -> dict[str, Any]:
    """What an append to the store asks of the settings that it was made with."""
    before = {"batch_key": "batch", "batches_are_files": False}
    return before | {"preset": "default", "seed": 0, "strip_versions": False}


def _measured(atlas: Atlas) -> dict[str, list[bool]]:
    return {name: [True] * len(atlas.protein_names) for name in atlas.batch_names}


def _source(atlas: Atlas) -> dict[str, Any]:
    n_genes = atlas.config.n_genes
    return {
        "key": "simulated",
        "n_obs": atlas.config.n_cells,
        "n_genes": n_genes,
        "n_dropped": 0,
        "overlap": 1.0,
        "checksum": f"simulated-{atlas.config.seed}",
        "batches": atlas.batch_names,
        "measured": genes.pack_mask(np.ones(n_genes, dtype=bool)),
    }


def _blocks(atlas: Atlas, config: SimulateConfig, threads: int) -> Iterator[tuple[int, int, int, int]]:
    """(batch, start, stop, first row of the atlas) of blocks that all threads can draw at once."""
    per_row = BYTES_PER_GENE_DRAWN * min(2 * config.depth, config.n_genes) + 8 * config.n_proteins + 64
    rows = int(np.clip(parse_bytes(config.memory) / 4 / threads / per_row, 64, MAX_ROWS))
    first = 0
    for b, size in enumerate(atlas.size_b.tolist()):
        for start in range(0, size, rows):
            stop = min(start + rows, size)
            yield b, start, stop, first + start
        first += size


def _read(atlas: Atlas, batch: int, start: int, stop: int) -> tuple[sparse.csr_matrix, dict[str, np.ndarray]]:
    block = atlas.block(batch, start, stop)
    x_ng = sparse.csr_matrix((stop - start, atlas.config.n_genes), dtype=np.int32)
    # set directly: the constructor would scan all indices once more
    x_ng.indptr, x_ng.indices, x_ng.data = block.indptr, block.indices, block.data
    x_ng.has_sorted_indices = True
    return x_ng, {PROTEIN: block.protein_np} if atlas.config.n_proteins else {}


# -- obs -----------------------------------------------------------------------------------------------


def obs_of(atlas: Atlas) -> Obs:
    """obs of the whole atlas, drawn when it is read."""
    starts = np.concatenate([[0], np.cumsum(atlas.size_b)])

    def spread(draw: Callable[[int, int, int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
        """Rows of a batch -> rows of the atlas."""

        def rows(start: int, stop: int) -> np.ndarray:
            found = [draw(0, 0, 0)]
            for b in range(int(np.searchsorted(starts, start, side="right")) - 1, len(atlas.size_b)):
                low, high = max(start, int(starts[b])), min(stop, int(starts[b + 1]))
                if low >= high:
                    break
                found.append(draw(b, low - int(starts[b]), high - int(starts[b])))
            return np.concatenate(found)

        return rows

    schema, columns = {}, {}
    for name, (about, draw) in _columns(atlas).items():
        schema[name], columns[name] = about, _whole(spread(draw))
    return Obs(atlas.config.n_cells, schema, _names(spread(partial(_cell_names, atlas))), columns)


def _whole(read: Callable[[int, int], np.ndarray]) -> Callable[[int, int], Piece]:
    return lambda start, stop: (read(start, stop), None)


def _names(read: Callable[[int, int], np.ndarray]) -> Callable[[int, int], Text]:
    return lambda start, stop: text_of(read(start, stop))


def _cell_names(atlas: Atlas, batch: int, start: int, stop: int) -> np.ndarray:
    name = atlas.batch_names[batch]
    return np.array([f"{name}-{row:08d}" for row in range(start, stop)], dtype=object)


Draw = Callable[[int, int, int], np.ndarray]


def _columns(atlas: Atlas) -> dict[str, tuple[dict[str, Any], Draw]]:
    """column -> schema, and its values for some cells of a batch."""
    columns: dict[str, tuple[dict[str, Any], Draw]] = {
        "batch": (
            {"dtype": "category", "categories": atlas.batch_names},
            lambda b, start, stop: np.full(stop - start, b, _code_dtype(len(atlas.batch_names))),
        ),
        "cell_type": (
            {"dtype": "category", "categories": atlas.type_names},
            lambda b, start, stop: atlas.cells(b, start, stop)[0].astype(_code_dtype(len(atlas.type_names))),
        ),
        "depth": ({"dtype": "int64"}, lambda b, start, stop: atlas.cells(b, start, stop)[1]),
    }
    texts = [f"value{i:02d}" for i in range(EXTRA_VALUES)]
    for c in range(atlas.config.n_columns):
        draw = partial(_extra, atlas.config.seed, c)
        schema = {"dtype": "category", "categories": texts} if c % 2 else {"dtype": "float32"}
        columns[f"extra{c}"] = (schema, draw)
    return columns


def _extra(seed: int, column: int, batch: int, start: int, stop: int) -> np.ndarray:
    """Number i of a batch's extra values is a hash of (seed, column, batch, i)."""
    word = np.random.SeedSequence([seed, 8, column, batch]).generate_state(1, np.uint64)[0]
    x = (np.arange(start, stop, dtype=np.uint64) + np.uint64(word)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(40)
    return (x % np.uint64(EXTRA_VALUES)).astype(np.int8) if column % 2 else x.astype(np.float32) / (1 << 24)


def _code_dtype(n: int) -> np.dtype:
    return np.dtype(np.int8 if n < 128 else np.int16 if n < 32768 else np.int32)


# -- h5ad ----------------------------------------------------------------------------------------------


def write_files(folder: Path, atlas: Atlas, config: SimulateConfig) -> list[Path]:
    """One h5ad per batch; each is complete as soon as it has its name, and then kept by the same call."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.h5ad" for name in atlas.batch_names]
    made_by = json.dumps(_decisive(config))
    there = [path for path in paths if path.exists()]
    for path in there:
        if _made_by(path) != made_by:
            raise UsageError("is there already", where=str(path), fix="choose another folder, or remove it")
    threads = thread_count(config.threads)
    blocks: list[list[tuple[int, int]]] = [[] for _ in paths]
    for b, start, stop, _ in _blocks(atlas, config, threads):
        blocks[b].append((start, stop))
    obs, firsts = obs_of(atlas), np.concatenate([[0], np.cumsum(atlas.size_b)]).tolist()
    tasks = [
        partial(_write_file, path, atlas, b, blocks[b], obs.rows(firsts[b], firsts[b + 1]), made_by)
        for b, path in enumerate(paths)
        if path not in there
    ]
    run_all(tasks, threads, "writing")
    return paths


def _made_by(path: Path) -> str | None:
    """The settings that a file of ours was written with."""
    import h5py

    if not h5py.is_hdf5(path):
        return None
    with h5py.File(path) as file:
        return file.attrs.get(MADE_BY)


def _write_file(
    path: Path, atlas: Atlas, batch: int, blocks: list[tuple[int, int]], obs: Obs, made_by: str
) -> None:
    import h5py

    partial_path = path.with_name(f".{path.name}.partial")
    shape = (obs.n_obs, atlas.config.n_genes)
    with h5py.File(partial_path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0", MADE_BY: made_by})
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            file.create_group(name).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        flat = {"shape": (0,), "maxshape": (None,), "chunks": (1 << 18,)}
        indices = x.create_dataset("indices", dtype="i4", **flat)
        data = x.create_dataset("data", dtype="f4", **flat)
        indptr = x.create_dataset("indptr", dtype="i8", shape=(shape[0] + 1,))
        proteins = None
        if atlas.config.n_proteins:
            proteins = file["obsm"].create_dataset(
                PROTEIN, dtype="f4", shape=(shape[0], atlas.config.n_proteins)
            )
            proteins.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        at = 0
        for start, stop in blocks:
            block = atlas.block(batch, start, stop)
            end = at + len(block.data)
            for dataset, values in ((indices, block.indices), (data, block.data)):
                dataset.resize((end,))
                dataset[at:end] = values
            indptr[start : stop + 1] = block.indptr + at
            if proteins is not None:
                proteins[start:stop] = block.protein_np
            at = end
        _write_frame(file, "obs", obs)
        var = pd.DataFrame(index=pd.Index(atlas.gene_names, dtype=object))
        _write_frame(file, "var", as_obs(var))
    os.replace(partial_path, path)


def _write_frame(file: Any, name: str, table: Obs) -> None:
    """A table of numbers and categoricals, by pieces of rows."""
    import h5py

    group = file.create_group(name)
    group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
    order = np.array(list(table.schema), dtype=object)
    group.attrs.create("column-order", order, shape=(len(order),), dtype=h5py.string_dtype())
    texts = {"dtype": h5py.string_dtype(), "shape": (table.n_obs,)}
    index = group.create_dataset("_index", **texts)
    index.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    for low in range(0, table.n_obs, MAX_ROWS):
        high = min(low + MAX_ROWS, table.n_obs)
        index[low:high] = table.names(low, high).strings()
    for column, schema in table.schema.items():
        read = table.columns[column]
        plain = {"encoding-type": "array", "encoding-version": "0.2.0"}
        if "categories" in schema:
            node = group.create_group(column)
            node.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
            categories = np.array(schema["categories"], dtype=object)
            stored = node.create_dataset("categories", data=categories, dtype=h5py.string_dtype())
            stored.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
            values = node.create_dataset("codes", dtype=read(0, 0)[0].dtype, shape=(table.n_obs,))
        else:
            values = group.create_dataset(column, dtype=read(0, 0)[0].dtype, shape=(table.n_obs,))
        values.attrs.update(plain)
        for low in range(0, table.n_obs, MAX_ROWS):
            high = min(low + MAX_ROWS, table.n_obs)
            values[low:high] = read(low, high)[0]
