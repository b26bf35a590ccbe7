"""FOSCTTM against its definition written out, and at its ends."""

from __future__ import annotations

import numpy as np
import pytest

from streamx.errors import BadValuesError
from streamx.metrics import foscttm as module
from streamx.metrics.foscttm import closer_shares, foscttm


def brute_force(a: np.ndarray, b: np.ndarray) -> tuple[list[float], list[float]]:
    n = len(a)

    def of(x: np.ndarray, y: np.ndarray) -> list[float]:
        far = [[np.linalg.norm(x[i] - y[j]) for j in range(n)] for i in range(n)]
        return [sum(far[i][j] < far[i][i] for j in range(n) if j != i) / (n - 1) for i in range(n)]

    return of(a, b), of(b, a)


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_is_its_definition(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 5)).astype(np.float32) + 30  # far from the origin
    b = a + rng.normal(0, 0.8, (60, 5)).astype(np.float32)
    monkeypatch.setattr(module, "BLOCK_VALUES", block)
    shares, expected = closer_shares(a, b), brute_force(a, b)
    np.testing.assert_array_equal(shares[0], expected[0])
    np.testing.assert_array_equal(shares[1], expected[1])
    assert foscttm(a, b) == pytest.approx(np.mean(expected), abs=1e-12)
    assert foscttm(a, b) == pytest.approx(foscttm(b, a), abs=1e-12)
    assert 0 < foscttm(a, b) < 0.3


def test_ends() -> None:
    a = np.random.default_rng(1).normal(size=(400, 3))
    assert foscttm(a, a) == 0
    assert foscttm(a, a[np.random.default_rng(2).permutation(400)]) == pytest.approx(0.5, abs=0.05)
    assert foscttm(a, a[[1, 0, *range(2, 400)]]) == pytest.approx(0, abs=0.01)
    line = np.array([[0.0], [1.0]])
    assert foscttm(line, line[::-1]) == 1


def test_what_is_as_far_is_not_closer() -> None:
    a = np.random.default_rng(3).normal(size=(40, 4)).astype(np.float32)
    twice = np.concatenate([a, a]) * np.float32(1e3)  # every cell's match has a twin at the same place
    assert foscttm(twice, twice) == 0
    assert foscttm(np.zeros((9, 2)), np.zeros((9, 2))) == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2))),
        (np.zeros((3, 2)), np.zeros((3, 1))),
        (np.zeros((1, 2)), np.zeros((1, 2))),
        (np.zeros(3), np.zeros(3)),
        (np.full((3, 2), np.nan), np.zeros((3, 2))),
    ],
)
def test_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(BadValuesError):
        foscttm(a, b)
