"""trVAE models as scArches saves them: ``model_params.pt``, ``attr.pkl`` and ``var_names.csv`` in a folder.

Versions from December 2020 to 0.6.1 write the same names and settings. No file says which version wrote it,
though two things changed: see ``december_2020`` of :func:`read_trvae`.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamx.config import TrvaeConfig, build
from streamx.errors import BadFileError, UsageError
from streamx.interop.scvi_files import lines
from streamx.interop.unpickle import first_line, read_pickle, read_torch
from streamx.models.trvae import Trvae

# Their names -> ours. L and N number the layers of both nets; the decoder's first layer stands apart there.
_NAMES = (
    (r"theta", "log_theta_gb"),
    (r"encoder\.FC\.L0\.cond_L\.weight", "encoder.blocks.0.batch"),
    (r"encoder\.FC\.L0\.expr_L\.(weight|bias)", r"encoder.blocks.0.linear.\1"),
    (r"encoder\.FC\.L([1-9]\d*)\.(weight|bias)", r"encoder.blocks.\1.linear.\2"),
    (r"encoder\.FC\.N(\d+)\.(\w+)", r"encoder.blocks.\1.norm.\2"),
    (r"encoder\.mean_encoder\.(weight|bias)", r"encoder.mean.\1"),
    (r"encoder\.log_var_encoder\.(weight|bias)", r"encoder.log_var.\1"),
    (r"decoder\.FirstL\.L0\.cond_L\.weight", "decoder.blocks.0.batch"),
    (r"decoder\.FirstL\.L0\.expr_L\.weight", "decoder.blocks.0.linear.weight"),
    (r"decoder\.FirstL\.N0\.(\w+)", r"decoder.blocks.0.norm.\1"),
    (r"decoder\.HiddenL\.L([1-9]\d*)\.weight", r"decoder.blocks.\1.linear.weight"),
    (r"decoder\.HiddenL\.N([1-9]\d*)\.(\w+)", r"decoder.blocks.\1.norm.\2"),
    (r"decoder\.(?:mean|recon)_decoder\.0\.(weight|bias)", r"decoder.out.\1"),
    (r"decoder\.dropout_decoder\.(weight|bias)", r"decoder.dropout.\1"),
)
_SETTINGS = (
    *("hidden_layer_sizes", "latent_dim", "dr_rate", "use_mmd", "mmd_on", "mmd_boundary"),
    *("recon_loss", "beta", "use_bn", "use_ln"),
)


@dataclass(frozen=True, eq=False)
class SavedTrvae:
    """A trVAE model and what it was trained on.

    Attributes
    ----------
    module
        The network, in evaluation mode.
    genes
        Names of its inputs.
    batch_key, batches
        obs column of the conditions, and their names in the order of their codes.
    """

    module: Trvae
    genes: list[str]
    batch_key: str
    batches: list[str]


def to_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """scArches' state dict -> ours.

    Raises
    ------
    BadFileError
        If a name is not one of trVAE's.
    """
    return {_our_name(name): value for name, value in theirs.items()}


def _our_name(name: str) -> str:
    for pattern, ours in _NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise BadFileError(f"weight {name!r} is none of trVAE's", fix="give a folder that scArches' TRVAE saved")


def to_theirs(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict -> scArches'."""
    out = "mean_decoder" if "log_theta_gb" in ours else "recon_decoder"  # mse has no dispersion
    theirs = {_their_name(name, out): value.detach().cpu().clone() for name, value in ours.items()}
    assert list(to_ours(theirs)) == list(ours)
    return theirs


def _their_name(name: str, out: str) -> str:
    """``encoder.blocks.2.linear.weight`` -> ``encoder.FC.L2.weight``, and so on."""
    if name == "log_theta_gb":
        return "theta"
    net, part, *rest = name.split(".")
    if part != "blocks":
        heads = {"out": f"{out}.0", "dropout": "dropout_decoder", "mean": "mean_encoder"}
        return ".".join([net, heads.get(part, "log_var_encoder"), *rest])
    number, kind, *leaf = rest
    layers = "FC" if net == "encoder" else "HiddenL" if int(number) else "FirstL"
    if kind == "batch":
        return f"{net}.{layers}.L{number}.cond_L.weight"
    if kind == "norm":
        return f"{net}.{layers}.N{number}.{leaf[0]}"
    return f"{net}.{layers}.L{number}.{'' if int(number) else 'expr_L.'}{leaf[0]}"


def read_trvae(folder: str | Path, *, december_2020: bool = False) -> SavedTrvae:
    """A folder that scArches' ``TRVAE.save`` wrote.

    Parameters
    ----------
    december_2020
        The model was trained by scArches of that time: its size factor is the logarithm of a cell's sum (the
        sum itself from 2021 on), and with mse it was given ln(1 + x) (later x as it is).

    Raises
    ------
    BadFileError
        If a file is absent, damaged or holds code, or the three do not fit together.
    """
    folder = Path(folder)
    settings, weights = read_pickle(folder / "attr.pkl"), read_torch(folder / "model_params.pt")
    genes = lines(folder / "var_names.csv")
    try:
        chosen = {name: settings[f"{name}_"] for name in _SETTINGS}
        chosen["hidden_layer_sizes"] = tuple(int(width) for width in chosen["hidden_layer_sizes"])
        chosen |= {"size_factor": "log_sum" if december_2020 else "sum", "log_input": december_2020}
        batches = [str(name) for name in settings["conditions_"] or ()]
        module = Trvae(len(genes), len(batches), build(TrvaeConfig, chosen))
        module.load_state_dict(to_ours(weights))
    except (BadFileError, UsageError) as error:
        raise BadFileError(error.what, where=str(folder), fix=error.fix) from None
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise BadFileError(f"no trVAE model: {first_line(error)}", where=str(folder)) from None
    return SavedTrvae(module.eval(), genes, str(settings.get("condition_key_") or "condition"), batches)


def write_trvae(
    folder: str | Path, module: Trvae, genes: list[str], batches: list[str], batch_key: str = "condition"
) -> None:
    """Write a folder that scArches' ``TRVAE.load`` reads (which takes the later size factor, the row sum)."""
    config, folder = module.config, Path(folder)
    settings: dict[str, Any] = {f"{name}_": getattr(config, name) for name in _SETTINGS}
    settings |= {
        "hidden_layer_sizes_": list(config.hidden_layer_sizes),
        "condition_key_": batch_key,
        "conditions_": list(batches),
        "input_dim_": module.n_genes,
        "is_trained_": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(to_theirs(module.state_dict()), folder / ".model_params.pt.tmp")
    (folder / ".attr.pkl.tmp").write_bytes(pickle.dumps(settings, protocol=4))
    (folder / ".var_names.csv.tmp").write_text("".join(f"{gene}\n" for gene in genes), encoding="utf-8")
    for name in ("model_params.pt", "attr.pkl", "var_names.csv"):
        (folder / f".{name}.tmp").replace(folder / name)
