"""Labels that come later: joined by name, over old rows only, without touching counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from store_samples import NAME, sample, tree, with_names

import streamx as sx
from streamx.errors import BadFileError, InputError, StreamxWarning, UsageError
from streamx.store import Collection
from streamx.store.annotate import read_table


@pytest.fixture
def store(tmp_path: Path) -> Collection:
    """Two files that share their first five names."""
    made = {"a": sample(9, 7, 0, donor=["d1"] * 9), "b": sample(5, 7, 1, donor=["d2"] * 5)}
    return sx.convert(made, tmp_path / "store", batch_key="donor")


def reopened(store: Collection) -> Collection:
    return sx.open(store.path)


def test_by_the_stores_names(store: Collection, tmp_path: Path) -> None:
    before = tree(store.path)
    table = pd.DataFrame({"label": ["T", "B"], "score": [0.5, 1.5], "n": [3, 4]}, index=["c1-a", "c8"])
    report = sx.annotate(store.path, table)
    assert report == {"n_cells": 2, "columns": ["label", "score", "n"], "generation": 2}
    after = reopened(store)
    assert after.obs["label"].dropna().to_dict() == {"c1-a": "T", "c8": "B"}
    assert after.obs["score"].dropna().to_dict() == {"c1-a": 0.5, "c8": 1.5}
    assert after.obs["n"].dtype == "Int64"
    assert after.obs["n"].dropna().to_dict() == {"c1-a": 3, "c8": 4}
    assert list(after.obs_column("label", 3, 9)) == list(after.obs["label"].iloc[3:9])
    now = tree(store.path)
    assert [key for key in before if now[key] != before[key]] == ["/streamx.json"]
    assert sx.verify(store.path)["ok"]
    assert "label" not in store.obs_columns  # opened before
    assert not list(tmp_path.glob("*.journal"))


def test_by_original_names(tmp_path: Path) -> None:
    made = {"a": with_names(sample(4, 7, 0), "a"), "b": sample(5, 7, 1)}
    made["a"].obs_names = ["c9", "c1", "x", "y"]
    store = sx.convert(made, tmp_path / "store")
    assert "c1-b" in store.obs_names
    table = pd.DataFrame({"label": list("pqr")}, index=["c9", "x", "c4"])
    sx.annotate(store.path, table)
    assert reopened(store).obs["label"].dropna().to_dict() == {"c9": "p", "x": "q", "c4": "r"}
    with pytest.raises(InputError, match="'c1' occurs in several files"):
        sx.annotate(store.path, pd.DataFrame({"other": [1, 2]}, index=["c1", "none"]))


def test_original_names_that_find_more(tmp_path: Path) -> None:
    """Some names are unchanged in the store; the table is still one of original names."""
    one, two = sample(4, 7, 0), sample(4, 7, 1)
    two.obs_names = ["c0", "x1", "x2", "x3"]
    store = sx.convert({"a": one, "b": two}, tmp_path / "store")
    table = pd.DataFrame({"label": [1, 2, 3]}, index=["c1", "c2", "x3"])
    assert sx.annotate(store.path, table)["n_cells"] == 3


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.csv.gz", "t.tsv.gz"])
def test_files(store: Collection, tmp_path: Path, name: str) -> None:
    separator = "," if ".csv" in name else "\t"
    table = pd.DataFrame({"label": ["T, or B", "NK"], "ok": [True, False]}, index=["c1-a", "c8"])
    table.to_csv(tmp_path / name, sep=separator)
    assert sx.annotate(store.path, tmp_path / name)["n_cells"] == 2
    after = reopened(store).obs
    assert after["label"].dropna().to_dict() == {"c1-a": "T, or B", "c8": "NK"}
    assert after["ok"].dtype == "boolean"


def test_names_that_look_like_numbers(tmp_path: Path) -> None:
    adata = sample(3, 7, 0)
    adata.obs_names = ["001", "002", "1e5"]
    store = sx.convert(adata, tmp_path / "store", batch_key="kind")
    for i, header in enumerate(["cell,", ",", "0,", ""]):  # the last as R writes it
        (tmp_path / "t.csv").write_text(f"{header}l{i}\n001,x\n1e5,y\n")
        assert sx.annotate(store.path, tmp_path / "t.csv")["n_cells"] == 2
        assert reopened(store).obs[f"l{i}"].dropna().to_dict() == {"001": "x", "1e5": "y"}


def test_words_for_missing_are_labels_or_missing(store: Collection, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("cell,label\nc1-a,NA\nc8,\nc7,Unknown\n")
    sx.annotate(store.path, tmp_path / "t.csv")
    assert reopened(store).obs["label"].dropna().to_dict() == {"c7": "Unknown"}


class TestRefused:
    def test_no_cell(self, store: Collection) -> None:
        with pytest.raises(InputError, match="names none of the cells") as caught:
            sx.annotate(store.path, pd.DataFrame({"label": [1]}, index=["nobody"]))
        assert "c" in (caught.value.fix or "")

    def test_twice(self, store: Collection) -> None:
        with pytest.raises(BadFileError, match="cell 'c8' occurs twice"):
            sx.annotate(store.path, pd.DataFrame({"label": [1, 2]}, index=["c8", "c8"]))

    def test_the_batch(self, store: Collection) -> None:
        with pytest.raises(UsageError, match="'donor' names the batches"):
            sx.annotate(store.path, pd.DataFrame({"donor": ["d9"]}, index=["c8"]))

    def test_no_column(self, store: Collection, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("cell\nc8\n")
        with pytest.raises(BadFileError, match="no column besides"):
            sx.annotate(store.path, tmp_path / "t.csv")
        with pytest.raises(BadFileError, match="reserved"):
            sx.annotate(store.path, pd.DataFrame({NAME: ["x"]}, index=["c8"]))

    def test_no_file(self, store: Collection, tmp_path: Path) -> None:
        with pytest.raises(BadFileError, match="can't be read"):
            sx.annotate(store.path, tmp_path / "none.csv")
        (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00binary\x00")
        with pytest.raises(BadFileError):
            sx.annotate(store.path, tmp_path / "b.csv")
        (tmp_path / "e.csv").write_text("")
        with pytest.raises(BadFileError):
            sx.annotate(store.path, tmp_path / "e.csv")

    def test_no_store(self, tmp_path: Path) -> None:
        with pytest.raises(BadFileError):
            sx.annotate(tmp_path / "none", pd.DataFrame({"l": [1]}, index=["x"]))
        assert not list(tmp_path.iterdir())

    def test_some_rows_name_no_cell(self, store: Collection) -> None:
        with pytest.warns(StreamxWarning, match="1 of its 2 rows name no cell"):
            sx.annotate(store.path, pd.DataFrame({"label": [1, 2]}, index=["c8", "nobody"]))

    def test_a_refused_table_changes_nothing(self, store: Collection, tmp_path: Path) -> None:
        before = tree(tmp_path)
        with pytest.raises(InputError):
            sx.annotate(store.path, pd.DataFrame({"label": [1]}, index=["nobody"]))
        assert tree(tmp_path) == before


class TestAgain:
    def test_the_same_table_is_done_already(self, store: Collection) -> None:
        table = pd.DataFrame({"label": ["T"]}, index=["c8"])
        assert [sx.annotate(store.path, table)["generation"] for _ in range(2)] == [2, 2]

    @pytest.mark.parametrize("value", [1, 0.5, True, "u"])
    def test_a_column_is_replaced_whatever_its_dtype(self, store: Collection, value: object) -> None:
        table = pd.DataFrame({"label": ["T", "B"]}, index=["c8", "c7"])
        sx.annotate(store.path, table)
        for base in ("label", "kind"):
            with pytest.warns(StreamxWarning, match=r"is replaced") if base == "label" else _nothing():
                sx.annotate(store.path, pd.DataFrame({base: [value]}, index=["c6"]))
            found = reopened(store).obs[base]
            assert found.dropna().to_dict() == {"c6": value}
            assert (
                reopened(store)
                .obs_column(base, 2, 11)
                .equals(found.reset_index(drop=True).iloc[2:11].reset_index(drop=True))
            )

    def test_a_column_of_the_files_is_replaced(self, tmp_path: Path) -> None:
        adata = sample(6, 7, 0, donor=["d"] * 6, kind=["T"] * 6, m=np.arange(6))
        store = sx.convert(adata, tmp_path / "store", batch_key="donor")
        with pytest.warns(StreamxWarning, match="is replaced"):
            sx.annotate(store.path, pd.DataFrame({"kind": [1.5], "m": ["many"]}, index=["c3"]))
        after = reopened(store)
        assert after.obs["kind"].dropna().to_dict() == {"c3": 1.5}
        assert after.obs["m"].dropna().to_dict() == {"c3": "many"}
        assert store.obs["kind"].eq("T").all()


def _nothing() -> object:
    import contextlib

    return contextlib.nullcontext()


class TestBetweenAppends:
    def test_old_rows_have_it_and_new_ones_may_bring_theirs(self, store: Collection) -> None:
        names = list(store.obs_names)
        sx.annotate(store.path, pd.DataFrame({"label": ["z", "y"] * 7, "age": range(14)}, index=names))
        third = with_names(sample(4, 7, 2, donor=["d3"] * 4), "n")
        sx.convert({"c": third}, store.path, append=True)
        after = reopened(store)
        assert (after.generation, after.n_obs) == (3, 18)
        assert after.obs["label"].iloc[14:].isna().all()
        assert list(after.obs["label"].iloc[:14]) == ["z", "y"] * 7
        assert after.obs["age"].dtype == "Int64"
        fourth = with_names(sample(3, 7, 3, donor=["d3"] * 3, label=["a", "y", "x"], age=[7, 8, 9]), "m")
        sx.convert({"d": fourth}, store.path, append=True)
        sx.annotate(store.path, pd.DataFrame({"late": ["l"]}, index=["m1"]))
        last = reopened(store)
        assert list(last.obs["label"].cat.categories) == ["y", "z", "a", "x"]
        assert sorted(last.obs["label"].iloc[18:]) == ["a", "x", "y"]
        assert list(last.obs["label"].iloc[:14]) == ["z", "y"] * 7
        assert sorted(last.obs["age"].iloc[18:]) == [7, 8, 9]
        assert last.obs["late"].dropna().to_dict() == {"m1": "l"}
        for start, stop in ((0, 21), (10, 20), (14, 18), (13, 15), (20, 21)):
            assert list(last.obs_column("label", start, stop).astype(object).fillna("-")) == list(
                last.obs["label"].astype(object).fillna("-").iloc[start:stop]
            )
        assert sx.verify(store.path)["ok"]

    def test_the_same_table_covers_rows_that_came_since(self, store: Collection) -> None:
        table = pd.DataFrame({"label": ["T", "B"]}, index=["c8", "n0"])
        with pytest.warns(StreamxWarning, match="1 of its 2 rows"):
            sx.annotate(store.path, table)
        sx.convert({"c": with_names(sample(4, 7, 2, donor=["d3"] * 4), "n")}, store.path, append=True)
        with pytest.warns(StreamxWarning, match="is replaced"):
            sx.annotate(store.path, table)
        assert reopened(store).obs["label"].dropna().to_dict() == {"c8": "T", "n0": "B"}

    def test_a_rerun_of_the_conversion_is_still_done(self, store: Collection) -> None:
        made = {"a": sample(9, 7, 0, donor=["d1"] * 9), "b": sample(5, 7, 1, donor=["d2"] * 5)}
        sx.annotate(store.path, pd.DataFrame({"label": ["T"]}, index=["c8"]))
        again = sx.convert(made, store.path, batch_key="donor")
        assert again.generation == 2
        assert "label" in again.obs_columns

    def test_numbers_that_become_text(self, store: Collection) -> None:
        """An annotation of numbers, then a file with text in that column."""
        sx.annotate(store.path, pd.DataFrame({"stage": [1, 2]}, index=["c8", "c7"]))
        third = with_names(sample(4, 7, 2, donor=["d3"] * 4, stage=["late", "1", "late", "2"]), "n")
        after = sx.convert({"c": third}, store.path, append=True)
        found = after.obs["stage"]
        assert found.dropna().iloc[:2].to_dict() == {"c7": "2", "c8": "1"}
        assert sorted(found.iloc[14:]) == ["1", "2", "late", "late"]


def test_a_table_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("cell,a/b,_streamx_x\n1,x,y\n")
    assert list(read_table(tmp_path / "t.csv").columns) == ["a/b", "_streamx_x"]
