"""Training options in the words of scArches' and scvi-tools' documentation -> our settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamx.errors import UsageError, warn

# documented name -> field of TrainConfig
_NAMES = {
    "n_epochs": "max_epochs",
    "max_epochs": "max_epochs",
    "n_epochs_semisupervised": "max_epochs",
    "lr": "lr",
    "eps": "eps",
    "weight_decay": "weight_decay",
    "batch_size": "minibatch_size",
    "train_size": "train_size",
    "train_frac": "train_size",
    "n_epochs_kl_warmup": "warmup_epochs",
    "alpha_epoch_anneal": "warmup_epochs",
    "n_iter_kl_warmup": "warmup_steps",
    "n_steps_kl_warmup": "warmup_steps",
    "alpha_iter_anneal": "warmup_steps",
    "early_stopping_patience": "patience",
    "early_stopping_min_delta": "threshold",
    "lr_patience": "lr_patience",
    "lr_factor": "lr_factor",
    "seed": "seed",
}
# of early_stopping_kwargs
_STOPPING = {
    "patience": "patience",
    "threshold": "threshold",
    "lr_patience": "lr_patience",
    "lr_factor": "lr_factor",
}
_METRICS = ("early_stopping_metric", "save_best_state_metric", "early_stopping_monitor")
_BY_LOSS = ("elbo", "elbo_validation", "val_unweighted_loss", "val_loss", "loss", "reconstruction_loss")
# What is done in any case, or says only how the work is done or shown.
_ACCEPTED = (
    *("frequency", "check_val_every_n_epoch", "metrics_to_monitor", "on", "monitor", "n_workers", "use_cuda"),
    *("accelerator", "devices", "logger", "enable_progress_bar", "show_progbar", "benchmark", "num_workers"),
)
# What must be as it is documented by default, if it is named.
_FIXED: dict[str, Any] = {
    "n_samples": None,
    "clip_value": 0.0,
    "use_stratified_split": False,
    "optimizer": "Adam",
}
_GROUPS = ("plan_kwargs", "trainer_kwargs", "train_fun_kwargs", "datasplitter_kwargs")
STOPPING_KWARGS: dict[str, dict[str, Any]] = {
    "scvi-tools": {"patience": 15, "threshold": 3.0, "lr_patience": 10, "lr_factor": 0.5, "reduce_lr": False},
    "trvae": {"patience": 20, "threshold": 0.0, "lr_patience": 7, "lr_factor": 0.1, "reduce_lr": True},
}


def training_settings(kind: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of :class:`~streamx.config.TrainConfig` from documented options; what is None is left out.

    Which cells train is said by ``train_size``; or by ``train_indices`` and ``validation_indices``, rows of
    the data as numbers or a mask, which come back as ``indices``. One that is left out is all other cells;
    cells in neither are left out of the training. scvi-tools' ``external_indexing`` is a list of the two and
    of such cells.

    Early stopping goes by the loss of the validation cells, with the whole KL divergence (what is called
    ``elbo`` and ``val_unweighted_loss``), and not before its weight has risen to 1; other metrics are warned
    about. It is on where ``early_stopping_kwargs`` or ``early_stopping`` ask for it (trVAE, totalVI: unless
    turned off), and restores the best epoch for real.

    Raises
    ------
    UsageError
        For an option that is unknown, or that can't be anything but its default here.
    """
    given = dict(asked)
    for group in _GROUPS:
        given |= given.pop(group, None) or {}
    stopping = given.pop("early_stopping_kwargs", None)
    found: dict[str, Any] = {}
    if stopping is not None:
        found |= _stopping(kind, dict(stopping))
    if given.pop("use_early_stopping", True) is False or given.pop("early_stopping", None) is False:
        found["patience"] = 0
    elif asked.get("early_stopping") and "patience" not in found:
        found["patience"] = 45  # scvi-tools' default
    if given.pop("reduce_lr_on_plateau", None) is False:
        found["lr_patience"] = 0
    if not given.pop("use_stratified_sampling", True):
        found["sampling"] = "shuffled"
    indices = _indices(given)
    if indices is not None:
        found["indices"] = indices
    _check_test_size(given.pop("test_size", None), given)
    for name in _METRICS:
        _check_metric(name, given.pop(name, None))
    for name, value in given.items():
        if name in _FIXED and value != _FIXED[name] and value is not None:
            raise UsageError(f"{name} = {value!r} is not offered", fix="leave it out")
        if name not in _NAMES and name not in _FIXED and name not in _ACCEPTED:
            raise UsageError(f"unknown training option {name!r}", fix=f"one of {', '.join(sorted(_NAMES))}")
        if name in _NAMES and value is not None and value != "auto":
            found[_NAMES[name]] = value
    if found.get("warmup_steps") is not None:
        found.pop("warmup_epochs", None)
    return found


def _indices(given: dict[str, Any]) -> tuple[Any, Any] | None:
    """Rows that train and rows that validate (None: all others), taken out of the options."""
    train, validation = given.pop("train_indices", None), given.pop("validation_indices", None)
    external = given.pop("external_indexing", None)
    if external is not None:
        train, validation = external[0], external[1] if len(external) > 1 else None
        validation = () if validation is None else validation
    if train is None and validation is None:
        return None
    if given.get("train_size") is not None or given.get("test_size") is not None:
        raise UsageError("train_size and indices both say which cells train", fix="leave one out")
    return train, validation


def _stopping(kind: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Documented defaults, and what is said instead."""
    rule = dict(STOPPING_KWARGS["trvae" if kind == "trvae" else "scvi-tools"])
    for name in _METRICS:
        _check_metric(name, kwargs.pop(name, None))
    kwargs.pop("on", None)
    reduce = kwargs.pop("reduce_lr_on_plateau", kwargs.pop("reduce_lr", rule.pop("reduce_lr")))
    unknown = set(kwargs) - set(_STOPPING)
    if unknown:
        raise UsageError(
            f"unknown early stopping option {min(unknown)!r}", fix=f"one of {', '.join(_STOPPING)}"
        )
    found = {_STOPPING[name]: value for name, value in (rule | kwargs).items()}
    return found if reduce else found | {"lr_patience": 0}


def _check_metric(name: str, metric: str | None) -> None:
    if metric is not None and metric not in _BY_LOSS:
        warn(f"{name} = {metric!r}: early stopping goes by the validation cells' loss here")


def _check_test_size(test_size: float | None, given: Mapping[str, Any]) -> None:
    train_size = given.get("train_size") or 0.9
    if test_size is not None and abs(train_size + test_size - 1) > 1e-9:
        raise UsageError(
            f"train_size {train_size} and test_size {test_size}",
            fix="they have to add up to 1: cells that are not trained on validate",
        )
