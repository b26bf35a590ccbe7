"""Composition-matched statistics: what they keep, what they remove, and that they are statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamx.config import ScalexConfig
from streamx.models.matched import as_statistics, fit_query, fit_reference, normalised, stay
from streamx.models.scalex import Scalex, encode, norm_stats, running_stats

GENES, TYPES, PER_TYPE = 60, 3, 400


def cells(rng: np.random.Generator, types: list[int], effect_g: np.ndarray | float = 0.0) -> np.ndarray:
    """Cells of the given types, float32 in [0, 1]; a batch effect scales their genes."""
    profile_tg = np.kron(np.eye(TYPES), np.full(GENES // TYPES, 0.5)) + 0.2
    x_ng = profile_tg[np.repeat(types, PER_TYPE)] + rng.normal(0, 0.05, (PER_TYPE * len(types), GENES))
    return np.clip(x_ng * (1 + effect_g), 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Scalex:
    """A network whose running statistics are those of the reference."""
    torch.manual_seed(0)
    module = Scalex(GENES, 2, ScalexConfig(n_hidden=64, n_latent=5), torch.Generator().manual_seed(1))
    x_ng = torch.as_tensor(cells(np.random.default_rng(0), [0, 1, 2]))
    with torch.no_grad():
        h_nh = module.encoder.hidden(x_ng)
        module.encoder.norm.running_mean.copy_(h_nh.mean(0))
        module.encoder.norm.running_var.copy_(h_nh.var(0))
    return module.eval()


def latent(model: Scalex, x_ng: np.ndarray, mean_h: np.ndarray, var_h: np.ndarray) -> np.ndarray:
    given = lambda: [(x_ng, np.zeros(len(x_ng), np.int64))]  # noqa: E731
    return next(iter(encode(model, given, mean_h[None], var_h[None])))


def reference(model: Scalex) -> tuple:
    rng = np.random.default_rng(1)
    x_ng = np.concatenate([cells(rng, [0, 1, 2]), cells(rng, [0, 1, 2])])
    batch_n = np.repeat([0, 1], len(x_ng) // 2)
    clusters, moves = fit_reference(model, normalised(model, x_ng), batch_n, 2, min_cells=200, seed=0)
    return x_ng, batch_n, clusters, moves


def test_staying_is_the_running_statistics(model: Scalex) -> None:
    for ours, running in zip(as_statistics(model, stay(64)), running_stats(model), strict=True):
        np.testing.assert_allclose(ours, running, rtol=1e-12)


def test_a_move_is_a_mean_and_a_variance(model: Scalex) -> None:
    x_ng, _, clusters, _ = reference(model)
    move = fit_query(model, normalised(model, x_ng[:300]), clusters)
    encoder = model.encoder
    with torch.no_grad():
        u = torch.as_tensor(move(normalised(model, x_ng)))
        want = encoder.mean(torch.relu(u * encoder.norm.weight + encoder.norm.bias)).numpy()
    np.testing.assert_allclose(latent(model, x_ng, *as_statistics(model, move)), want, atol=1e-5)


def test_one_type_stays_itself_and_loses_its_batch_effect(model: Scalex) -> None:
    """The point of it: with its own statistics a query of one type is spread over all types."""
    x_ng, _, clusters, moves = reference(model)
    home = latent(model, x_ng[:PER_TYPE], *as_statistics(model, moves[0])).mean(0)
    rng = np.random.default_rng(2)
    query = cells(rng, [0], rng.normal(0, 0.08, GENES))
    stats = norm_stats(model, lambda: [(query, np.zeros(len(query), np.int64))], 1)
    move = fit_query(model, normalised(model, query), clusters)
    away = {
        "matched": latent(model, query, *as_statistics(model, move)),
        "running": latent(model, query, *running_stats(model)),
        "domain": latent(model, query, stats.mean_bh[0], stats.var_bh[0]),
    }
    distance = {name: float(np.linalg.norm(z.mean(0) - home)) for name, z in away.items()}
    assert distance["matched"] < min(distance["running"], distance["domain"]), distance


def test_few_cells_hardly_move(model: Scalex) -> None:
    _, _, clusters, _ = reference(model)
    rng = np.random.default_rng(3)
    query = cells(rng, [1], rng.normal(0, 0.1, GENES))
    u_nh = normalised(model, query)

    def size(n: int) -> float:
        return float(np.abs(fit_query(model, u_nh[:n], clusters)(u_nh[:n]) - u_nh[:n]).mean())

    assert size(5) < 0.5 * size(PER_TYPE)
    np.testing.assert_array_equal(fit_query(model, u_nh[:1], clusters)(u_nh[:1]), u_nh[:1])


def test_small_batches_of_the_reference_stay(model: Scalex) -> None:
    x_ng = cells(np.random.default_rng(4), [0, 1, 2])
    batch_n = np.zeros(len(x_ng), np.int64)
    batch_n[:150] = 1
    _, moves = fit_reference(model, normalised(model, x_ng), batch_n, 2, min_cells=200, seed=0)
    assert np.array_equal(moves[1].gain_h, np.ones(64))
    assert not np.array_equal(moves[0].gain_h, np.ones(64))


def test_identical_cells_give_finite_latents(model: Scalex) -> None:
    x_ng = np.zeros((500, GENES), np.float32)
    clusters, moves = fit_reference(
        model, normalised(model, x_ng), np.zeros(500, np.int64), 1, min_cells=200, seed=0
    )
    assert np.isfinite(latent(model, x_ng, *as_statistics(model, moves[0]))).all()
    move = fit_query(model, normalised(model, x_ng), clusters)
    assert np.isfinite(latent(model, x_ng, *as_statistics(model, move))).all()
