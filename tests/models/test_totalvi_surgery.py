"""Surgery on totalVI: old weights and latents stay the same bits; a query without proteins can be mapped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from streamx.config import FreezeConfig, TotalviConfig
from streamx.models.cells import Cells
from streamx.models.freeze import freeze, trainable
from streamx.models.grow import batch_tables, extended
from streamx.models.totalvi import Totalvi
from streamx.train.adam import Adam

CONFIG = TotalviConfig(
    n_latent=3,
    n_hidden=8,
    protein_dispersion="protein-batch",
    gene_dispersion="gene-batch",
    per_batch_efficiency=True,
)
TABLES = {
    "background_mean_pb": 1,
    "background_log_sd_pb": 1,
    "log_efficiency_pb": 1,
    "log_theta_gb": 1,
    "log_theta_pb": 1,
    "measured_bp": 0,
}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def cells(batches: list[int], n: int = 24) -> Cells:
    rng = np.random.default_rng(0)
    counts = (torch.as_tensor(rng.poisson(2.0, (n, width)), dtype=torch.float32) for width in (20, 5))
    x_ng, y_np = counts
    return Cells(x_ng, torch.as_tensor(np.resize(batches, n)), protein_np=y_np)


@pytest.mark.parametrize("n_old", [1, 2])
def test_the_old_batches_keep_their_bits(n_old: int) -> None:
    module = Totalvi(20, n_old, CONFIG, n_proteins=5).eval()
    tables = batch_tables(module)
    assert TABLES.items() <= tables.items()
    columns = {name for name in tables if name.endswith(".batch")}
    assert len(columns) == 2 + 1 + 4 + 6, "two encoder layers, the library's, four stacks, six heads"
    assert tables.keys() == TABLES.keys() | columns
    grown, one_by_one = extended(module, seeds(5, 6)), extended(extended(module, seeds(5)), seeds(6))
    for name, old in module.state_dict().items():
        new = grown.state_dict()[name]
        assert torch.equal(new, one_by_one.state_dict()[name]), name
        first = new.narrow(tables[name], 0, n_old) if name in tables else new
        assert torch.equal(first, old if old.numel() else torch.zeros_like(first)), name
    reference = cells(list(range(n_old)))
    for want, got in zip(module.encode(reference), grown.encode(reference), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("latent_library", [False, True])
@pytest.mark.parametrize(
    ("option", "stacks"),
    [
        ("freeze_expression", ["encoder.stack", "encoder.library"]),
        ("freeze_decoder_first_layer", ["decoder.gene"]),
    ],
)
def test_first_layers_that_an_option_frees(option: str, stacks: list[str], latent_library: bool) -> None:
    """Those of scvi-tools: both networks of the encoder, and the genes' part of the decoder (px_decoder)."""
    config = replace(CONFIG, n_layers_decoder=2, use_observed_lib_size=not latent_library)
    library = (np.ones(2), np.ones(2))
    module = Totalvi(20, 2, config, n_proteins=5, library_b=library)
    given = {"library_mean_b": torch.ones(1), "library_var_b": torch.ones(1)} if latent_library else {}
    grown = extended(module, seeds(5), given).train()
    frozen = trainable(grown, 1).moves
    plan = trainable(grown, 1, replace(FreezeConfig(), **{option: False}))
    freeze(grown, plan)
    own = {
        f"{stack}.layers.0.columns.{name}" for stack in stacks for name in ("linear.weight", "linear.bias")
    }
    proteins = {f"{stack}.layers.0.columns.continuous" for stack in stacks if stack.startswith("encoder")}
    assert plan.moves.keys() - frozen.keys() == own | proteins
    before = {name: value.clone() for name, value in grown.state_dict().items()}
    steps = Adam(grown, 1e-2, 0.0)
    grown.loss(cells([2]), 1.0, seeds(1)[0])["loss"].backward()
    steps.step()
    for name in own | proteins:
        unused = name.startswith("encoder.library") and not latent_library
        assert torch.equal(grown.state_dict()[name], before[name]) == unused, name


def test_only_the_new_batch_moves_and_a_query_without_proteins_is_mapped() -> None:
    module = Totalvi(20, 2, CONFIG, n_proteins=5)
    given = {"measured_bp": torch.zeros(1, 5, dtype=torch.bool)}
    grown = extended(module, seeds(5), given).train()
    assert grown.measured_bp.tolist() == [[True] * 5, [True] * 5, [False] * 5]
    freeze(grown, trainable(grown, 1, FreezeConfig(freeze_batchnorm_decoder=True)))
    before = {name: value.clone() for name, value in grown.state_dict().items()}
    query, tables = cells([2]), batch_tables(grown)
    steps = Adam(grown, 1e-2, 0.0)
    for _ in range(3):
        steps.zero_grad()
        grown.loss(query, 1.0, seeds(1)[0])["loss"].backward()
        steps.step()
    # Nothing of background and foreground is measured; the mixture and efficiencies still feel their priors.
    moves = ("encoder.stack", "decoder.gene", "decoder.scale", "decoder.mix", "log_theta_g", "log_efficiency")
    for name, table in grown.named_parameters():
        if name in tables:
            old, new = table.split([2, 1], 1)
            was, began = before[name].split([2, 1], 1)
            assert torch.equal(old, was), name
            assert torch.equal(new, began) != name.startswith(moves), name
        else:
            assert torch.equal(table, before[name]), name
    grown.eval()
    other = replace(query, protein_np=query.protein_np + 7)
    assert torch.equal(grown.encode(other)[0], grown.encode(query)[0])
    with torch.no_grad():
        z_nk, library_n = grown.encode(query)[0], query.x_ng.sum(1).log()
        imputed = grown.decode(z_nk, library_n, query, batch=0, generator=seeds(1)[0]).proteins
    assert imputed.rate_fore_np.shape == (24, 5)
    assert torch.isfinite(imputed.rate_fore_np).all()
