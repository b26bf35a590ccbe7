"""Sparse rows or dense tensors: which, and that it makes no difference but for rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from views import write_view

from streamx.models.sparse import Rows
from streamx.train import feed
from streamx.train.feed import all_inputs, make_loader, query_input, training_inputs
from streamx.train.latent import latents
from streamx.train.model import load_model
from streamx.train.run import train

CPU = torch.device("cpu")


def test_the_density_of_the_view_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = write_view(tmp_path / "view", [90, 50])
    density = view.nnz / (view.n_obs * view.n_vars)
    found = []
    for limit in (density * 0.99, density * 1.01):
        monkeypatch.setattr(feed, "DENSITY_LIMIT", limit)
        found.append(list(all_inputs(make_loader(view, 64, device=CPU, order="sequential"))))
    dense, sparse = found
    assert len(dense) == len(sparse) == 3
    for (x_ng, batch_n), (rows, code_n) in zip(dense, sparse, strict=True):
        assert isinstance(rows, Rows)
        assert x_ng.dtype == torch.float32
        assert torch.equal(x_ng, rows.dense())
        assert torch.equal(batch_n, code_n)
        assert batch_n.dtype == code_n.dtype == torch.int64


def test_both_train_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = write_view(tmp_path / "view", [180, 90, 1], expressed=0.2)
    losses, z = [], []
    for name, limit in (("dense", 0.0), ("sparse", 1.0)):
        monkeypatch.setattr(feed, "DENSITY_LIMIT", limit)
        train(view, tmp_path / name, max_iteration=24, n_hidden=16, threads=1, progress=False)
        rows = (tmp_path / name / "history.csv").read_text().splitlines()[1:]
        losses.append([float(row.split(",")[1]) for row in rows])
        z.append(latents(load_model(tmp_path / "dense").module, view, "running"))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(z[1], z[0], atol=2e-6)


def test_noise_follows_the_number_of_the_minibatch(tmp_path: Path) -> None:
    view = write_view(tmp_path / "view", [180, 90], expressed=0.2)
    whole = list(training_inputs(make_loader(view, 32, device=CPU, drop_last=True), 4, 0, 1, 0))
    assert len(whole) == 8
    rest = list(training_inputs(make_loader(view, 32, device=CPU, drop_last=True), 4, 0, 1, 5))
    ranks = [make_loader(view, 32, device=CPU, drop_last=True, rank=r, world=2) for r in range(2)]
    shared = [list(training_inputs(loader, 4, 0, 1, 1)) for loader in ranks]
    merged = [part for pair in zip(*shared, strict=True) for part in pair]
    for got, want in [*zip(rest, whole[5:], strict=True), *zip(merged, whole[2:], strict=True)]:
        assert torch.equal(got[2], want[2])
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[0].dense(), want[0].dense())
    assert len({float(noise.sum()) for _, _, noise in whole}) == 8


def test_queries_are_sparse_on_the_cpu(tmp_path: Path) -> None:
    view = write_view(tmp_path / "view", [30])
    x_ng = view.read(0, 30)
    rows = query_input(x_ng, CPU)
    assert isinstance(rows, Rows)
    assert np.array_equal(rows.dense().numpy(), x_ng.toarray())
    assert np.array_equal(query_input(x_ng, torch.device("meta")).shape, x_ng.shape)
