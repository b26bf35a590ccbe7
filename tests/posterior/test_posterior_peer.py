"""scvi-tools 1.4.2's methods beside ours, on equal weights: exactly where nothing is drawn, else within the
error of their draws."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pytest
import torch

from streamx.config import DifferentialConfig
from streamx.interop import scvi_tools, scvi_totalvi
from streamx.models.cells import Cells
from streamx.posterior import correlation, de, evidence
from streamx.posterior import expression as ex
from streamx.posterior.expression import Asked

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

N, G, P = 60, 15, 5
DRAWS = 400


def data() -> anndata.AnnData:
    rng = np.random.default_rng(0)
    cells = anndata.AnnData(rng.poisson(3.0, (N, G)).astype(np.float32))
    cells.obs["batch"] = np.array(["a", "b", "c"])[np.arange(N) % 3]
    cells.obsm["proteins"] = rng.poisson(8.0, (N, P)).astype(np.float32)
    return cells


def peer_and_ours(kind: str) -> SimpleNamespace:
    import scvi

    torch.manual_seed(0)
    cells = data()
    if kind == "scvi":
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
        peer = scvi.model.SCVI(cells, n_latent=4, n_hidden=16)
        ours: Any = scvi_tools.module_from("scvi", peer.module.state_dict(), {})
    else:
        scvi.model.TOTALVI.setup_anndata(cells, protein_expression_obsm_key="proteins", batch_key="batch")
        peer = scvi.model.TOTALVI(cells, n_latent=4, n_hidden=16, empirical_protein_background_prior=False)
        peer.module.background_pro_alpha.data.fill_(0.2)  # near an untrained posterior: weights vary less
        ours = scvi_totalvi.module_from(peer.module.state_dict(), {}, scvi.__version__)
    peer.is_trained_ = True
    peer.module.eval()
    whole = Cells(
        torch.as_tensor(cells.X), torch.arange(N) % 3, protein_np=torch.as_tensor(cells.obsm["proteins"])
    )
    return SimpleNamespace(peer=peer, ours=ours.eval(), cells=[whole], kind=kind)


@pytest.fixture(params=["scvi", "totalvi"])
def both(request: pytest.FixtureRequest) -> SimpleNamespace:
    return peer_and_ours(request.param)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def as_many(peer: Callable[[], Any], ours: Callable[[], Any], n: int) -> None:
    """``n`` values of each have the same mean, within five standard errors."""
    theirs, mine = (np.array([draw() for _ in range(n)], np.float64) for draw in (peer, ours))
    error = np.sqrt((theirs.var(axis=0) + mine.var(axis=0)) / n) + 1e-6
    assert (np.abs(theirs.mean(axis=0) - mine.mean(axis=0)) < 5 * error).all()


def test_latent_means_are_equal(both: SimpleNamespace) -> None:
    want = both.peer.get_latent_representation()
    np.testing.assert_allclose(both.ours.encode(both.cells[0])[0].detach().numpy(), want, atol=1e-5)


def test_normalised_expression(both: SimpleNamespace) -> None:
    asked = Asked(batches=(1, 2), n_samples=DRAWS, return_mean=False, library_size="latent")
    torch.manual_seed(1)
    settings: dict[str, Any] = {"transform_batch": ["b", "c"], "library_size": "latent", "return_numpy": True}
    theirs = both.peer.get_normalized_expression(n_samples=DRAWS, return_mean=False, **settings)
    mine = next(iter(ex.normalized_expression(both.ours, both.cells, asked, seed())))
    if both.kind == "scvi":
        pairs = [(theirs, mine[0])]
    else:
        pairs = [(np.moveaxis(t, -1, 0), m) for t, m in zip(theirs, mine, strict=True)]
    for want, got in pairs:
        assert want.shape == got.shape
        error = np.sqrt((want.var(axis=0) + got.var(axis=0)) / DRAWS)
        assert (np.abs(want.mean(axis=0) - got.mean(axis=0)) < 5 * error).all()


def test_protein_options() -> None:
    both = peer_and_ours("totalvi")
    for name, options in (
        ("scale_protein", {"scale_protein": True}),
        ("background", {"include_background": True}),
        ("mixing", {"sample_mixing": True}),
    ):
        theirs_of = {
            "scale_protein": "scale_protein",
            "background": "include_protein_background",
            "mixing": "sample_protein_mixing",
        }
        torch.manual_seed(1)
        _, want = both.peer.get_normalized_expression(
            n_samples=DRAWS, return_mean=False, return_numpy=True, **{theirs_of[name]: True}
        )
        asked = Asked(n_samples=DRAWS, return_mean=False, **options)
        _, got = next(iter(ex.normalized_expression(both.ours, both.cells, asked, seed())))
        want = np.moveaxis(want, -1, 0)
        error = np.sqrt((want.var(axis=0) + got.var(axis=0)) / DRAWS)
        assert (np.abs(want.mean(axis=0) - got.mean(axis=0)) < 5 * error).all(), name
    torch.manual_seed(1)
    want = both.peer.get_protein_foreground_probability(n_samples=DRAWS, return_mean=False, return_numpy=True)
    asked = Asked(n_samples=DRAWS, return_mean=False)
    got = next(iter(ex.foreground_probability(both.ours, both.cells, asked, seed())))
    want = np.moveaxis(want, -1, 0)
    error = np.sqrt((want.var(axis=0) + got.var(axis=0)) / DRAWS)
    assert (np.abs(want.mean(axis=0) - got.mean(axis=0)) < 5 * error).all()


def test_lower_bound_and_errors(both: SimpleNamespace) -> None:
    torch.manual_seed(1)
    draw = seed()
    as_many(
        lambda: float(both.peer.get_elbo(batch_size=N)),
        lambda: evidence.elbo(both.ours, both.cells, draw),
        60,
    )
    names = {"reconstruction_loss": "reconstruction", "reconst_loss_gene": "reconstruction_gene"}
    names["reconst_loss_protein"] = "reconstruction_protein"
    theirs = list(both.peer.get_reconstruction_error(batch_size=N))
    as_many(
        lambda: [float(v) for v in both.peer.get_reconstruction_error(batch_size=N).values()],
        lambda: [evidence.reconstruction_error(both.ours, both.cells, draw)[names[n]] for n in theirs],
        60,
    )


def test_marginal_likelihood(both: SimpleNamespace) -> None:
    torch.manual_seed(1)
    draw = seed()
    as_many(
        lambda: float(both.peer.get_marginal_ll(n_mc_samples=40, batch_size=N)),
        lambda: evidence.marginal_ll(both.ours, both.cells, 40, draw).mean(),
        8,
    )


def test_correlations_of_features(both: SimpleNamespace) -> None:
    draw = seed()
    for kind in ("pearson", "spearman"):
        torch.manual_seed(1)
        as_many(
            lambda kind=kind: both.peer.get_feature_correlation_matrix(
                n_samples=10, correlation_type=kind, transform_batch="b"
            ).to_numpy(),
            lambda kind=kind: (
                correlation.feature_correlation(
                    both.ours, both.cells, kind=kind, batches=(1,), generator=draw
                ).matrix_ff
            ),
            12,
        )


def test_parameters_and_counts() -> None:
    both = peer_and_ours("scvi")
    torch.manual_seed(1)
    want = both.peer.get_likelihood_parameters(n_samples=DRAWS)
    got = next(iter(ex.likelihood_parameters(both.ours, both.cells, DRAWS, generator=seed())))
    assert want.keys() == got.keys()
    for name, value in want.items():
        value = np.broadcast_to(value, got[name].shape)
        error = np.sqrt((value.var(axis=0) + got[name].var(axis=0)) / DRAWS) + 1e-5
        assert (np.abs(value.mean(axis=0) - got[name].mean(axis=0)) < 5 * error).all(), name
    both = peer_and_ours("totalvi")
    torch.manual_seed(1)
    samples = both.peer.posterior_predictive_sample(n_samples=DRAWS)
    drawn = next(iter(ex.posterior_predictive(both.ours, both.cells, Asked(n_samples=DRAWS), seed())))
    for name, got_sn in zip(("rna", "protein"), drawn, strict=True):
        want_sn = np.moveaxis(np.asarray(samples[name]), -1, 0)
        error = np.sqrt((want_sn.var(axis=0) + got_sn.var(axis=0)) / DRAWS) + 1e-6
        # Counts are skewed, and there are some thousand of them.
        assert (np.abs(want_sn.mean(axis=0) - got_sn.mean(axis=0)) < 6 * error).all(), name


@pytest.fixture
def scales() -> tuple[np.ndarray, np.ndarray]:
    """Draws of two groups: some genes change, some are all but silent."""
    rng = np.random.default_rng(0)
    centre_g = np.concatenate([rng.normal(-10, 1, 180), np.full(20, -24.0)])
    # Three clear modes, so that a mixture finds the same delta from any start.
    change_g = np.where(np.arange(200) < 40, rng.choice([-2, 2], 200) + rng.normal(0, 0.2, 200), 0)
    noise = rng.normal(0, 0.3, (2, 500, 200))
    return np.exp2(centre_g + change_g + noise[0]), np.exp2(centre_g + noise[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "vanilla"},
        {"pseudocount": 1e-5, "test_mode": "two"},
        {"pseudocount": None, "test_mode": "three", "delta": 0.5, "intervals": (0.5, 0.95)},
        {"pseudocount": 1e-5, "delta": None, "test_mode": "three"},
    ],
    ids=str,
)
def test_differential_expression_of_equal_draws(
    scales: tuple[np.ndarray, np.ndarray], settings: dict[str, Any]
) -> None:
    """Every column, exactly, but where a mixture with a random start finds delta."""
    from pandas import Series
    from scvi.model import SCVI
    from scvi.model.base._de_core import _fdr_de_prediction
    from scvi.model.base._differential import DifferentialComputation

    one_sg, two_sg = scales
    counts = np.random.default_rng(1).poisson(5.0, (40, 200)).astype(np.float32)
    counts[:, 180:] = 0
    cells = anndata.AnnData(counts)
    SCVI.setup_anndata(cells)
    manager = SCVI(cells, n_latent=2, n_hidden=4).adata_manager

    def model_fn(_: Any, indices: np.ndarray, **__: Any) -> np.ndarray:
        return one_sg if indices[0] == 0 else two_sg

    first_n = np.arange(40) < 20
    config = DifferentialConfig(**settings)
    np.random.seed(0)  # noqa: NPY002 - the peer draws from it
    want = DifferentialComputation(model_fn, None, manager).get_bayes_factors(
        first_n,
        ~first_n,
        mode=config.mode,
        use_observed_batches=True,
        delta=config.delta,
        pseudocounts=config.pseudocount,
        test_mode=config.test_mode,
        cred_interval_lvls=config.intervals,
    )
    groups = [counts[first_n], counts[~first_n]]
    sums = [
        de.GroupSums(20, group.sum(0), (group > 0).sum(0), 1e4 * (group / group.sum(1)[:, None]).sum(0))
        for group in groups
    ]
    got = de.compare(de.Draws(one_sg), de.Draws(two_sg), config, np.random.default_rng(0), (sums[0], sums[1]))
    for name, value in want.items():
        if config.delta is None and name in ("delta", "proba_de", "proba_not_de", "bayes_factor"):
            np.testing.assert_allclose(got["delta"], want["delta"], rtol=0.02)
            continue
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
    if config.mode == "change":
        calls = _fdr_de_prediction(Series(got["proba_de"]), fdr=0.05).to_numpy()
        # Genes of equal probability at the border are called in no particular order there.
        assert calls.sum() == got["is_de_fdr_0.05"].sum()
        assert (got["proba_de"][calls != got["is_de_fdr_0.05"]] == got["proba_de"][calls].min()).all()
