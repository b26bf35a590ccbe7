"""SCALEX 1.0.4 itself beside ours: preprocessing, training steps, checkpoints both ways, label transfer.

Real cells (those of the demo) through both; the peer scales maxima over all cells, ours does with
``scale="global"``. Where the peer draws its noise, both are given the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pytest

import streamx as sx

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

DEMO = Path(sx.__file__).parent / "demo" / "data"
PLATES = sorted(DEMO.glob("sc_celseq2*.h5ad"))
N_GENES = 400
MIN_FEATURES = 2500  # leaves some cells of each file out
SETTINGS: dict[str, Any] = {
    "min_features": MIN_FEATURES,
    "n_top_features": N_GENES,
    "ignore_umap": True,
    "num_workers": 0,
    "show": False,
}
NETWORK = ([["fc", 32, 1, "relu"], ["fc", 6, "", ""]], lambda n: [["fc", N_GENES, n, "sigmoid"]])


@pytest.fixture(scope="module")
def peer() -> Iterator[SimpleNamespace]:
    """SCALEX's functions. It needs two names that numpy 2 and torch 2.6 took away."""
    torch = pytest.importorskip("torch")
    load = torch.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "Inf", np.inf, raising=False)
        patch.setattr(torch, "load", lambda *args, **kw: load(*args, **kw | {"weights_only": False}))
        pytest.importorskip("scalex")
        from scalex import SCALEX
        from scalex.data import preprocessing_rna
        from scalex.function import label_transfer
        from scalex.net.layer import Encoder
        from scalex.net.vae import VAE

        yield SimpleNamespace(
            SCALEX=SCALEX,
            preprocess=preprocessing_rna,
            label_transfer=label_transfer,
            VAE=VAE,
            Encoder=Encoder,
        )


def together(paths: list[Path]) -> anndata.AnnData:
    """The files' cells, one after the other, each file a batch under its own name; float32 counts."""
    cells = anndata.concat(
        {path.stem: anndata.read_h5ad(path) for path in paths}, label="batch", join="inner", merge="same"
    )
    cells.X = cells.X.astype(np.float32)
    return cells


@pytest.fixture(scope="module")
def theirs(peer: SimpleNamespace) -> anndata.AnnData:
    return peer.preprocess(together(PLATES), min_features=MIN_FEATURES, n_top_features=N_GENES)


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("peer")
    store = sx.convert(PLATES, folder / "store")
    return sx.preprocess(
        store, folder / "view", min_features=MIN_FEATURES, n_top_features=N_GENES, scale="global"
    )


@pytest.fixture(scope="module")
def inputs(view: Any) -> tuple[np.ndarray, np.ndarray]:
    """What our network is given: x (n_obs, n_vars) float32 and batch codes, in the view's order."""
    minibatches = list(sx.Loader(view, 100, order="sequential"))
    return np.concatenate([mb.x_ng for mb in minibatches]), np.concatenate([mb.batch_n for mb in minibatches])


def test_preprocessing(theirs: anndata.AnnData, view: Any, inputs: tuple[np.ndarray, np.ndarray]) -> None:
    """The same cells and genes; the same matrix, scaled to maxima, to float32's precision."""
    assert 800 < view.n_obs == theirs.n_obs < 1183
    assert set(view.obs_names) == set(theirs.obs_names)
    assert set(view.var_names) == set(theirs.var_names)
    assert len(view.var_names) == N_GENES
    expected = theirs[list(view.obs_names), list(view.var_names)]
    np.testing.assert_allclose(inputs[0], expected.X.toarray(), atol=1e-6)
    batches = [str(view.batches[code]) for code in inputs[1]]
    assert batches == expected.obs["batch"].astype(str).tolist()


@pytest.mark.parametrize("one_batch", [False, True])
def test_training_steps(
    peer: SimpleNamespace,
    inputs: tuple[np.ndarray, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    one_batch: bool,
) -> None:
    """From equal weights, minibatches and noise: equal losses and, after 25 steps, weights."""
    import torch

    from streamx.config import TRAINING, ScalexConfig
    from streamx.interop.scalex import to_ours, to_theirs
    from streamx.models.scalex import Scalex
    from streamx.train.fit import make_optimizer

    generator = torch.Generator().manual_seed(3)
    x_ng, batch_n = (torch.as_tensor(part) for part in inputs)
    x_ng = x_ng.clamp(max=1)  # a maximum over itself is 1 but for rounding, which the peer's loss refuses
    batch_n = torch.zeros_like(batch_n) if one_batch else batch_n
    n_batches = int(batch_n.max()) + 1
    order = torch.randperm(len(x_ng), generator=generator)
    steps = [order[torch.arange(s * 64, s * 64 + 64) % len(order)] for s in range(25)]
    noise = [torch.randn(64, 6, generator=generator) for _ in steps]

    ours = Scalex(N_GENES, n_batches, ScalexConfig(n_latent=6, n_hidden=32), generator)
    enc, dec = NETWORK
    vae = peer.VAE(enc, dec(n_batches), n_domain=n_batches)
    vae.load_state_dict(to_theirs(ours.state_dict()))

    queue = iter(noise)
    monkeypatch.setattr(peer.Encoder, "reparameterize", lambda self, mu, var: mu + var.sqrt() * next(queue))
    reported: list[float] = []

    def stopping(loss: float, model: Any) -> None:
        reported.append(loss)

    stopping.early_stop = False  # type: ignore[attr-defined]
    loader = [(x_ng[rows], batch_n[rows], rows) for rows in steps]
    vae.train()
    lr, weight_decay = TRAINING["scalex"]["lr"], TRAINING["scalex"]["weight_decay"]
    vae.fit(loader, lr=lr, max_iteration=len(steps), early_stopping=stopping, device="cpu")

    optimizer = make_optimizer(ours, lr, weight_decay)
    ours.train()
    totals = []
    for rows, noise_nk in zip(steps, noise, strict=True):
        loss = ours.loss(x_ng[rows], batch_n[rows], noise_nk)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        totals.append(float(loss.total))
    assert totals[-1] < totals[0]
    assert reported == [pytest.approx(np.mean(totals), rel=1e-5)]
    found, expected = ours.state_dict(), to_ours(vae.state_dict())
    assert set(found) == set(expected)
    for name, value in expected.items():
        # a bias in front of a batch norm cancels: its gradient is rounding, which Adam makes steps of
        cancels = name in ("encoder.hidden.bias", "decoder.out.bias") or name.endswith("running_mean")
        # float32 over 25 steps, sums in another order than torch's: 1e-5 of the value, as for the network
        limits = {"atol": 5e-4} if cancels else {"atol": 1e-6, "rtol": 1e-5}
        np.testing.assert_allclose(found[name], value, err_msg=name, **limits)
    with torch.no_grad():
        latent = ours.encoder(x_ng)[0]
        expected_latent = vae.encoder.mu_enc(vae.encoder.enc(x_ng))
    np.testing.assert_allclose(latent, expected_latent, atol=1e-5)


@pytest.fixture(scope="module")
def folder(peer: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What SCALEX itself writes after a short training on the plates."""
    path = tmp_path_factory.mktemp("theirs") / "output"
    peer.SCALEX(together(PLATES), outdir=str(path), max_iteration=60, **SETTINGS)
    return path


def mapped_by_peer(peer: SimpleNamespace, folder: Path, **settings: Any) -> anndata.AnnData:
    """The Drop-seq cells through SCALEX's projection, in evaluation mode."""
    cells = together([DEMO / "sc_dropseq.h5ad"])
    return peer.SCALEX(cells, projection=str(folder), repeat=True, eval=True, **SETTINGS | settings)


def test_a_checkpoint_of_scalex_encodes_to_its_latents(
    peer: SimpleNamespace, folder: Path, tmp_path: Path
) -> None:
    """The whole way of a query: filters, totals, genes, maxima of its own, weights and norm of the peer's."""
    expected = mapped_by_peer(peer, folder)
    query = DEMO / "sc_dropseq.h5ad"
    settings = {"norm": "running", "scale": "query", "min_features": MIN_FEATURES}
    [report] = sx.project(folder, query, tmp_path / "mapped", progress=False, **settings)
    found = anndata.read_zarr(tmp_path / "mapped" / "sc_dropseq.zarr")
    assert 0 < report["n_passed"] == expected.n_obs < found.n_obs
    passed = found[found.obs["passed_qc"].to_numpy()]
    assert list(passed.obs_names) == list(expected.obs_names)
    np.testing.assert_allclose(passed.obsm["X_scalex"], expected.obsm["latent"], atol=1e-5)


def test_scalex_reads_a_checkpoint_of_ours(peer: SimpleNamespace, view: Any, tmp_path: Path) -> None:
    """Trained and written by us, loaded and used by the peer: the same latents."""
    from streamx.interop.scalex import write_checkpoint
    from streamx.train.model import load_model

    sx.train(view, tmp_path / "model", max_iteration=60, progress=False)
    model = load_model(tmp_path / "model")
    write_checkpoint(tmp_path / "scalex" / "checkpoint", model.module, list(model.genes))
    expected = mapped_by_peer(peer, tmp_path / "scalex")
    settings = {"norm": "running", "scale": "query", "min_features": MIN_FEATURES}
    sx.project(model, DEMO / "sc_dropseq.h5ad", tmp_path / "mapped", progress=False, **settings)
    found = anndata.read_zarr(tmp_path / "mapped" / "sc_dropseq.zarr")
    np.testing.assert_allclose(
        found[list(expected.obs_names)].obsm["X_scalex"], expected.obsm["latent"], atol=1e-5
    )


def test_inference_in_training_mode(peer: SimpleNamespace, folder: Path, theirs: anndata.AnnData) -> None:
    """The peer's default: minibatches of one batch, normalised by themselves; one of a single cell, not."""
    import torch

    from streamx.interop.scalex import read_checkpoint
    from streamx.models.scalex import encode_by_minibatch

    model, genes = read_checkpoint(folder)
    x_ng = torch.as_tensor(theirs[:, genes].X.toarray(), dtype=torch.float32)
    pieces = [*torch.arange(320).split(64), torch.tensor([320])]
    dataset = SimpleNamespace(shape=(321, len(genes)))
    enc, dec = [["fc", 1024, 1, "relu"], ["fc", 10, "", ""]], [["fc", len(genes), len(PLATES), "sigmoid"]]
    vae = peer.VAE(enc, dec, n_domain=len(PLATES))
    vae.load_model(folder / "checkpoint" / "model.pt")

    class Minibatches(list):  # type: ignore[type-arg]
        dataset: Any

    loader = Minibatches((x_ng[rows], torch.zeros(len(rows)), rows.numpy()) for rows in pieces)
    loader.dataset = dataset
    expected = vae.encodeBatch(loader, device="cpu", eval=False)
    given = [(x_ng[rows], torch.zeros(len(rows), dtype=torch.int64)) for rows in pieces]
    found = np.concatenate(list(encode_by_minibatch(model, lambda: given)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_label_transfer(peer: SimpleNamespace, folder: Path) -> None:
    """The vote of the 5 nearest, cell by cell."""
    from streamx.transfer import transfer_labels

    reference = anndata.read_h5ad(folder / "adata.h5ad")
    query = mapped_by_peer(peer, folder)
    expected = peer.label_transfer(reference, query, rep="latent", label="cell_line")
    found = transfer_labels(reference.obsm["latent"], reference.obs["cell_line"], query.obsm["latent"])
    assert found.labels_n.tolist() == list(expected)
    assert len(set(expected)) > 1
