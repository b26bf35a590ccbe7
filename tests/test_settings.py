"""Settings given from Python, where no parser has looked at them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streamx.config import MetricsConfig, TrainConfig, build
from streamx.errors import UsageError


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr": "a"}, "lr = 'a'\n  fix: a number"),
        ({"max_iteration": "100"}, "max_iteration = '100'\n  fix: a whole number"),
        ({"max_iteration": 2.5}, "max_iteration = 2.5\n  fix: a whole number"),
        ({"minibatch_size": [64]}, r"minibatch_size = \[64\]"),
        ({"patience": True}, "patience = True"),
        ({"lr": float("nan")}, "a finite number"),
        ({"max_epochs": float("inf")}, "a finite number"),
        ({"max_epochs": 0}, "at least 1"),
    ],
    ids=str,
)
def test_what_is_no_such_number_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build(TrainConfig, settings)


def test_numbers_in_other_shapes_are_taken() -> None:
    made = build(TrainConfig, {"max_iteration": 1e4, "seed": np.int64(3), "lr": 1, "patience": None})
    assert (made.max_iteration, made.seed, made.lr, made.patience) == (10_000, 3, 1, None)
    assert type(made.max_iteration) is type(made.seed) is int
    assert build(MetricsConfig, {"resolution": 0.5}).resolution == 0.5
