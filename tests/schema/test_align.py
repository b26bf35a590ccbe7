import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamx.errors import GeneError, StreamxWarning
from streamx.schema import align, check_overlap, strip_version

NAMES = st.lists(st.text("ABCDE.1", min_size=1, max_size=3), max_size=12)


@given(NAMES, NAMES.map(lambda n: list(dict.fromkeys(n))))
def test_columns_point_at_equal_names(names: list[str], target: list[str]) -> None:
    a = align(names, target)
    for name, column in zip(names, a.columns, strict=True):
        assert column == (target.index(name) if name in target else -1)
    assert a.found == len(set(names) & set(target))
    assert set(a.missing) == set(target) - set(names)
    assert list(a.extra) == [n for n in names if n not in target]
    assert set(a.duplicates) == {n for n in names if names.count(n) > 1 and n in target}
    assert a.found + len(a.missing) == a.n_target == len(target)


def test_versions_are_stripped_only_on_request() -> None:
    names, target = ["ENSG00000141510.16", "HLA-A.2"], ["ENSG00000141510", "HLA-A"]
    assert align(names, target).columns.tolist() == [-1, -1]
    assert align(names, target, strip_versions=True).columns.tolist() == [0, -1]
    assert strip_version("ENSMUSG00000000001.4") == "ENSMUSG00000000001"


def test_target_must_be_unique() -> None:
    with pytest.raises(GeneError, match="'A' twice"):
        align(["A"], ["A", "B", "A"])


def overlap(names: list[str], target: list[str]) -> None:
    check_overlap(align(names, target), names, target, where="file.h5ad")


def test_guards() -> None:
    target = [f"GENE{i}" for i in range(10)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overlap(target[:8], target)
    with pytest.warns(StreamxWarning, match=r"file.h5ad: 7 of 10 genes found \(70%\); missing: GENE7"):
        overlap(target[:7], target)
    with pytest.raises(GeneError, match=r"4 of 10 genes found \(40%\)"):
        overlap(target[:4], target)


def test_the_likely_cause_is_named() -> None:
    human = [f"ENSG{i:011d}" for i in range(5)]
    with pytest.raises(GeneError, match="wrong organism"):
        overlap([f"ENSMUSG{i:011d}" for i in range(5)], human)
    with pytest.raises(GeneError, match="wrong organism: ignoring upper and lower case 3 match"):
        overlap(["Actb", "Cd3e", "Ms4a1"], ["ACTB", "CD3E", "MS4A1"])
    with pytest.raises(GeneError, match="wrong organism: ignoring upper and lower case 3 match"):
        overlap(["Actb", "Cd3e", "Ms4a1"], ["ACTB", "CD3E", "MS4A1", *(f"GENE{i}" for i in range(97))])
    with pytest.raises(GeneError, match="--strip-versions"):
        overlap([f"{h}.3" for h in human], human)
    with pytest.raises(GeneError, match="these are gene symbols, the target has Ensembl ids"):
        overlap(["ACTB", "CD3E"], human)
    with pytest.raises(GeneError, match="no name is shared: another organism"):
        overlap(["hlh-16", "msa-1"], ["ACTB", "CD3E"])
    with pytest.raises(GeneError, match="same organism and genome annotation"):
        overlap(["x", "ACTB"], ["ACTB", "CD3E", "MS4A1"])


def test_no_target_genes() -> None:
    assert align(["a"], []).overlap == 1.0
    assert align([], ["a"]).columns.dtype == np.int64
