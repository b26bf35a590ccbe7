"""SCALEX's own checkpoints: ``checkpoint/model.pt`` (weights) and ``checkpoint/config.pt`` (genes and sizes).

Both are pickles inside a zip. They are read without running anything (:mod:`streamx.interop.unpickle`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamx.config import ScalexConfig
from streamx.errors import BadFileError
from streamx.interop.unpickle import Opaque, first_line, read_torch
from streamx.models.scalex import Scalex

_NAMES = {
    "encoder.enc.net.0.fc": "encoder.hidden",
    "encoder.enc.net.0.norm": "encoder.norm",
    "encoder.mu_enc.net.0.fc": "encoder.mean",
    "encoder.var_enc.net.0.fc": "encoder.log_var",
    "decoder.net.0.fc": "decoder.out",
}
_DOMAIN = re.compile(r"^decoder\.net\.0\.norm\.bns\.(\d+)\.(\w+)$")
_ONE_DOMAIN = re.compile(r"^decoder\.net\.0\.norm\.(\w+)$")


def to_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """SCALEX's state dict -> ours: other names, one table instead of one batch norm per batch.

    Raises
    ------
    BadFileError
        If a name is not one of SCALEX's.
    """
    ours: dict[str, Tensor] = {}
    domains: dict[str, dict[int, Tensor]] = {}
    for name, value in theirs.items():
        prefix, _, leaf = name.rpartition(".")
        if prefix in _NAMES:
            ours[f"{_NAMES[prefix]}.{leaf}"] = value
        elif match := _DOMAIN.match(name):
            domains.setdefault(match.group(2), {})[int(match.group(1))] = value
        elif match := _ONE_DOMAIN.match(name):
            domains.setdefault(match.group(1), {})[0] = value
        else:
            raise BadFileError(f"weight {name!r} is none of SCALEX's", fix="give a SCALEX output folder")
    for leaf, values in domains.items():
        if sorted(values) != list(range(len(values))):
            raise BadFileError(f"batch norms {sorted(values)} are not numbered without a gap")
        ours[f"decoder.norm.{leaf}"] = torch.stack([values[d] for d in range(len(values))])
    return ours


def to_theirs(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict -> SCALEX's."""
    back = {name: prefix for prefix, name in _NAMES.items()}
    theirs: dict[str, Tensor] = {}
    for name, value in ours.items():
        prefix, _, leaf = name.rpartition(".")
        if prefix in back:
            theirs[f"{back[prefix]}.{leaf}"] = value.detach().cpu().clone()
            continue
        for d, row in enumerate(value.detach().cpu()):
            domain = f".bns.{d}" if len(value) > 1 else ""
            theirs[f"decoder.net.0.norm{domain}.{leaf}"] = row.clone()
    return theirs


def read_checkpoint(folder: str | Path) -> tuple[Scalex, list[str]]:
    """The network (in evaluation mode) and the genes of a SCALEX output folder or its ``checkpoint`` folder.

    Raises
    ------
    BadFileError
        If a file is absent, damaged, holds code, or the two do not fit together.
    """
    folder = Path(folder)
    folder = folder / "checkpoint" if (folder / "checkpoint" / "config.pt").is_file() else folder
    genes, config = read_config(folder / "config.pt")
    weights = read_torch(folder / "model.pt")
    try:
        ours = to_ours(weights)
        n_hidden, n_genes = ours["encoder.hidden.weight"].shape
        shape = ScalexConfig(n_latent=len(ours["encoder.mean.bias"]), n_hidden=n_hidden)
        model = Scalex(n_genes, len(ours["decoder.norm.weight"]), shape)
        model.load_state_dict(ours)
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise BadFileError(
            f"no SCALEX weights: {first_line(error)}", where=str(folder / "model.pt")
        ) from None
    if len(genes) != n_genes or int(config["n_domain"]) != model.n_batches:
        raise BadFileError(
            f"{len(genes)} genes and {config['n_domain']} batches, but the weights have {n_genes} and "
            f"{model.n_batches}",
            where=str(folder / "config.pt"),
            fix="take both files from the same run",
        )
    return model.eval(), genes


def write_checkpoint(folder: str | Path, model: Scalex, genes: list[str]) -> None:
    """Write ``model.pt`` and ``config.pt`` so that SCALEX loads them (``projection=`` its parent folder)."""
    import pandas as pd

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "n_top_features": pd.Index(list(genes), dtype=object),
        "enc": [["fc", model.config.n_hidden, 1, "relu"], ["fc", model.config.n_latent, "", ""]],
        "dec": [["fc", model.n_genes, model.n_batches, "sigmoid"]],
        "n_domain": model.n_batches,
    }
    for name, value in (("model.pt", to_theirs(model.state_dict())), ("config.pt", config)):
        tmp = folder / f".{name}.tmp"
        torch.save(value, tmp)
        tmp.replace(folder / name)


def read_config(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Gene names and the plain settings of a ``config.pt``.

    Raises
    ------
    BadFileError
        If it is absent, damaged, or names a class or function that no such file needs.
    """
    config = read_torch(path)
    try:
        genes = _names(config["n_top_features"])
        _ = int(config["n_domain"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadFileError(f"no SCALEX settings: {first_line(error)}", where=str(path)) from None
    return genes, config


def _names(value: Any) -> list[str]:
    """The strings of a pickled index: the one list of strings, or the text array, among its parts."""
    found = _text_lists(value, depth=0)
    if len(found) != 1:
        raise ValueError("gene names are not an index of strings")
    return found[0]


def _text_lists(value: Any, depth: int) -> list[list[str]]:
    if depth > 12:
        return []
    if isinstance(value, Opaque):
        value = value.parts
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [value]
    if isinstance(value, dict):
        value = [value["data"]] if "data" in value else []
    if isinstance(value, (list, tuple)):
        return [names for item in value for names in _text_lists(item, depth + 1)]
    return []
