import numpy as np
import pytest
import torch
from scipy import sparse

from streamx.errors import UsageError
from streamx.loader.transform import Transform, apply_transform, dense, dense_tensor


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


def test_chunks_of_values_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = counts()
    results = []
    for size in (1, 100, 1 << 20):
        monkeypatch.setattr("streamx.loader.transform._VALUES_AT_ONCE", size)
        got = sparse.csr_matrix(x)
        apply_transform(got, Transform(target_sum=1e4, log1p=True), total_n=x.sum(1))
        results.append(got.data)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_dense_rows() -> None:
    x = counts()
    csr = sparse.csr_matrix(x)
    for start, stop in ((0, 500), (3, 4), (7, 7), (490, 500)):
        assert np.array_equal(dense(csr, start, stop), x[start:stop])
        assert torch.equal(dense_tensor(csr, start, stop, "cpu"), torch.from_numpy(x[start:stop]))
    assert dense(csr, 0, 5).dtype == np.float32


@pytest.mark.gpu
def test_dense_rows_on_the_device() -> None:
    x = counts()
    got = dense_tensor(sparse.csr_matrix(x), 100, 300, "cuda")
    assert torch.equal(got.cpu(), torch.from_numpy(x[100:300]))


def test_a_step_of_a_later_version_is_refused() -> None:
    assert Transform.of(None) == Transform()
    with pytest.raises(UsageError, match="unknown steps: sqrt"):
        Transform.of({"sqrt": True})
