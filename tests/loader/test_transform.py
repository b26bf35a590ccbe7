import numpy as np
import pytest
from scipy import sparse

from streamx.errors import UsageError
from streamx.loader.transform import (
    ToDevice,
    Transform,
    apply_transform,
    dense,
    inverse_of,
    ready,
    transformed,
)


def counts(n: int = 500, g: int = 31) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.poisson(0.4, (n, g)).astype(np.float32)
    x[3] = 0
    return x


@pytest.mark.parametrize("binarize", [False, True])
@pytest.mark.parametrize("target", [None, 1e4])
@pytest.mark.parametrize("log1p", [False, True])
@pytest.mark.parametrize("scale", [None, "batch", "global"])
def test_equals_the_dense_arithmetic(
    binarize: bool, target: float | None, log1p: bool, scale: str | None
) -> None:
    x, rng = counts(), np.random.default_rng(1)
    total = x.sum(1) * 2
    batch = rng.integers(0, 3, len(x)) if scale == "batch" else np.zeros(len(x), int)
    table = rng.random((3, x.shape[1])).astype(np.float32) * 4
    table[1, 5] = 0
    want = (x > 0).astype(float) if binarize else x.astype(float)
    if target:
        want *= np.divide(target, total, out=np.ones_like(total), where=total > 0)[:, None]
    want = np.log1p(want) if log1p else want
    if scale:
        want /= np.where(table == 0, 1, table)[batch]
    got = sparse.csr_matrix(x)
    apply_transform(
        got,
        Transform(binarize, target, "view_total", log1p, scale),
        total_n=total,
        batch_n=batch,
        scale_bg=table,
    )
    np.testing.assert_allclose(got.toarray(), want, rtol=1e-6)
    assert got.dtype == np.float32


def test_other_dtypes_and_counts_without_end() -> None:
    """Counts as they are stored, small and large ones."""
    x = counts().astype(np.uint32)
    x[3, 5], x[4, 6], x[4, 7] = 63, 64, 4_000_000
    csr = sparse.csr_matrix(x)
    total = x.sum(1)
    for dtype in (np.uint16, np.uint32, np.float32):
        if x.max() > np.iinfo(np.uint16).max and dtype == np.uint16:
            continue
        got = np.empty(csr.nnz, np.float32)
        transformed(
            csr.indptr, csr.indices.astype(np.uint16), csr.data.astype(dtype),
            Transform(target_sum=1e4, log1p=True), total, None, None, got,
        )  # fmt: skip
        want = np.log1p(csr.data * (1e4 / total)[np.repeat(np.arange(len(total)), np.diff(csr.indptr))])
        np.testing.assert_allclose(got, want, rtol=2e-6)
    halves = sparse.csr_matrix(np.array([[0.5, 1.5, np.inf, 2.0, 0.0, 2.0]], dtype=np.float32))
    apply_transform(halves, Transform(log1p=True))
    np.testing.assert_allclose(halves.data, np.log1p([0.5, 1.5, np.inf, 2.0, 2.0]), rtol=1e-6)


def test_logarithms_are_as_exact_as_float32_can_be() -> None:
    """Within 0.7 units in the last place (6e-8 each way is a half) over all magnitudes, and at the ends."""
    x = np.concatenate([np.logspace(-30, 38, 200_001), np.linspace(-0.99, 3, 100_001)]).astype(np.float32)
    ends = np.array([0, -1, -2, np.inf, -np.inf, np.nan], np.float32)
    for values in (x, ends):
        got, indptr = np.empty_like(values), np.array([0, len(values)])
        gene = np.zeros(len(values), np.uint16)
        transformed(indptr, gene, values, Transform(log1p=True), None, None, None, got)
        with np.errstate(divide="ignore", invalid="ignore"):
            want = np.log1p(values.astype(np.float64))
        np.testing.assert_allclose(got, want, rtol=8.5e-8)


def test_dense_rows() -> None:
    x = counts()
    csr = sparse.csr_matrix(x)
    for start, stop in ((0, 500), (3, 4), (7, 7), (490, 500)):
        assert np.array_equal(dense(csr, start, stop), x[start:stop])
    assert dense(csr, 0, 5).dtype == np.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
def test_rows_made_on_the_device(device: str, dtype: type) -> None:
    x = counts().astype(dtype)
    csr, total, batch = sparse.csr_matrix(x), x.sum(1).astype(np.float32), np.arange(len(x)) % 3
    table = np.random.default_rng(0).uniform(0.5, 2, (3, x.shape[1])).astype(np.float32)
    transform = Transform(target_sum=1e4, log1p=True, scale="batch")
    want = csr.astype(np.float32)
    apply_transform(want, transform, total_n=total, batch_n=batch, scale_bg=table)
    move = ToDevice(device, x.shape[1], transform, inverse_of(table))
    got, columns, event = move(
        csr.indptr, csr.indices.astype(np.uint16), csr.data, {"total": total, "batch": batch}
    )
    ready(event, [got])
    np.testing.assert_allclose(got.cpu().numpy(), want.toarray(), rtol=2e-6)
    assert columns["batch"].cpu().numpy().tolist() == batch.tolist()


def test_a_step_of_a_later_version_is_refused() -> None:
    assert Transform.of(None) == Transform()
    with pytest.raises(UsageError, match="unknown steps: sqrt"):
        Transform.of({"sqrt": True})
