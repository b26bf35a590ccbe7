"""Names, globs and folders -> one source per input, with unique keys."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from streamx.errors import BadFileError, EmptyError, InputError, StreamxError, UsageError
from streamx.store.ingest import mtx, table, tenx
from streamx.store.ingest.elements import anndata_source
from streamx.store.ingest.objects import memory_source
from streamx.store.ingest.pool import Pool
from streamx.store.ingest.remote import Remote, expand_url, fetch
from streamx.store.ingest.source import Request, Source, reading
from streamx.store.location import is_url

HDF5 = (".h5ad", ".h5mu", ".h5", ".hdf5")
TEXT = (".csv", ".tsv", ".txt")
KNOWN = (*HDF5, ".zarr", ".mtx", *TEXT)


def open_sources(
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    layer: str | None = None,
    modality: str | None = None,
    scratch: Path,
    memory: int,
    failed: list[InputError] | None = None,
) -> list[Source]:
    """Open inputs of any mixture of formats.

    Parameters
    ----------
    inputs
        Paths, globs, folders of files, AnnData objects; or a mapping of a key to one of these.
    layer
        What holds the counts: ``"X"`` (default), ``"raw"``, or the name of a layer.
    modality
        Modality of h5mu files and 10x files with several feature types.
    scratch
        Folder for the spill of inputs that are stored by gene; made when it is needed.
    memory
        Bytes that reading may use.
    failed
        If given, inputs that can't be opened are collected here as errors instead of raised.

    Returns
    -------
    One source per input, sorted by key.

    Raises
    ------
    UsageError
        Nothing matches, or two inputs would have the same key.
    BadFileError, EmptyError
        An input that can't be read.
    """
    named: dict[Any, tuple[Any, str | None]] = {}  # the same path named twice is one input
    items = inputs.items() if isinstance(inputs, Mapping) else [(None, item) for item in inputs]
    for name, item in items:
        members = expand(item)
        if name is not None and len(members) > 1:
            raise UsageError(f"{item} is {len(members)} files", where=name, fix="name one file per key")
        for member in members:
            identity = member.resolve() if isinstance(member, Path) else member
            identity = identity if isinstance(member, (Path, Remote)) else id(member)
            named.setdefault(identity, (member, name))
    sources: list[Source] = []
    pool = Pool()
    for key, item in unique_keys(list(named.values())):
        try:
            request = Request(
                key, location_of(item, key), layer, modality, Path(scratch) / f"{key}.spill", memory
            )
            source = pool.keep(partial(open_one, item, request))
            if source.reopens and isinstance(item, Path):
                source = replace(source, opener=(_opened, (item.absolute(), request)))
            sources.append(source)
        except StreamxError as error:
            if failed is not None and isinstance(error, InputError):
                failed.append(error)
                continue
            for source in sources:
                source.close()
            raise
    return sources


@lru_cache(maxsize=4)
def _opened(path: Path, request: Request) -> Source:
    """One source per process and file."""
    return replace(open_one(path, request), opener=(_opened, (path, request)))


def expand(item: Any) -> list[Any]:
    """An input as the user wrote it -> paths (sorted) or objects."""
    if is_url(item):
        return list(expand_url(item))
    if isinstance(item, Remote):
        return [item]
    if not isinstance(item, str | Path):
        if not hasattr(item, "obs") or not (hasattr(item, "X") or hasattr(item, "mod")):
            raise UsageError(f"a {type(item).__name__} is no input", fix="pass paths or AnnData objects")
        return [item]
    path = Path(item).expanduser()
    if path.exists() or path.parent.suffix == ".h5mu":
        members = folder_members(path) if path.is_dir() else [path]
        if not members:
            raise UsageError("the folder holds no input", where=str(path), fix=f"known: {', '.join(KNOWN)}")
        return members
    if not glob.has_magic(str(path)):
        raise UsageError("no such file or folder", where=str(path), fix="check the path")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    members = [m for match in matches for m in (folder_members(match) if match.is_dir() else [match])]
    if not members:
        raise UsageError("nothing matches", where=str(path), fix="check the pattern; quote it in the shell")
    return members


def folder_members(folder: Path) -> list[Path]:
    """What a folder is or holds: one input (AnnData-Zarr, one mtx), or files and such folders."""
    if (folder / "streamx.json").exists():
        fix = "name the files that it was made of; or give it where a STORE or VIEW is asked for"
        raise UsageError("this is a streamx store, not an input", where=str(folder), fix=fix)
    if (folder / "model.json").exists():
        raise UsageError("this is a model, not an input", where=str(folder), fix="name files of cells")
    if is_input_folder(folder):
        return [folder]
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    has_mtx = any(extension(p) == ".mtx" for p in files)
    return [
        p
        for p in files
        if (is_input_folder(p) if p.is_dir() else extension(p) in KNOWN)
        and not (has_mtx and extension(p) in TEXT and mtx.is_companion(p))
    ]


def is_input_folder(folder: Path) -> bool:
    if folder.suffix == ".zarr" or any((folder / n).exists() for n in ("zarr.json", ".zgroup", ".zattrs")):
        return True
    return sum(extension(p) == ".mtx" for p in folder.iterdir()) == 1


def extension(path: Path) -> str:
    """Extension that says the format, without ``.gz``."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def stem(path: Path) -> str:
    if path.parent.suffix == ".h5mu":
        path = path.parent
    if path.is_dir() and extension(path) != ".zarr":
        return path.name
    name = path.name[: -len(".gz")] if path.name.lower().endswith(".gz") else path.name
    name = name[: -len(extension(path))] if extension(path) in KNOWN else name
    if extension(path) == ".mtx":
        return mtx.prefix_of(path) or path.resolve().parent.name
    return name


def unique_keys(inputs: list[tuple[Any, str | None]]) -> list[tuple[str, Any]]:
    """Keys and inputs, sorted by key: the name given, else the stem, where that is not unique with as many of
    its folders in front as it takes.
    """
    given = [item for item, _ in inputs]
    inputs = [(item.path if isinstance(item, Remote) else item, name) for item, name in inputs]
    unnamed = [item for item, name in inputs if name is None and not isinstance(item, Path)]
    width = len(str(len(unnamed)))
    keys: list[str] = []
    for item, name in inputs:
        if name is not None or isinstance(item, Path):
            keys.append(name if name is not None else stem(item))
        else:
            at = next(i for i, other in enumerate(unnamed) if other is item)
            keys.append("adata" if len(unnamed) == 1 else f"adata{at + 1:0{width}d}")
    for depth in range(max((len(item.parts) for item, _ in inputs if isinstance(item, Path)), default=0)):
        times = Counter(keys)
        for i, (item, name) in enumerate(inputs):
            if times[keys[i]] > 1 and name is None and isinstance(item, Path):
                folders = item.resolve().parts[1:-1]
                keys[i] = "_".join([*folders[-1 - depth :], stem(item)])
    first: dict[str, Any] = {}
    for key, item in zip(keys, given, strict=True):
        if key in first:
            if first[key] == item:
                raise UsageError(f"{item} is given twice", fix="name it once")
            raise UsageError(
                f"two inputs would both be called {key!r}: {first[key]} and {item}",
                fix="rename one of them or its folder",
            )
        first[key] = item
    return sorted(zip(keys, given, strict=True), key=lambda pair: pair[0])


def location_of(item: Any, key: str) -> str:
    return str(item) if isinstance(item, (Path, Remote)) else f"{type(item).__name__} {key}"


def open_one(item: Any, request: Request) -> Source:
    """Choose the reader: by what a folder holds, by a file's extension, and inside HDF5 by its groups."""
    if isinstance(item, Remote):
        item = fetch(item, request.spill.parent)
        if item.is_dir():
            (item,) = folder_members(item)
    if not isinstance(item, Path):
        return memory_source(item, request)
    if item.parent.suffix == ".h5mu" and not item.parent.is_dir():
        item, request = item.parent, replace(request, modality=item.name)
    if item.is_dir():
        matrices = [p for p in item.iterdir() if extension(p) == ".mtx"]
        return mtx.mtx_source(matrices[0], request) if matrices else open_zarr(item, request)
    if item.stat().st_size == 0:
        raise EmptyError("the file is empty", where=str(item), fix="download or write it again")
    kind = extension(item)
    if kind in HDF5:
        return open_hdf5(item, request)
    if kind == ".mtx":
        return mtx.mtx_source(item, request)
    if kind in TEXT:
        return table.table_source(item, request)
    raise BadFileError(
        f"unknown kind of file {kind or item.name!r}", where=str(item), fix=f"known are {', '.join(KNOWN)}"
    )


def open_hdf5(path: Path, request: Request) -> Source:
    """h5ad, h5mu or 10x HDF5, told apart by what is inside."""
    import h5py

    location = request.location
    if path.name.lower().endswith(".gz"):
        raise BadFileError("compressed HDF5 can't be read in place", where=location, fix=f"gunzip {path}")
    if not h5py.is_hdf5(path):
        raise BadFileError(
            "this is not an HDF5 file, whatever its name says",
            where=location,
            fix="download it again, or give it the extension of what it is",
        )
    with reading(location, "the HDF5 structure"):
        file = h5py.File(path, "r", rdcc_nbytes=0)
    try:
        with reading(location, "the HDF5 structure"):
            is_10x = tenx.is_tenx(file)
        return (tenx.tenx_source if is_10x else anndata_source)(file, path, request, file.close)
    except BaseException:
        file.close()
        raise


def open_zarr(path: Path, request: Request) -> Source:
    import zarr

    with reading(request.location, "the zarr group"):
        root = zarr.open_group(str(path), mode="r")
    return anndata_source(root, path, request)
