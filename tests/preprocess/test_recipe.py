"""Settings become the documented recipes; contradictions are refused; cells and genes are lost loudly."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from streamx.config import PreprocessConfig
from streamx.errors import EmptyError, GeneError, StreamxWarning, UsageError
from streamx.preprocess.atac import variable_peaks
from streamx.preprocess.features import positions
from streamx.preprocess.hvg import candidates
from streamx.preprocess.qc import cells_to_keep, genes_to_keep, names_to_use
from streamx.preprocess.recipe import Recipe, make_recipe


def recipe(**settings: Any) -> Recipe:
    return make_recipe(PreprocessConfig(**settings))


def test_rna_is_scalex() -> None:
    found = recipe()
    assert (found.min_features, found.min_cells, found.target, found.n_top) == (600, 3, 10_000, 2000)
    assert found.drop == ("ERCC", "MT-", "mt-")
    assert found.transform == {
        "binarize": False,
        "target_sum": 10_000,
        "total": "view_total",
        "log1p": True,
        "scale": "batch",
    }
    assert recipe(keep_mt=True).drop == ("ERCC",)
    assert recipe(scale="none").transform["scale"] is None
    assert recipe(n_top_features=0).search == recipe(genes="file").search == "none"


def test_counts_have_no_transform() -> None:
    found = recipe(profile="counts", n_top_features=500, flavor="seurat_v3")
    assert found.drop == ()
    assert found.search == "seurat_v3"
    assert not any(found.transform.values())


@pytest.mark.parametrize(
    ("variant", "search", "transform"),
    [
        ("0.2.0", "peaks", (True, 10_000, "view_total", False, "batch")),
        ("1.0.2", "seurat", (True, None, None, False, "batch")),
        ("1.0.4", "peaks", (False, 10_000, "view_total", True, "global")),
    ],
)
def test_atac_variants(variant: str, search: str, transform: tuple[Any, ...]) -> None:
    found = recipe(profile="ATAC", atac=variant)
    assert (found.min_features, found.min_cells, found.n_top) == (100, 3, 100_000)
    assert found.search == search
    assert tuple(found.transform.values()) == transform


def test_processed_values_are_only_scaled_by_the_global_maximum() -> None:
    for found in (recipe(processed=True), recipe(obsm="X_pca")):
        assert (found.min_features, found.min_cells, found.drop) == (0, 0, ())
        assert found.transform == {
            "binarize": False, "target_sum": None, "total": None, "log1p": False, "scale": "global",
        }  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"processed": True, "min_features": 10},
        {"obsm": "protein", "n_top_features": 10},
        {"genes": "file", "n_top_features": 10},
        {"target_sum": 0},
        {"min_cells": -1},
    ],
)
def test_contradictions(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        recipe(**settings)


def test_names() -> None:
    names = ["MT-CO1", "mt-Co1", "Mt-Co1", "ERCC-1", "ercc-1", "AMT-1"]
    np.testing.assert_array_equal(names_to_use(names, ("ERCC", "MT-", "mt-")), [0, 0, 1, 0, 1, 1])
    assert names_to_use(names, ()).all()


def test_a_batch_that_loses_many_cells_is_named_with_quantiles() -> None:
    n_features = np.array([700] * 10 + [100, 200, 650, 700])
    code = np.array([0] * 10 + [1] * 4)
    with pytest.warns(StreamxWarning, match="poor: 2 of 4 cells removed .*median") as caught:
        kept = cells_to_keep(n_features, code, np.ones(14, bool), min_features=600, batches=["rich", "poor"])
    assert kept.sum() == 12
    assert "rich" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fifth is not more than a fifth
        cells_to_keep(
            np.array([1, 9, 9, 9, 9]), np.zeros(5, int), np.ones(5, bool), min_features=5, batches=["a"]
        )


def test_no_cell_left_names_a_value_that_works() -> None:
    n_features = np.arange(100, 200)
    args = (n_features, np.zeros(100, int), np.ones(100, bool))
    with pytest.raises(EmptyError, match="none of 100 cells has 600") as caught:
        cells_to_keep(*args, min_features=600, batches=["a"])
    works = int(str(caught.value.fix).split()[1])
    assert cells_to_keep(*args, min_features=works, batches=["a"]).sum() >= 90


def test_no_gene_left() -> None:
    with pytest.raises(EmptyError, match="most frequent is in 4"):
        genes_to_keep(np.array([4, 1, 90]), np.array([True, True, False]), min_cells=5)


def test_candidates_are_measured_everywhere() -> None:
    measured = np.array([[1, 1, 0], [1, 0, 1]], bool)
    keep = np.ones(3, bool)
    np.testing.assert_array_equal(candidates(measured, keep, allow_unmeasured=False), [1, 0, 0])
    assert candidates(measured, keep, allow_unmeasured=True).all()
    with pytest.raises(EmptyError, match="allow-unmeasured"):
        candidates(measured[:, 1:], keep[1:], allow_unmeasured=False)


def test_listed_genes() -> None:
    keep = np.array([True, True, False])
    with pytest.warns(StreamxWarning) as caught:
        found = positions(["a", "b", "c"], keep, ["x", "b", "c", "a"])
    np.testing.assert_array_equal(found, [-1, 1, -1, 0])
    assert [str(w.message).splitlines()[0] for w in caught] == [
        "1 of 4 listed features are not in the data and become zero: x",
        "1 of 4 listed features were filtered out and become zero: c",
    ]
    with pytest.raises(GeneError, match="listed twice"):
        positions(["a", "b", "c"], keep, ["a", "a"])
    with pytest.raises(GeneError, match="none of 2"):
        positions(["a", "b", "c"], keep, ["x", "y"])


def test_peaks_keep_ties_and_one_more() -> None:
    """episcanpy's threshold is the score at position n_top, counted from 0."""
    sums = np.array([50, 49, 51, 10, 90, 0, 100])
    kept, score = variable_peaks(sums, 100, n_top=2)
    np.testing.assert_allclose(score, [1, 0.99, 0.99, 0.6, 0.6, 0.5, 0.5])
    np.testing.assert_array_equal(kept, [1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(variable_peaks(sums, 100, n_top=3)[0], [1, 1, 1, 1, 1, 0, 0])
    assert variable_peaks(sums, 100, n_top=7)[0].all()
