"""The direct reader: zarr's values, for every layout that it knows; None for the others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_samples import read_values

from streamx.errors import IntegrityError
from streamx.store import layout
from streamx.store.chunks import Chunks, open_chunks
from streamx.store.folder import Folder
from streamx.store.kept import Kept

N, CHUNK = 10_007, 1024


def write(folder: Path, preset: str, dtype: str, per_shard: int = 3, name: str = "data") -> np.ndarray:
    rng = np.random.default_rng(len(preset) + per_shard)
    values = rng.integers(0, 200, N).astype(dtype)
    values[3 * CHUNK : 5 * CHUNK] = 0  # chunks, and with one chunk per shard shards, that zarr leaves out
    array = zarr.create_array(
        folder / "store/X" / name, shape=(N,), dtype=dtype, chunks=(CHUNK,), shards=(CHUNK * per_shard,),
        fill_value=0, zarr_format=3, **layout.matrix_codecs(preset, name, np.dtype(dtype)),
    )  # fmt: skip
    array[:] = values
    return values


def opened(folder: Path, name: str = "data") -> Chunks:
    found = open_chunks(Folder(folder / "store"), f"X/{name}", {}, Kept())
    assert found is not None
    return found


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr")
@pytest.mark.parametrize("preset", ["default", "speed", "remote", "compact"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
@pytest.mark.parametrize("per_shard", [1, 4])
@pytest.mark.parametrize("name", ["indices", "data"])
def test_same_values_as_zarr(tmp_path: Path, preset: str, dtype: str, per_shard: int, name: str) -> None:
    if dtype == "float32" and name == "indices":
        return  # genes are integers
    values = write(tmp_path, preset, dtype, per_shard, name)
    reader = opened(tmp_path, name)
    for low, high in [(0, N), (0, 0), (0, 1), (N - 1, N), (N, N), (1023, 1025), (3072, 5120), (100, 9000)]:
        found = read_values(reader, low, high)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values[low:high])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, N), st.integers(0, N))
def test_any_range(tmp_path_factory: pytest.TempPathFactory, a: int, b: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_range"
    if not folder.exists():
        np.save(folder.parent / "any_range.npy", write(folder, "default", "uint16"))
    values = np.load(folder.parent / "any_range.npy")
    low, high = min(a, b), max(a, b)
    np.testing.assert_array_equal(read_values(opened(folder), low, high), values[low:high])


def test_other_layouts_are_left_to_zarr(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "store/plain", shape=(10,), dtype="u2", chunks=(5,), zarr_format=3)
    assert open_chunks(Folder(tmp_path / "store"), "plain", {}, Kept()) is None
    zarr.create_array(tmp_path / "store/flat", shape=(4, 4), dtype="u2", chunks=(2, 2), shards=(4, 4))
    assert open_chunks(Folder(tmp_path / "store"), "flat", {}, Kept()) is None


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    """In chunks and in the index; a bit of a chunk that is not asked for does no harm."""
    values = write(tmp_path, "default", "uint16", per_shard=10)
    path = tmp_path / "store/X/data/c/0"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*rng.integers(0, len(whole), 150).tolist(), len(whole) - 1, len(whole) - 5, 0]:
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(broken))
        with pytest.raises(IntegrityError):
            read_values(opened(tmp_path), 0, N)
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(IntegrityError):
            read_values(opened(tmp_path), 0, N)
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_values(opened(tmp_path), 0, N), values)


def test_lost_objects_and_metadata(tmp_path: Path) -> None:
    write(tmp_path, "default", "uint16", per_shard=3)
    location = Folder(tmp_path / "store")
    (tmp_path / "store/X/data/c/2").unlink()
    reader = open_chunks(location, "X/data", {"X/data/c/2": [1000, "0"]}, Kept())
    assert reader is not None
    read_values(reader, 0, 2 * 3 * CHUNK)
    with pytest.raises(IntegrityError, match="missing"):
        read_values(reader, 0, N)
    about = json.loads(location.read("X/data/zarr.json"))
    with pytest.raises(IntegrityError, match="metadata"):
        open_chunks(location, "X/data", {"X/data/zarr.json": [len(str(about)), "00000000"]}, Kept())
