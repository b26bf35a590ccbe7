"""--where: what it accepts, what it refuses, and that it agrees with pandas."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from streamx.errors import UsageError
from streamx.preprocess.where import rows_where

OBS = pd.DataFrame(
    {
        "study": pd.Categorical(["a", "b", "c", None, "a", "b"]),
        "n_umi": [1, 20, 300, 4000, 50, 6],
        "score": [0.5, np.nan, 1.5, 2.5, -1.0, 0.0],
        "good": [True, False, True, True, False, True],
        "cell type": ["T", "B", "T", "", "NK", "B"],
        "depth": pd.array([1, 2, None, 4, 5, 6], dtype="Int64"),
        "flag": pd.array([True, None, False, True, True, False], dtype="boolean"),
        "number": pd.Categorical([1, 2, 1, 2, 3, 3]),
    }
)


def where(expression: str) -> np.ndarray:
    return rows_where(expression, lambda name: OBS[name], list(OBS.columns), len(OBS))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("study == 'a'", [1, 0, 0, 0, 1, 0]),
        ("study != 'a'", [0, 1, 1, 0, 0, 1]),  # a missing value is neither
        ("study in ['a', 'c']", [1, 0, 1, 0, 1, 0]),
        ("study not in ['a', 'c']", [0, 1, 0, 1, 0, 1]),
        ("study in []", [0, 0, 0, 0, 0, 0]),
        ("n_umi > 20", [0, 0, 1, 1, 1, 0]),
        ("20 <= n_umi < 300", [0, 1, 0, 0, 1, 0]),
        ("score > -2", [1, 0, 1, 1, 1, 1]),
        ("n_umi / 10 + 1 >= 6", [0, 0, 1, 1, 1, 0]),
        ("good", [1, 0, 1, 1, 0, 1]),
        ("not good", [0, 1, 0, 0, 1, 0]),
        ("flag", [1, 0, 0, 1, 1, 0]),
        ("good and study == 'a' or n_umi == 6", [1, 0, 0, 0, 0, 1]),
        ("(good) & ~(study == 'a') | (n_umi == 50)", [0, 0, 1, 1, 1, 1]),
        ("`cell type` == 'T'", [1, 0, 1, 0, 0, 0]),
        ("study < 'b'", [1, 0, 0, 0, 1, 0]),
        ("depth >= 4", [0, 0, 0, 1, 1, 1]),
        ("number in (1, 3)", [1, 0, 1, 0, 1, 1]),
        ("depth == n_umi", [1, 0, 0, 0, 0, 1]),
    ],
)
def test_rows(expression: str, expected: list[int]) -> None:
    np.testing.assert_array_equal(where(expression), np.array(expected, bool))


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "study.str.len() > 0",
        "study[0] == 'a'",
        "@study == 'a'",
        "n_umi",
        "'a' == 'a'",
        "nothing == 1",
        "study ==",
        "n_umi == 'a'",
        "study == 1",
        "study in other",
        "study in 'abc'",
        "n_umi ** 9 > 1",
        "(lambda: True)()",
        "[x for x in study]",
        "study is None",
        "study + 'a' == 'aa'",
        "",
        "n_umi > 1" + " + 1" * 5000,
    ],
)
def test_refused(expression: str) -> None:
    with pytest.raises(UsageError, match="study"):
        where(expression)
