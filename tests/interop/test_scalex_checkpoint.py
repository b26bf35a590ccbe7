import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from streamx.config import ScalexConfig
from streamx.errors import BadFileError
from streamx.interop.scalex import read_checkpoint, read_config, to_ours, to_theirs, write_checkpoint
from streamx.models.scalex import Scalex

GENES = ["CD3E", "MS4A1", "LYZ", "NKG7", "PPBP"]


def network(n_batches: int) -> Scalex:
    return Scalex(5, n_batches, ScalexConfig(n_hidden=7), torch.Generator().manual_seed(n_batches)).eval()


@pytest.mark.parametrize("n_batches", [1, 3])
def test_written_and_read_back(tmp_path: Path, n_batches: int) -> None:
    model = network(n_batches)
    write_checkpoint(tmp_path / "out" / "checkpoint", model, GENES)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint"):
        again, genes = read_checkpoint(folder)
        assert genes == GENES
        assert again.config == model.config
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


def test_names_are_those_of_scalex(golden: Path) -> None:
    theirs = {
        k[3:]: torch.as_tensor(v) for k, v in np.load(golden / "scalex_net.npz").items() if k[:3] == "sd:"
    }
    ours = to_ours(theirs)
    assert set(ours) == set(Scalex(12, 3, ScalexConfig(n_latent=3, n_hidden=16)).state_dict())
    back = to_theirs(ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[k], theirs[k]) for k in theirs)
    assert "decoder.net.0.norm.weight" in to_theirs(network(1).state_dict())


def test_a_foreign_weight_is_refused() -> None:
    with pytest.raises(BadFileError, match="'px_r' is none of SCALEX's"):
        to_ours({"px_r": torch.ones(3)})


@pytest.mark.parametrize(
    "index",
    [
        pd.Index(GENES),
        pd.Index(GENES, dtype=object),
        pd.Index(GENES, dtype="string", name="gene"),
        np.array(GENES, dtype=object),
        GENES,
    ],
)
def test_gene_names_in_any_of_pandas_dresses(tmp_path: Path, index: Any) -> None:
    torch.save({"n_top_features": index, "enc": [], "dec": [], "n_domain": 2}, tmp_path / "config.pt")
    assert read_config(tmp_path / "config.pt")[0] == GENES


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["config.pt", "model.pt"])
def test_code_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path, network(2), GENES)
    torch.save({"n_top_features": Bomb(), "n_domain": 2}, tmp_path / name)
    with pytest.raises(BadFileError, match="holds code, which is never run"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_allowed_names_are_inert(tmp_path: Path) -> None:
    """Names on the list are replaced too: calling them with odd arguments makes nothing."""
    payload = b"cnumpy.core.multiarray\n_reconstruct\n(I100000000000\nI1\ntR."
    with zipfile.ZipFile(tmp_path / "config.pt", "w") as archive:
        archive.writestr("config/data.pkl", payload)
    with pytest.raises(BadFileError, match="can't be read: an array without values"):
        read_config(tmp_path / "config.pt")


def test_damaged_or_absent_files(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match=r"config\.pt"):
        read_checkpoint(tmp_path)
    write_checkpoint(tmp_path, network(2), GENES)
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFileError, match=r"model\.pt"):
        read_checkpoint(tmp_path)
    write_checkpoint(tmp_path, network(2), GENES)
    write_checkpoint(tmp_path / "other", network(3), GENES)
    (tmp_path / "config.pt").write_bytes((tmp_path / "other" / "config.pt").read_bytes())
    with pytest.raises(BadFileError, match="5 genes and 3 batches, but the weights have 5 and 2"):
        read_checkpoint(tmp_path)
