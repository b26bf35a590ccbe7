"""SCALEX's own checkpoints: ``checkpoint/model.pt`` (weights) and ``checkpoint/config.pt`` (genes and sizes).

Both are pickles inside a zip. They are read without running anything: ``model.pt`` by torch's restricted
loader, ``config.pt`` by an unpickler whose every class and function is an inert stand-in.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamx.config import ScalexConfig
from streamx.errors import BadFileError
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
_LARGEST = 1 << 28  # bytes of a config.pt after decompression: millions of gene names


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
    try:
        weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        ours = to_ours(weights)
        n_hidden, n_genes = ours["encoder.hidden.weight"].shape
        shape = ScalexConfig(n_latent=len(ours["encoder.mean.bias"]), n_hidden=n_hidden)
        model = Scalex(n_genes, len(ours["decoder.norm.weight"]), shape)
        model.load_state_dict(ours)
    except pickle.UnpicklingError as error:
        raise _refused(folder / "model.pt", error) from None
    except (OSError, RuntimeError, KeyError, AttributeError, ValueError, EOFError) as error:
        raise BadFileError(
            f"no SCALEX weights: {_first_line(error)}", where=str(folder / "model.pt")
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
    try:
        with zipfile.ZipFile(path) as archive:
            info = next(i for i in archive.infolist() if i.filename.endswith("data.pkl"))
            if info.file_size > _LARGEST:
                raise BadFileError(f"{info.file_size:,} bytes of settings", where=str(path))
            config = _Inert(io.BytesIO(archive.read(info))).load()
        genes = _names(config["n_top_features"])
        _ = int(config["n_domain"])
    except _Refused as error:
        raise _refused(path, error) from None
    except BadFileError:
        raise
    except Exception as error:
        # A pickle is a program: damaged, it can fail in any way.
        raise BadFileError(f"no SCALEX settings: {_first_line(error)}", where=str(path)) from None
    return genes, config


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _refused(path: Path, error: BaseException) -> BadFileError:
    return BadFileError(
        f"holds code, which is never run: {_first_line(error)}",
        where=str(path),
        fix="get the model from a source that you trust, as a folder written by SCALEX",
    )


class _Refused(Exception):
    pass


class _Value:
    """Stands for an object of pandas or numpy: keeps what it is made from, does nothing."""

    def __init__(self, *parts: Any) -> None:
        self.parts: list[Any] = list(parts)

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("_codecs.encode with unusual arguments")
    return text.encode("latin1")


# What pandas (1 to 3) needs to pickle an Index of strings, each replaced by a stand-in.
_INERT: dict[tuple[str, str], Any] = {("_codecs", "encode"): _latin1} | {
    key: type(f"Inert_{key[1]}", (_Value,), {})
    for key in (
        ("pandas.core.indexes.base", "_new_Index"),
        ("pandas.core.indexes.base", "Index"),
        ("pandas.indexes.base", "_new_Index"),
        ("pandas.indexes.base", "Index"),
        ("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"),
        ("pandas._libs.missing", "NA"),
        ("pandas.core.arrays.string_", "StringArray"),
        ("pandas.core.arrays.string_", "StringDtype"),
        ("pandas", "Index"),  # since pandas 3 under the public names
        ("pandas", "NA"),
        ("pandas", "StringDtype"),
        ("pandas.arrays", "StringArray"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    )
}


class _Inert(pickle.Unpickler):
    """Builds nothing but plain values and :class:`_Value`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _INERT:
            raise _Refused(f"{module}.{name}")
        return _INERT[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("tensors in the settings")


def _names(value: Any) -> list[str]:
    """The strings of a pickled index: the one list of strings, or the text array, among its parts."""
    found = _text_lists(value, depth=0)
    if len(found) != 1:
        raise BadFileError("gene names are not an index of strings")
    return found[0]


def _text_lists(value: Any, depth: int) -> list[list[str]]:
    if depth > 12:
        return []
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [value]
    if isinstance(value, _Value):
        value = value.parts
    if isinstance(value, dict):
        value = [value["data"]] if "data" in value else []
    if isinstance(value, (list, tuple)):
        return [names for item in value for names in _text_lists(item, depth + 1)]
    return []
