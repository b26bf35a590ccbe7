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

CARD = "index.json"
PIECE = 1 << 24  # bytes at a time
REMOVE = "remove the folder, and let it be made again"


def write_arrays(folder: Path, card: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Make these arrays the content of a folder: a reader, or a kill, finds the old ones or the new ones.

    An array whose name the folder's card knows already is not written again: names are given once.
    """
    objects = read_card(folder)["objects"] if (folder / CARD).exists() else {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in arrays.keys() - objects.keys():
            _replace(folder / f"{name}.npy", arrays[name])
        new = {name: objects.get(name) or _describe(folder / f"{name}.npy") for name in sorted(arrays)}
        text = json.dumps({**card, "objects": new}, indent=2) + "\n"
        _replace(folder / CARD, text.encode())
        for path in folder.iterdir():
            if path.name.endswith((".npy", ".tmp")) and path.stem not in new:
                path.unlink()
    except OSError as error:
        raise StorageError(f"can't be written: {error.strerror}", where=str(folder)) from error


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
    for name, expected in card["objects"].items():
        path = folder / f"{name}.npy"
        try:
            if _describe(path) != expected:
                raise IntegrityError("is not what was written", where=str(path), fix=REMOVE)
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise IntegrityError("is missing or can't be read", where=str(path), fix=REMOVE) from error
        arrays[name] = mapped
    return card, arrays


def _replace(path: Path, content: np.ndarray | bytes) -> None:
    partial = path.with_name(f"{path.stem}.tmp")
    with partial.open("wb") as stream:
        if isinstance(content, bytes):
            stream.write(content)
        else:
            np.save(stream, content, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _describe(path: Path) -> list[Any]:
    """Bytes and CRC-32 of a file."""
    crc = size = 0
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return [size, f"{crc:08x}"]
