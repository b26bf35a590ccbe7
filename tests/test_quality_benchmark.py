"""benchmarks/quality.py and proteins.py: which methods run where, what decides, and their scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scripts import one another by name."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), str(BENCHMARKS / "peers"), *sys.path])


def row(method: str, name: str, accuracy: float, ebm: float) -> dict[str, Any]:
    return {
        "key": {"set": name, "method": method},
        "scores": {"q": {"balanced_accuracy": accuracy, "ebm": ebm}},
    }


def test_ours_may_be_a_little_worse_than_the_peer_it_is_paired_with() -> None:
    from report import criteria

    peers = {"streamx scVI": "scVI", "streamx trVAE": "trVAE"}
    rows = [row("scVI", "a", 0.8, 0.5), row("streamx scVI", "a", 0.785, 0.55), row("trVAE", "a", 0.95, 0.6)]
    lines, passed = criteria(rows, peers)
    assert [line.split()[0] for line in lines] == ["PASS", "PASS"]
    assert passed
    rows.append(row("streamx trVAE", "a", 0.95, 0.57))
    lines, passed = criteria(rows, peers)
    assert [line.split()[0] for line in lines] == ["PASS", "PASS", "PASS", "FAIL"]
    assert not passed


def test_count_models_map_and_do_nothing_else() -> None:
    import arches
    from quality import methods_of
    from sets import SETS

    assert set(arches.METHODS) < set(methods_of(SETS["pbmc_map"]))
    assert not set(arches.METHODS) & set(methods_of(SETS["pbmc_int"]))
    assert set(methods_of(SETS["kang_map"])) == {"PCA", *arches.METHODS}


def test_held_out_cells_are_a_fifth_of_every_label_of_one_batch() -> None:
    from proteins import MEASURED, held_out

    batches = np.repeat([MEASURED, "PBMC5k"], [300, 100])
    labels = np.tile(["B", "NK", "NK", "NK"], 100)
    mask = held_out(batches, labels)
    assert (mask[batches == MEASURED].sum(), mask[batches != MEASURED].sum()) == (60, 0)
    assert (mask & (labels == "B")).sum() == 15
    assert np.array_equal(mask, held_out(batches, labels))


def test_correlation_is_per_protein_and_of_logarithms() -> None:
    from proteins import score

    truth_np = np.random.default_rng(0).poisson(5.0, (50, 2))
    found = score(np.log1p(truth_np) * [2.0, -1.0] + 3.0, truth_np)
    assert found["per_protein"] == [1.0, -1.0]
    assert found["pearson"] == pytest.approx(0.0)
