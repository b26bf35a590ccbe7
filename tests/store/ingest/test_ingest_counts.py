"""Every value is scanned; what is no count is named."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from streamx.errors import BadValuesError
from streamx.store.ingest import Source, check_counts, open_sources

COUNTS = np.random.default_rng(0).poisson(1.0, (40, 30)).astype(np.float32)


def source_of(x: np.ndarray, path: Path, **layers: np.ndarray) -> Source:
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(len(x))])
    made = ad.AnnData(
        sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])])
    )
    made.layers.update({name: sparse.csr_matrix(value) for name, value in layers.items()})
    made.write_h5ad(path / "a.h5ad")
    (source,) = open_sources([path / "a.h5ad"], scratch=path, memory=1 << 20)
    return source


def scan(source: Source, allow_float: bool = False, step: int = 7) -> None:
    try:
        for at in range(0, source.n_obs, step):
            check_counts(source.read(at, at + step), source=source, first_row=at, allow_float=allow_float)
    finally:
        source.close()


@pytest.mark.parametrize(
    ("value", "words", "with_float"),
    [
        (np.nan, "nan .*not a finite number", True),
        (np.inf, "inf .*not a finite number", True),
        (-np.inf, "-inf .*not a finite number", True),
        (-1.0, "-1.0 .*negative", False),
        (2.5, "2.5 .*not an integer", False),
    ],
)
def test_one_bad_value_is_found(value: float, words: str, with_float: bool, tmp_path: Path) -> None:
    x = COUNTS.copy()
    x[33, 17] = value
    with pytest.raises(BadValuesError, match=words) as caught:
        scan(source_of(x, tmp_path))
    assert "gene 'g17' in cell 'cell33' (row 33)" in str(caught.value)
    assert str(tmp_path / "a.h5ad") in str(caught.value)
    if with_float:
        with pytest.raises(BadValuesError, match="not a finite"):
            scan(source_of(x, tmp_path), allow_float=True)
    else:
        scan(source_of(x, tmp_path), allow_float=True)


def test_counts_pass(tmp_path: Path) -> None:
    scan(source_of(COUNTS, tmp_path))


def test_negative_integers(tmp_path: Path) -> None:
    x = COUNTS.astype(np.int32)
    x[3, 4] = -2
    with pytest.raises(BadValuesError, match="value -2 of gene 'g4' in cell 'cell3'"):
        scan(source_of(x, tmp_path))


def test_log_normalised_is_named_and_the_layer_that_holds_counts_too(tmp_path: Path) -> None:
    x = np.log1p(COUNTS / COUNTS.sum(1, keepdims=True) * 1e4)
    with pytest.raises(BadValuesError, match=r"log-normalised \(log1p of 10000") as caught:
        scan(source_of(x, tmp_path, raw_counts=COUNTS, scaled=COUNTS - 0.5))
    assert caught.value.fix is not None
    assert "--layer raw_counts" in caught.value.fix
    assert "scaled" not in caught.value.fix
    assert "--allow-float" in caught.value.fix
    with pytest.raises(BadValuesError) as caught:
        scan(source_of(x, tmp_path))
    assert caught.value.fix is not None
    assert "--layer" not in caught.value.fix


def test_other_transforms_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadValuesError, match="normalised to 10000 per cell"):
        scan(source_of(COUNTS / COUNTS.sum(1, keepdims=True) * 1e4, tmp_path))
    with pytest.raises(BadValuesError, match="scaled or centred"):
        scan(source_of(COUNTS - COUNTS.mean(0), tmp_path))
    with pytest.raises(BadValuesError, match="looks log-transformed"):
        scan(source_of(np.log1p(COUNTS), tmp_path))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 39),
    st.integers(0, 29),
    st.sampled_from([np.nan, np.inf, -3.0, 0.25]),
    st.sampled_from([np.float32, np.float64]),
    st.integers(1, 40),
)
def test_any_place_is_found(row: int, gene: int, value: float, dtype: type, step: int) -> None:
    x = COUNTS.astype(dtype)
    x[row, gene] = value
    made = ad.AnnData(sparse.csr_matrix(x))
    (source,) = open_sources([made], scratch=Path("nowhere"), memory=1 << 20)
    with pytest.raises(BadValuesError, match=f"gene '{gene}' in cell '{row}' "):
        scan(source, step=step)
