from __future__ import annotations

from typing import Any

import pytest

from streamx.arches.options import training_settings
from streamx.errors import StreamxWarning, UsageError

RULE = {"patience": 10, "threshold": 0, "reduce_lr_on_plateau": True, "lr_patience": 8, "lr_factor": 0.1}
FOUND = {"patience": 10, "threshold": 0, "lr_patience": 8, "lr_factor": 0.1}


@pytest.mark.parametrize(
    ("kind", "asked", "want"),
    [
        ("scvi", {"n_epochs": 500, "lr": None, "frequency": 1}, {"max_epochs": 500}),
        ("scvi", {"early_stopping_kwargs": RULE | {"early_stopping_metric": "elbo"}}, FOUND),
        (
            "scvi",
            {"early_stopping_kwargs": {"on": "full_dataset"}},
            {"patience": 15, "threshold": 3.0, "lr_patience": 0, "lr_factor": 0.5},
        ),
        (
            "trvae",
            {"early_stopping_kwargs": {"lr_patience": 13}, "alpha_epoch_anneal": 200, "train_frac": 0.8},
            {"patience": 20, "threshold": 0.0, "lr_patience": 13, "lr_factor": 0.1}
            | {"warmup_epochs": 200, "train_size": 0.8},
        ),
        ("trvae", {"use_early_stopping": False, "use_stratified_sampling": False, "clip_value": 0},
         {"patience": 0, "sampling": "shuffled"}),
        ("totalvi", {"n_iter_kl_warmup": "auto", "batch_size": 256}, {"minibatch_size": 256}),
        ("totalvi", {"n_epochs_kl_warmup": 10, "n_iter_kl_warmup": 5}, {"warmup_steps": 5}),
        (
            "scvi",
            {"max_epochs": 3, "early_stopping": True, "plan_kwargs": {"weight_decay": 0.0}},
            {"max_epochs": 3, "patience": 45, "weight_decay": 0.0},
        ),
        ("scvi", {"train_size": 0.8, "test_size": 0.2}, {"train_size": 0.8}),
    ],
)  # fmt: skip
def test_documented_options(kind: str, asked: dict[str, Any], want: dict[str, Any]) -> None:
    assert training_settings(kind, asked) == want


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"epochs": 3}, "unknown training option 'epochs'"),
        ({"early_stopping_kwargs": {"patient": 3}}, "unknown early stopping option 'patient'"),
        ({"clip_value": 1.0}, "clip_value = 1.0 is not offered"),
        ({"train_size": 0.8, "test_size": 0.1}, "train_size 0.8 and test_size 0.1"),
    ],
)
def test_refused(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        training_settings("scvi", asked)


def test_another_metric_is_said_not_to_count() -> None:
    with pytest.warns(StreamxWarning, match="accuracy"):
        training_settings("scanvi", {"early_stopping_kwargs": {"early_stopping_metric": "accuracy"}})
