"""An index in a folder: plain arrays, and a card with their checksums that is put in place last."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from streamx.errors import BadFileError, IntegrityError, StorageError

CARD, LOCK = "index.json", "lock"
PIECE = 1 << 24  # bytes at a time
REMOVE = "remove the folder, and let it be made again"


def write_arrays(folder: Path, card: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Make these arrays the content of a folder: a reader, or a kill, finds the old ones or the new ones.

    Files are named by their content, so none that the old card names is changed. Arrays that are mapped from
    the folder stay where they are.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("w") as lock:  # the kernel drops it when the process dies
            fcntl.flock(lock, fcntl.LOCK_EX)
            objects = {name: _put(folder, name, array) for name, array in sorted(arrays.items())}
            text = json.dumps({**card, "objects": objects}, indent=2) + "\n"
            _replace(folder / CARD, text.encode())
            named = {file for file, *_ in objects.values()}
            for path in folder.iterdir():
                if path.name.endswith((".npy", ".tmp")) and path.name not in named:
                    path.unlink()
    except OSError as error:
        raise StorageError(f"can't be written: {error.strerror}", where=str(folder)) from error


def _put(folder: Path, name: str, array: np.ndarray) -> list[Any]:
    """The file that holds an array, written if there is none yet; its bytes and CRC-32."""
    there = Path(getattr(array, "filename", None) or "")
    if there.parent == folder.resolve() and there.name.startswith(f"{name}-"):
        return [there.name, *_describe(there)]
    partial = _write(folder / f"{name}.tmp", array)
    size, crc = _describe(partial)
    file = f"{name}-{crc}.npy"
    os.replace(partial, folder / file)
    return [file, size, crc]


def read_card(folder: Path) -> dict[str, Any]:
    """What a folder says it holds.

    Raises
    ------
    BadFileError
        If it is no such folder.
    """
    try:
        card = json.loads((folder / CARD).read_text())
        return {**card, "objects": dict(card["objects"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"holds no {CARD} of streamx", where=str(folder), fix=REMOVE) from error


def read_arrays(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The card and the arrays of a folder, mapped and not read into memory.

    Raises
    ------
    BadFileError
        If it is no such folder.
    IntegrityError
        If an array is missing, or not what was written.
    """
    card, arrays = read_card(folder), {}
    for name, (file, *expected) in card["objects"].items():
        path = folder / file
        try:
            if _describe(path) != expected:
                raise IntegrityError("is not what was written", where=str(path), fix=REMOVE)
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise IntegrityError("is missing or can't be read", where=str(path), fix=REMOVE) from error
    return card, arrays


def _replace(path: Path, content: bytes) -> None:
    os.replace(_write(path.with_suffix(".tmp"), content), path)


def _write(path: Path, content: np.ndarray | bytes) -> Path:
    with path.open("wb") as stream:
        if isinstance(content, bytes):
            stream.write(content)
        else:
            np.save(stream, content, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    return path


def _describe(path: Path) -> list[Any]:
    """Bytes and CRC-32 of a file."""
    crc = size = 0
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return [size, f"{crc:08x}"]
