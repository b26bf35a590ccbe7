"""Surgery on trVAE: what scArches' ``load_query_data`` lets move, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamx.config import TrvaeConfig, TrvaeFreezeConfig
from streamx.models.cells import Cells
from streamx.models.freeze import freeze
from streamx.models.freeze_trvae import trainable_trvae
from streamx.models.grow import batch_tables, extended
from streamx.models.trvae import Trvae

TABLES = {"log_theta_gb", "encoder.blocks.0.batch", "decoder.blocks.0.batch"}
FIRST = {
    *("encoder.blocks.0.linear.weight", "encoder.blocks.0.linear.bias"),
    "decoder.blocks.0.linear.weight",
}
NORMS = {f"{net}.blocks.0.norm.{part}" for net in ("encoder", "decoder") for part in ("weight", "bias")}


def seed(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def reference(n_batches: int = 2, **settings: Any) -> Trvae:
    config = TrvaeConfig(**{"hidden_layer_sizes": (8, 6), "latent_dim": 3, "dr_rate": 0.2} | settings)
    return Trvae(12, n_batches, config)


def cells(codes: list[int]) -> Cells:
    x = torch.poisson(torch.full((24, 12), 2.0), generator=seed(1))
    return Cells(x, torch.tensor(codes * (24 // len(codes))))


def trained(model: Trvae, given: Cells, **options: Any) -> None:
    plan = trainable_trvae(model, 2, TrvaeFreezeConfig(**options))
    freeze(model, plan)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05, eps=0.01)
    noise = seed(2)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(given, 1.0, noise)["loss"].backward()
        optimizer.step()


def moved(before: dict[str, torch.Tensor], model: Trvae) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("n_old", [1, 2])
def test_growth(n_old: int) -> None:
    model = reference(n_old)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(batch_tables(model)) == TABLES
    at_once = extended(model, [seed(5), seed(6)])
    one_by_one = extended(extended(model, [seed(5)]), [seed(6)])
    assert at_once.n_batches == n_old + 2
    for name, value in at_once.state_dict().items():
        assert torch.equal(value, one_by_one.state_dict()[name]), name
        assert torch.equal(value[:, :n_old] if name in TABLES else value, before[name]), name
    assert moved(before, model) == set()
    given = cells(list(range(n_old)))
    for old, new in zip(model.eval().encode(given), at_once.eval().encode(given), strict=True):
        assert torch.equal(old, new)


def test_a_new_batch_begins_without_an_effect_however_many_there_are() -> None:
    for n in (1, 3):
        model = Trvae(4, n, TrvaeConfig())
        for tables, name, shape in (
            (model.encoder.blocks[0], "batch", (256,)),
            (model, "log_theta_gb", (4,)),
        ):
            assert torch.equal(tables.new_batch(name, seed(1)), torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({}, set()),
        ({"freeze_expression": False}, FIRST),
        ({"freeze_expression": False, "use_bn": True}, FIRST | NORMS),
        ({"use_bn": True}, set()),
    ],
)
def test_what_moves(options: dict[str, Any], whole: set[str]) -> None:
    options = dict(options)
    model = extended(reference(use_bn=options.pop("use_bn", False)), [seed(5), seed(6)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, cells([2, 3]), **options)
    running = {name for name in moved(before, model) if "running" in name or "tracked" in name}
    assert moved(before, model) - running == TABLES | whole
    for name in TABLES:
        changed = (model.state_dict()[name] != before[name]).any(0)
        assert changed.tolist() == [False, False, True, True], name
    # a frozen norm counts its minibatches, but keeps its statistics
    assert all(".blocks.0." in name or "tracked" in name for name in running)
    assert any("mean" in name for name in running) == bool(whole & NORMS)


def test_old_batches_stay_even_if_the_query_has_cells_of_them() -> None:
    model = extended(reference(), [seed(5), seed(6)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, cells([0, 1, 2, 3]))
    for name in TABLES:
        assert torch.equal(model.state_dict()[name][:, :2], before[name][:, :2]), name


@pytest.mark.parametrize("use_bn", [False, True])
def test_the_reference_keeps_its_latents(use_bn: bool) -> None:
    original = reference(use_bn=use_bn)
    model = extended(original, [seed(5), seed(6)])
    trained(model, cells([2, 3]))
    given = cells([0, 1])
    assert torch.equal(model.eval().encode(given)[0], original.eval().encode(given)[0])


def test_nothing_frozen() -> None:
    model = extended(reference(), [seed(5), seed(6)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, cells([0, 1, 2, 3]), freeze=False)
    assert moved(before, model) == set(before)


@pytest.mark.parametrize("remove", [True, False])
def test_dropout(remove: bool) -> None:
    model = extended(reference(), [seed(5), seed(6)])
    freeze(model, trainable_trvae(model, 2, TrvaeFreezeConfig(remove_dropout=remove)))
    h = torch.ones(4, 12)
    zeros = [model.encoder.blocks[0](h, torch.zeros(4).long(), seed(n)) for n in range(2)]
    assert torch.equal(zeros[0], zeros[1]) == remove


def test_batches_are_drawn_to_the_reference_only() -> None:
    """With a boundary, the new batches are compared with the old ones, and not with each other."""
    model = extended(reference(mmd_boundary=2), [seed(5), seed(6)])
    with torch.no_grad():
        assert model.loss(cells([2, 3]), 1.0, seed(0))["mmd"].item() == 0
        assert model.loss(cells([0, 3]), 1.0, seed(0))["mmd"].item() > 0
