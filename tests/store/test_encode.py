"""Chunks and zarr shards that are encoded here are, byte for byte, those that zarr would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from streamx.store import layout
from streamx.store.columns import ColumnFile
from streamx.store.draft import Draft
from streamx.store.encode import matrix_chunk, matrix_shard, offsets_shard
from streamx.store.obs import as_obs, to_pandas
from streamx.store.text import joined, text_of


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr")
@pytest.mark.parametrize("preset", layout.PRESETS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
@pytest.mark.parametrize("n", [1, 64, 200, 256, 700])
def test_matrix_shards(tmp_path: Path, preset: str, dtype: str, n: int) -> None:
    chunk, shard = 64, 256
    values = np.random.default_rng(n).integers(0, 200, n).astype(dtype)
    for which in ("indices", "data"):
        if which == "indices" and dtype == "float32":
            continue
        codecs = layout.matrix_codecs(preset, which, np.dtype(dtype))
        array = zarr.create_array(
            tmp_path / which, shape=(n,), dtype=dtype, chunks=(chunk,), shards=(shard,), fill_value=0,
            zarr_format=3, config={"write_empty_chunks": True}, **codecs,
        )  # fmt: skip
        array[:] = values
        encode = matrix_chunk(preset, which, np.dtype(dtype))

        def pieces(low: int) -> list[np.ndarray]:
            return [values[a : min(a + 2 * chunk, low + shard)] for a in range(low, low + shard, 2 * chunk)]

        for k, low in enumerate(range(0, n, shard)):
            mine = b"".join(matrix_shard(pieces(low), chunk, shard // chunk, encode))
            assert mine == (tmp_path / which / "c" / str(k)).read_bytes()


@pytest.mark.parametrize("n", [1, 5, 8192, 20_000])
def test_offsets(tmp_path: Path, n: int) -> None:
    ends = np.cumsum(np.random.default_rng(n).integers(0, 300, n)) + 12345
    geometry = layout.offset_geometry(n)
    array = zarr.create_array(
        tmp_path / "x", shape=(n,), dtype="int64", fill_value=0, zarr_format=3,
        config={"write_empty_chunks": True}, **geometry,
    )  # fmt: skip
    array[:] = ends - ends[0]
    mine = b"".join(offsets_shard(ends, geometry["chunks"][0]))
    assert mine == (tmp_path / "x" / "c" / "0").read_bytes()


COLUMNS: dict[str, Any] = {
    "int64": np.arange(90) * 7,
    "float32": np.linspace(0, 1, 90, dtype=np.float32),
    "bool": np.arange(90) % 3 == 0,
    "wide": np.arange(270, dtype=np.float32).reshape(90, 3),
    "text": np.array([f"cell {i} é" * (i % 4) for i in range(90)], dtype=object),
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("n", [1, 13, 39, 90])
def test_columns(tmp_path: Path, tiny_geometry: None, name: str, n: int) -> None:
    values = COLUMNS[name][:n]
    draft = Draft()
    if name == "text":
        draft.strings("x", values)
        dtype, values = str, values.astype(np.dtypes.StringDType())
    else:
        draft.array("x", values)
        dtype = values.dtype
    objects = draft.take()
    other = Draft()
    array = other.empty("x", values.shape, dtype)
    array[...] = values
    expected = other.take()
    chunks = {key for key in objects if not key.endswith("zarr.json")}
    assert chunks == {key for key in expected if not key.endswith("zarr.json")}
    assert all(objects[key] == expected[key] for key in chunks)


texts = st.lists(st.text(max_size=5), max_size=12)


@settings(deadline=None)
@given(texts, texts, st.data())
def test_text(first: list[str], second: list[str], data: st.DataObject) -> None:
    text = joined([text_of(first), text_of(second)])
    strings = first + second
    assert text.strings().tolist() == strings
    low = data.draw(st.integers(0, len(strings)))
    assert text[low:].strings().tolist() == strings[low:]
    rows = data.draw(st.lists(st.integers(0, max(0, len(strings) - 1)), max_size=9)) if strings else []
    assert text.take(np.array(rows, np.int64)).strings().tolist() == [strings[row] for row in rows]
    hashes = text.hashes()
    assert all(
        (hashes[i] == hashes[j]) == (a == b) for i, a in enumerate(strings) for j, b in enumerate(strings)
    )
    assert (text[low:].hashes() == hashes[low:]).all()


def test_columns_that_grow_by_pieces(tmp_path: Path) -> None:
    """Missing values may begin, and end, in any piece."""
    frame = pd.DataFrame(
        {
            "text": ["a", "b", "", None, "é", "f"],
            "number": pd.array([1, None, 3, 4, 5, 6], dtype="Int64"),
            "plain": np.arange(6.0),
            "category": pd.Categorical(["x", None, "y", "x", "y", "x"]),
        },
        index=list("uvwxyz"),
    )
    for name in frame:
        file = ColumnFile(tmp_path / str(name))
        for low, high in ((0, 3), (3, 3), (3, 4), (4, 6)):
            piece = as_obs(frame.iloc[low:high])
            file.append(piece.columns[str(name)](0, high - low))
        rows = np.array([5, 0, 3, 3])
        found = to_pandas(file.column().take(rows), as_obs(frame).schema[str(name)])
        expected = frame[name].iloc[rows].reset_index(drop=True)
        assert [v for v in found if not pd.isna(v)] == [v for v in expected if not pd.isna(v)]
        assert found.isna().tolist() == expected.isna().tolist()
