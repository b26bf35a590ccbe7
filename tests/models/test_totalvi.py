from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.distributions import Normal, kl_divergence

from streamx.config import TotalviConfig
from streamx.interop.scvi_totalvi import module_from
from streamx.models.cells import Cells
from streamx.models.sparse import Rows
from streamx.models.totalvi import Totalvi

SMALL = TotalviConfig(n_latent=3, n_hidden=8)
NEW = TotalviConfig(
    n_latent=3,
    n_hidden=8,
    input_transform="scaled",
    per_batch_efficiency=True,
    protein_warmup=True,
    gene_likelihood="zinb",
    gene_dispersion="gene-batch",
    protein_dispersion="protein-label",
    latent_distribution="ln",
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_cells(n: int = 20, n_genes: int = 12, n_proteins: int = 5, n_batches: int = 3) -> Cells:
    rng = np.random.default_rng(0)
    return Cells(
        torch.as_tensor(rng.poisson(1.0, (n, n_genes)).astype(np.float32)),
        torch.as_tensor(np.arange(n) % n_batches),
        label_n=torch.as_tensor(rng.integers(0, 2, n)),
        category_nc=torch.as_tensor(rng.integers(0, 4, (n, 1))),
        continuous_nc=torch.as_tensor(rng.normal(size=(n, 2)).astype(np.float32)),
        protein_np=torch.as_tensor(rng.poisson(6.0, (n, n_proteins)).astype(np.float32)),
    )


def small(config: TotalviConfig = SMALL, **arguments: object) -> Totalvi:
    covariates = {"n_proteins": 5, "n_labels": 2, "n_levels": (4,), "n_continuous": 2}
    model = Totalvi(12, 3, config, **(covariates | arguments))  # type: ignore[arg-type]
    with torch.no_grad():  # tables that begin alike for all batches
        for name, table in model.named_parameters():
            if name.endswith("_pb"):
                table += 0.3 * torch.randn(table.shape, generator=generator(1))
    return model


@pytest.fixture
def reference(golden: Path) -> tuple[Totalvi, Cells, dict[str, np.ndarray]]:
    """The network of scvi-tools 1.4.2 (layer norm in both halves) and what it computed."""
    f = dict(np.load(golden / "totalvi_1_4_2.npz"))
    state = {name[3:]: torch.as_tensor(value) for name, value in f.items() if name.startswith("sd:")}
    model = module_from(state, {"use_layer_norm": "both"}, "1.4.2")
    batch_n, proteins = torch.as_tensor(f["b"][:, 0]), torch.as_tensor(f["y"])
    return model, Cells(torch.as_tensor(f["x"]), batch_n, protein_np=proteins), f


def test_parity_with_scvi_tools(reference: tuple[Totalvi, Cells, dict[str, np.ndarray]]) -> None:
    model, cells, f = reference
    assert model.config.input_transform == "scaled"
    z_nk, _ = model.encode(cells)
    decoded = model.decode(torch.as_tensor(f["z"]), cells.x_ng.sum(1).log(), cells)
    for got, name in (
        (z_nk, "z"),
        (decoded.genes.scale_ng, "px_scale"),
        (decoded.proteins.back_mean_np, "back_alpha"),
        (decoded.proteins.back_sd_np, "back_beta"),
        (decoded.proteins.mixing_np, "mixing"),
        (decoded.proteins.fore_scale_np, "fore_scale"),
    ):
        np.testing.assert_allclose(got.detach().numpy(), f[name], atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("latent_library", [False, True])
@pytest.mark.parametrize("n", [20, 2], ids=["many cells", "fewer cells than batches"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label"])
@pytest.mark.parametrize("config", [SMALL, NEW], ids=["documented", "new"])
def test_sparse_rows_equal_a_tensor(
    config: TotalviConfig, dispersion: str, n: int, latent_library: bool
) -> None:
    """All losses, and the gradients of all weights, up to float32 rounding."""
    config = replace(config, gene_dispersion=dispersion, use_observed_lib_size=not latent_library)
    cells = some_cells(n)
    rows = replace(cells, x_ng=Rows.of(sp.csr_matrix(cells.x_ng.numpy())))
    found = []
    for given in (cells, rows):
        model = small(config, library_b=(np.full(3, 2.0), np.ones(3)))
        losses, z_nk = model.loss_and_latent(given, 0.5, generator())
        losses["loss"].backward()
        grads = {name: table.grad for name, table in model.named_parameters() if table.grad is not None}
        found.append(({name: value.detach() for name, value in losses.items()}, z_nk.detach(), grads))
    assert {f"log_theta_g{dispersion[5:6]}", "decoder.scale.linear.weight"} <= found[1][2].keys()
    torch.testing.assert_close(found[1], found[0], rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("given", ["tensor", "rows"])
def test_means_of_the_terms_are_the_losses(given: str) -> None:
    cells = some_cells()
    if given == "rows":
        cells = replace(cells, x_ng=Rows.of(sp.csr_matrix(cells.x_ng.numpy())))
    model = small(NEW).eval()
    losses, terms = model.loss(cells, 0.5, generator()), model.terms(cells, generator())
    assert list(losses) == ["loss", *terms]
    for name, term_n in terms.items():
        assert term_n.shape == (20,)
        torch.testing.assert_close(losses[name], term_n.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [SMALL, NEW], ids=["documented", "new"])
@pytest.mark.parametrize("by", ["batch", "call"])
def test_what_was_not_measured_does_not_matter(config: TotalviConfig, by: str) -> None:
    cells = some_cells()
    measured_bp = np.ones((3, 5), bool)
    measured_p = None
    if by == "batch":
        measured_bp[1, 2:4] = False
        hidden_np = torch.zeros(20, 5, dtype=torch.bool)
        hidden_np[1::3, 2:4] = True
    else:
        measured_p = torch.tensor([True, True, False, False, True])
        hidden_np = (~measured_p).expand(20, 5)
    other = replace(cells, protein_np=torch.where(hidden_np, 99.0, cells.protein_np))
    model = small(config, measured_bp=measured_bp).eval()
    for given in (model.encode(cells, None, measured_p), model.encode(other, None, measured_p)):
        torch.testing.assert_close(given, model.encode(cells, None, measured_p), rtol=0, atol=0)
    one, two = (model.loss(given, 0.5, generator(), measured_p) for given in (cells, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(
        model.loss(cells, 0.5, generator())["loss"], small(config).eval().loss(other)["loss"]
    )


def test_a_protein_that_no_cell_has_measured_is_not_trained() -> None:
    measured_bp = np.ones((3, 5), bool)
    measured_bp[:, 4] = False
    model = small(measured_bp=measured_bp)
    model.loss(some_cells(), 1.0, generator())["loss"].backward()
    for name, table in model.named_parameters():
        if name.endswith(("_pb", "log_theta_p")):
            assert table.grad is not None
            assert table.grad[4].abs().sum() == 0, name
            assert (table.grad[:4] != 0).all(), name


@pytest.mark.parametrize("warmup", [False, True])
def test_weights_of_the_loss(warmup: bool) -> None:
    model = small(replace(SMALL, protein_warmup=warmup)).eval()
    losses = model.loss(some_cells(), 0.3, generator())
    protein_weight = 0.3 if warmup else 1.0
    want = losses["reconstruction_gene"] + protein_weight * losses["reconstruction_protein"]
    want = want + 0.3 * (losses["kl"] + losses["kl_background"])
    torch.testing.assert_close(losses["loss"], want)
    assert next(iter(losses)) == "loss"
    total = losses["reconstruction_gene"] + losses["reconstruction_protein"]
    torch.testing.assert_close(losses["reconstruction"], total)


def test_divergences_are_those_of_torch() -> None:
    config = replace(SMALL, use_observed_lib_size=False, per_batch_efficiency=True)
    library_b = np.array([2.0, 3.0, 4.0]), np.array([0.5, 1.0, 2.0])
    model, cells = small(config, library_b=library_b).eval(), some_cells()
    with torch.no_grad():
        terms = model.terms(cells, generator())
        inferred = model.infer(cells, generator())
        decoded = model.decode(inferred.z_nk, inferred.library_n, cells, generator=generator())
        proteins, batch_n = decoded.proteins, cells.batch_n
        of_z = kl_divergence(Normal(inferred.mean_nk, inferred.var_nk.sqrt()), Normal(0, 1)).sum(1)
        torch.testing.assert_close(terms["kl"], of_z)
        mean_n, var_n = model.encode_library(cells)
        prior = Normal(
            torch.as_tensor(library_b[0]).float()[batch_n],
            torch.as_tensor(library_b[1]).float()[batch_n].sqrt(),
        )
        torch.testing.assert_close(terms["kl_library"], kl_divergence(Normal(mean_n, var_n.sqrt()), prior))
        prior = Normal(model.background_mean_pb.t()[batch_n], model.background_log_sd_pb.exp().t()[batch_n])
        posterior = Normal(proteins.back_mean_np, proteins.back_sd_np)
        efficiency = model.log_efficiency_pb.exp().t()[batch_n]
        want = kl_divergence(posterior, prior) - torch.distributions.LogNormal(0.0, 1.0).log_prob(efficiency)
        want = want - 1e-3 * torch.sigmoid(proteins.mixing_np).log()
        torch.testing.assert_close(terms["kl_background"], want.sum(1), rtol=1e-5, atol=1e-4)


def test_noise_comes_from_the_generator_alone() -> None:
    model, cells = small(), some_cells()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, two, three = (model.loss(cells, 1.0, generator(seed))["loss"] for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    model.eval()
    assert torch.equal(model.encode(cells)[0], model.encode(cells)[0])


def test_decoding_as_another_batch() -> None:
    model, cells = small(NEW).eval(), some_cells()
    z_nk, library_n = torch.randn(20, 3, generator=generator()), torch.full((20,), 3.0)
    got = model.decode(z_nk, library_n, cells, 2, generator=generator())
    other = replace(cells, batch_n=torch.full_like(cells.batch_n, 2))
    want = model.decode(z_nk, library_n, other, generator=generator())
    own = model.decode(z_nk, library_n, cells, generator=generator())
    assert torch.equal(got.genes.rate_ng, want.genes.rate_ng)
    assert torch.equal(got.genes.theta, want.genes.theta)
    assert torch.equal(got.proteins.means[1], want.proteins.means[1])
    assert not torch.allclose(got.genes.scale_ng, own.genes.scale_ng)
    torch.testing.assert_close(got.genes.rate_ng.sum(1), library_n.exp(), rtol=1e-5, atol=1e-4)


def test_a_count_drawn_has_the_mean_of_its_mixture() -> None:
    model, cells = small(NEW).eval(), some_cells()
    with torch.no_grad():
        decoded = model.decode(torch.zeros(20, 3), torch.full((20,), 3.0), cells, generator=generator())
        proteins, draw = decoded.proteins, generator(2)
        draws_snp = torch.stack([proteins.sample(draw) for _ in range(4000)])
        back_np, fore_np = proteins.means
        share_np = torch.sigmoid(proteins.mixing_np)
        want_np = share_np * back_np + (1 - share_np) * fore_np
        error_np = draws_snp.std(0) / 4000**0.5
    assert ((draws_snp.mean(0) - want_np).abs() < 5 * error_np).all()


def test_the_mean_log_weight_is_the_evidence_lower_bound() -> None:
    measured_bp = np.ones((3, 5), bool)
    measured_bp[1, 2:4] = False
    config = replace(SMALL, use_observed_lib_size=False)
    model = small(config, measured_bp=measured_bp, library_b=(np.full(3, 3.0), np.full(3, 0.5))).eval()
    n_draws, cells = 500, some_cells()
    row_n = torch.arange(20).repeat(n_draws)
    many = Cells(
        cells.x_ng[row_n],
        cells.batch_n[row_n],
        cells.label_n[row_n],
        cells.category_nc[row_n],
        cells.continuous_nc[row_n],
        cells.protein_np[row_n],
    )
    with torch.no_grad():
        weight_sn = model.log_weight(many, generator(1)).reshape(n_draws, 20)
        terms = model.terms(many, generator(2))
    names = ("reconstruction", "kl", "kl_background", "kl_library")
    terms_sn = sum(terms[name] for name in names).reshape(n_draws, 20)
    error_n = ((weight_sn.var(0) + terms_sn.var(0)) / n_draws).sqrt()
    assert ((weight_sn.mean(0) + terms_sn.mean(0)).abs() < 5 * error_n).all()


def test_one_batch_has_no_columns() -> None:
    model = Totalvi(12, 1, SMALL, n_proteins=5)
    assert model.decoder.scale.batch is not None
    assert model.decoder.scale.batch.shape[1] == 0
    cells = some_cells(n_batches=1)
    losses = model.loss(Cells(cells.x_ng, cells.batch_n, protein_np=cells.protein_np), 1.0, generator())
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])


def test_needs() -> None:
    with pytest.raises(ValueError, match="library_b"):
        small(replace(SMALL, use_observed_lib_size=False))
    with pytest.raises(ValueError, match="n_labels"):
        small(replace(SMALL, gene_dispersion="gene-label"), n_labels=0)
    with pytest.raises(ValueError, match="observed"):
        small().encode_library(some_cells())
    with pytest.raises(ValueError, match="normal"):
        small(NEW).log_weight(some_cells())


def test_the_background_starts_from_what_is_given() -> None:
    mean_pb, sd_pb = np.arange(15.0).reshape(5, 3), np.full((5, 3), 0.5)
    model = Totalvi(12, 3, SMALL, n_proteins=5, background=(mean_pb, sd_pb))
    np.testing.assert_array_equal(model.background_mean_pb.detach().numpy(), mean_pb.astype(np.float32))
    np.testing.assert_allclose(model.background_log_sd_pb.detach().exp().numpy(), 0.5, rtol=1e-6)
