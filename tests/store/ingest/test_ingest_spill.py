"""The transposing spill: any matrix, any memory limit, the same rows."""

from __future__ import annotations

import tempfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from streamx.errors import BadFileError
from streamx.store.ingest import spill
from streamx.store.ingest.source import Request
from streamx.store.ingest.spill import Entries, Spill, compressed_rows


def names(prefix: str, n: int) -> np.ndarray:
    return np.array([f"{prefix}{i}" for i in range(n)], dtype=object)


def request(folder: str, memory: int = 1 << 20) -> Request:
    return Request("a", "a.h5ad", None, None, Path(folder) / "spill", memory)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32), st.integers(2, 80))
def test_csc_of_any_shape(n_cells: int, n_genes: int, density: float, seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    x_ng = sparse.random(n_cells, n_genes, density, format="csc", random_state=rng, dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # Limits as small as `limit` entries: many buckets, and buckets that don't fit at once.
        original = Spill.__post_init__

        def small(self: Spill) -> None:
            original(self)
            self.limit = limit
            self.width = -(-n_cells // min(3, n_cells))

        patch.setattr(Spill, "__post_init__", small)
        arrays = x_ng.indptr, x_ng.indices, x_ng.data
        rows = compressed_rows(False, arrays, "X", names("c", n_cells), names("g", n_genes), request(folder))
        middle = n_cells // 2
        back = sparse.vstack([rows(0, middle), rows(middle, n_cells)])
        assert (back != x_ng.tocsr()).nnz == 0
        assert back.dtype == x_ng.dtype


def test_files_do_not_depend_on_memory(tmp_path: Path) -> None:
    x_ng = sparse.random(5000, 80, 0.3, format="csc", random_state=np.random.default_rng(0))
    made = []
    for memory in (1 << 20, 1 << 22, 1 << 28):
        folder = tmp_path / str(memory)
        arrays = x_ng.indptr, x_ng.indices, x_ng.data
        rows = compressed_rows(
            False, arrays, "X", names("c", 5000), names("g", 80), request(str(folder), memory)
        )
        rows(0, 1)
        assert sorted(p.name for p in (folder / "spill").iterdir()) == ["data", "indices"]
        made.append([(folder / "spill" / name).read_bytes() for name in ("data", "indices")])
    assert made[0] == made[1] == made[2]


def test_memory_is_bounded(tmp_path: Path) -> None:
    """60 MB of entries through 16 MB: numpy's allocations are counted by tracemalloc."""
    n_cells, n_genes, per_gene = 20_000, 500, 10_000
    memory = 16 << 20
    rng = np.random.default_rng(0)

    def entries(limit: int) -> Iterator[Entries]:
        for gene in range(n_genes):
            cells = np.sort(rng.choice(n_cells, per_gene, replace=False))
            for at in range(0, per_gene, limit):
                part = cells[at : at + limit]
                yield part, np.full(len(part), gene), np.ones(len(part), dtype=np.float32)

    made = Spill(
        n_genes * per_gene,
        np.dtype(np.float32),
        names("c", n_cells),
        names("g", n_genes),
        request(str(tmp_path), memory),
    )
    tracemalloc.start()
    rows = made.make(entries, text=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < memory
    assert sum(rows(at, at + 2000).nnz for at in range(0, n_cells, 2000)) == n_genes * per_gene


def test_the_spill_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = spill.Spill.make
    monkeypatch.setattr(spill.Spill, "make", lambda *a: calls.append(1) or original(*a))
    x_ng = sparse.random(50, 20, 0.3, format="csc", random_state=np.random.default_rng(0))
    arrays = x_ng.indptr, x_ng.indices, x_ng.data
    rows = compressed_rows(False, arrays, "X", names("c", 50), names("g", 20), request(str(tmp_path)))
    assert not (tmp_path / "spill").exists()
    for at in range(0, 50, 5):
        rows(at, at + 5)
    assert len(calls) == 1


def test_bad_csc(tmp_path: Path) -> None:
    cells, genes = names("c", 4), names("g", 2)
    wanted = replace(request(str(tmp_path)), location="bad.h5ad")
    indptr, data = np.array([0, 2, 3]), np.ones(3)
    rows = compressed_rows(False, (indptr, np.array([0, 4, 1]), data), "X", cells, genes, wanted)
    with pytest.raises(BadFileError, match="cell index 4 of gene 'g0'"):
        rows(0, 4)
    rows = compressed_rows(False, (indptr, np.array([1, 1, 1]), data), "X", cells, genes, wanted)
    with pytest.raises(BadFileError, match="gene 'g0' occurs twice in cell 'c1'"):
        rows(0, 4)
