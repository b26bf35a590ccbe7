import numpy as np

from streamx.models.background import empirical_background


def stained(rng: np.random.Generator, n: int = 300, n_proteins: int = 30) -> np.ndarray:
    """Cells whose ln(counts) are about 2 in the background and about 5 in the foreground (one in three)."""
    foreground_np = rng.random((n, n_proteins)) < 1 / 3
    return rng.poisson(np.exp(np.where(foreground_np, 5.0, 2.0) + rng.normal(0, 0.2, (n, n_proteins))))


def test_finds_the_lower_of_two_modes() -> None:
    rng = np.random.default_rng(0)
    mean_pb, sd_pb = empirical_background([stained(rng)], rng)
    assert mean_pb.shape == sd_pb.shape == (30, 1)
    assert mean_pb.dtype == sd_pb.dtype == np.float32
    assert np.ptp(mean_pb) == np.ptp(sd_pb) == 0, "all proteins alike"
    assert abs(mean_pb[0, 0] - np.log1p(np.exp(2.0))) < 0.2
    # A single cell's spread is some 0.4 (0.2, and Poisson noise at 7 counts); a hundredth of ten cells' root.
    assert 0.02 < sd_pb[0, 0] < 0.06


def test_cells_and_batches_that_tell_nothing() -> None:
    rng = np.random.default_rng(0)
    cells = stained(rng, 50)
    measured_bp = np.ones((4, 30), bool)
    measured_bp[2, 4:] = False  # four proteins are too few
    batches = [np.zeros((20, 30)), cells[:0], cells, cells]
    mean_pb, sd_pb = empirical_background(batches, rng, measured_bp)
    np.testing.assert_array_equal(mean_pb[:, :3], np.float32([[0, 0, 0]] * 30))
    np.testing.assert_allclose(sd_pb[:, :3], [[0.005, 1, 0.05]] * 30, rtol=1e-6)
    assert mean_pb[0, 3] > 1


def test_the_generator_decides() -> None:
    cells = stained(np.random.default_rng(0), 50)
    one, two, other = (empirical_background([cells], np.random.default_rng(s))[0] for s in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
