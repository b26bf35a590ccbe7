from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from count_models import N_GENES, N_PROTEINS, repeated, scanvi, scvi, seed, some_cells, totalvi

from streamx.errors import UsageError
from streamx.models.cells import Cells
from streamx.posterior import expression as ex
from streamx.posterior.expression import Asked

MODELS = {
    "scvi": scvi,
    "scanvi": scanvi,
    "totalvi": totalvi,
    "latent library": lambda: totalvi(use_observed_lib_size=False),
}


def whole(found: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> tuple[np.ndarray, Any]:
    """Of all minibatches, genes and proteins."""
    genes, proteins = zip(*found, strict=True)
    return np.concatenate(genes), None if proteins[0] is None else np.concatenate(proteins)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_at_the_mean_it_is_the_decoder_at_the_mean(make: Any) -> None:
    module, parts = make(), [some_cells(7), some_cells(9, 1)]
    got, proteins = whole(ex.normalized_expression(module, parts, Asked(n_samples=0, library_size=1e4)))
    module.eval()
    want = []
    with torch.no_grad():
        for cells in parts:
            decoded = module.decode(module.encode(cells)[0], torch.zeros(len(cells)), cells)
            want.append(getattr(decoded, "genes", decoded).scale_ng)
            if proteins is not None:
                p = decoded.proteins
                want_np = (p.back_mean_np.exp() * p.fore_scale_np * torch.sigmoid(-p.mixing_np)).numpy()
                np.testing.assert_allclose(
                    proteins[: len(cells)] if cells is parts[0] else proteins[7:], want_np, rtol=1e-5
                )
    np.testing.assert_allclose(got, 1e4 * torch.cat(want).numpy(), rtol=1e-6)
    np.testing.assert_allclose(got.sum(axis=1), 1e4, rtol=1e-5)
    assert (proteins is None) == (make in (scvi, scanvi))


def test_sa11_batches_are_averaged_and_features_chosen() -> None:
    module, cells = totalvi(), [some_cells()]
    genes, proteins = np.array([4, 1]), np.array([2])

    def of(*batches: int | None) -> tuple[np.ndarray, Any]:
        return whole(ex.normalized_expression(module, cells, Asked(batches=batches, n_samples=0)))

    asked = Asked(batches=(0, 2), genes=genes, proteins=proteins, n_samples=0)
    got = whole(ex.normalized_expression(module, cells, asked))
    for which, (one, columns) in enumerate(zip(got, (genes, proteins), strict=True)):
        np.testing.assert_allclose(one, (of(0)[which] + of(2)[which])[:, columns] / 2, rtol=1e-5)
        assert np.abs(of(0)[which] - of(2)[which]).max() > 1e-3
        own_n = np.arange(20) % 3 == 2
        np.testing.assert_array_equal(of(None)[which][own_n], of(2)[which][own_n])
    with pytest.raises(IndexError, match="3 batches"):
        of(3)
    with pytest.raises(UsageError):
        Asked(batches=())
    with pytest.raises(UsageError):
        Asked(library_size="observed")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_samples_and_their_mean(make: Any) -> None:
    module, cells = make(), [some_cells(7), some_cells(9, 1)]
    every = list(ex.normalized_expression(module, cells, Asked(n_samples=5, return_mean=False), seed()))
    assert every[1][0].shape == (5, 9, N_GENES)
    assert every[1][0].std(axis=0).min() > 0
    mean = list(ex.normalized_expression(module, cells, Asked(n_samples=5), seed()))
    for draws, means in zip(every, mean, strict=True):
        for draw, one in zip(draws, means, strict=True):
            if draw is not None:
                np.testing.assert_allclose(draw.mean(axis=0), one, rtol=1e-5)
    once = next(ex.normalized_expression(module, cells, Asked(return_mean=False), seed()))
    assert once[0].shape == (7, N_GENES)


def test_sa16_the_latent_library_size() -> None:
    cells = some_cells()
    total_n = cells.x_ng.sum(1).numpy()
    got, _ = whole(ex.normalized_expression(scvi(), [cells], Asked(library_size="latent")))
    np.testing.assert_allclose(got.sum(axis=1), total_n, rtol=1e-5)
    (observed_n,) = ex.latent_library_size(scvi(), [cells])
    np.testing.assert_allclose(observed_n, total_n, rtol=1e-6)
    module = totalvi(use_observed_lib_size=False)
    (mean_n,) = ex.latent_library_size(module, [cells])
    (draws_sn,) = ex.latent_library_size(module, [repeated(cells, 4000)], False, seed())
    draws_sn = draws_sn.reshape(4000, 20)
    assert (np.abs(draws_sn.mean(axis=0) - mean_n) < 5 * draws_sn.std(axis=0) / 4000**0.5).all()


def test_sa17_proteins() -> None:
    module, cells = totalvi(), some_cells()
    many = [repeated(cells, 3000)]

    def of(on: list[Cells] = [cells], **settings: Any) -> np.ndarray:  # noqa: B006
        return whole(ex.normalized_expression(module, on, Asked(**{"n_samples": 0} | settings), seed()))[1]

    plain, background = of(), of(include_background=True)
    (share,) = ex.foreground_probability(module, [cells], Asked(n_samples=0))
    assert ((share > 0) & (share < 1)).all()
    fore = plain / share
    (parameters,) = ex.likelihood_parameters(module, [cells], 0)
    np.testing.assert_allclose(parameters["protein_mixing"], 1 - share, rtol=1e-4)
    efficiency = module.log_efficiency_pb.detach().exp().numpy().T[cells.batch_n.numpy()]
    ratio = parameters["protein_foreground"] / parameters["protein_background"]
    np.testing.assert_allclose(background, plain + (1 - share) * fore / ratio, rtol=1e-4)
    assert np.abs(efficiency - 1).max() > 0.1
    np.testing.assert_allclose(of(scale_protein=True), plain / plain.sum(axis=1, keepdims=True), rtol=1e-5)
    sampled = of(many, sample_mixing=True).reshape(3000, 20, N_PROTEINS)
    assert (np.isclose(sampled, 0) | np.isclose(sampled, fore, rtol=1e-4)).all()
    error = 5 * np.sqrt(share * (1 - share) / 3000)
    assert (np.abs((sampled > 0).mean(axis=0) - share) < error).all()
    with pytest.raises(UsageError, match="no proteins"):
        next(ex.foreground_probability(scvi(), [cells]))


def test_proteins_are_imputed_without_being_looked_at() -> None:
    module, cells = totalvi(), some_cells()
    measured_p = np.array([True, False, True, False, True])
    other = Cells(
        cells.x_ng, cells.batch_n, protein_np=torch.where(torch.as_tensor(measured_p), cells.protein_np, 50.0)
    )
    asked = Asked(batches=(0, 1), n_samples=0, measured_p=measured_p)
    one, two = (whole(ex.normalized_expression(module, [on], asked)) for on in (cells, other))
    np.testing.assert_array_equal(one[1], two[1])
    plain = Asked(batches=(0, 1), n_samples=0)
    assert np.abs(whole(ex.normalized_expression(module, [other], plain))[1] - one[1]).max() > 1e-3


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_sa15_parameters_and_counts_of_scvi(likelihood: str) -> None:
    module, cells = scvi(gene_likelihood=likelihood), some_cells()
    (found,) = ex.likelihood_parameters(module, [cells], 4, generator=seed())
    (mean,) = ex.likelihood_parameters(module, [cells], 4, give_mean=True, generator=seed())
    assert set(found) == {"mean"} | ({"dispersions"} if likelihood != "poisson" else set()) | (
        {"dropout"} if likelihood == "zinb" else set()
    )
    for name, value in found.items():
        assert value.shape == (4, 20, N_GENES)
        np.testing.assert_allclose(mean[name], value.mean(axis=0), rtol=1e-5)
    drawn, proteins = next(ex.posterior_predictive(module, [cells], Asked(n_samples=3000), seed()))
    assert proteins is None
    assert drawn.shape == (3000, 20, N_GENES)
    assert (drawn == drawn.round()).all()
    (found,) = ex.likelihood_parameters(module, [cells], 3000, generator=seed(1))
    want = found["mean"] * (1 - found.get("dropout", 0))
    error = np.sqrt((drawn.var(axis=0) + want.var(axis=0)) / 3000)
    assert (np.abs(drawn.mean(axis=0) - want.mean(axis=0)) < 5 * error).all()


def test_sa13_counts_of_totalvi() -> None:
    module, cells = totalvi(), some_cells()
    chosen = {"genes": np.array([3]), "proteins": np.array([0, 4])}
    drawn, proteins = next(ex.posterior_predictive(module, [cells], Asked(n_samples=3000, **chosen), seed()))
    assert drawn.shape == (3000, 20, 1)
    assert proteins is not None
    assert proteins.shape == (3000, 20, 2)
    (found,) = ex.likelihood_parameters(module, [cells], 3000, generator=seed(1))
    share = found["protein_mixing"]
    want = share * found["protein_background"] + (1 - share) * found["protein_foreground"]
    want = want[..., [0, 4]]
    error = np.sqrt((proteins.var(axis=0) + want.var(axis=0)) / 3000)
    assert (np.abs(proteins.mean(axis=0) - want.mean(axis=0)) < 5 * error).all()
    once, _ = next(ex.posterior_predictive(module, [cells], Asked(batches=(2,)), seed()))
    assert once.shape == (20, N_GENES)
    with pytest.raises(UsageError, match="one batch"):
        next(ex.posterior_predictive(module, [cells], Asked(batches=(0, 1))))


def test_draws_for_differential_expression() -> None:
    module, cells = totalvi(), some_cells(40)

    def cells_of(row_n: np.ndarray) -> Iterable[Cells]:
        for part in np.array_split(row_n, 3):
            yield Cells(cells.x_ng[part], cells.batch_n[part], protein_np=cells.protein_np[part])

    sampler = ex.de_sampler(module, cells_of, protein_prior_count=0.1, generator=seed())
    row_n = np.sort(np.random.default_rng(0).integers(0, 40, 30))
    scale_sg = sampler(row_n, 1)
    assert scale_sg.shape == (30, N_GENES + N_PROTEINS)
    np.testing.assert_allclose(scale_sg[:, :N_GENES].sum(axis=1), 1, rtol=1e-5)
    assert scale_sg[:, N_GENES:].min() > 0.1
    same = row_n[1:] == row_n[:-1]
    assert same.any()
    assert (scale_sg[1:] != scale_sg[:-1]).any(axis=1).all(), "a cell drawn twice has two draws"
    again = ex.de_sampler(module, cells_of, generator=seed())(row_n, None)
    assert not np.allclose(again, scale_sg)
