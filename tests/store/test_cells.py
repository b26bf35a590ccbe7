"""Cells of several files become one table: dtypes, batches, names, order."""

from __future__ import annotations

import json
import logging
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_samples import assert_holds, sample, with_names

import streamx as sx
from streamx.errors import BatchError, UsageError
from streamx.store.cells import MAX_CATEGORIES, unite
from streamx.store.frame import cast, obs_schema, safe_name
from streamx.store.order import names_digest, row_order, unique_names
from streamx.store.text import joined, text_of


def united(*columns: list | pd.Series | pd.Categorical | None, before: dict | None = None) -> pd.Series:
    """The column `x` of files that hold these values (None: no such column, two cells)."""
    frames = []
    for values in columns:
        frame = pd.DataFrame({"batch": ["b"] * (2 if values is None else len(values))})
        if values is not None:
            frame["x"] = values
        frames.append(frame)
    return unite(frames, "batch", before and {"x": before})["x"]


class TestUnion:
    def test_integers_stay_integers(self) -> None:
        assert united([1, 2], [3]).dtype == np.int64
        assert united(pd.Series([1, 2], dtype="uint8"), pd.Series([-1], dtype="int32")).dtype == np.int64

    def test_missing_integers_are_nullable(self) -> None:
        column = united([1, 2], None)
        assert column.dtype == "Int64"
        assert list(column.dropna()) == [1, 2]
        assert column.isna().sum() == 2

    def test_integers_and_floats_are_floats(self) -> None:
        assert united([1, 2], [0.5]).tolist() == [1.0, 2.0, 0.5]
        assert united([0.5], None).isna().tolist() == [False, True, True]

    def test_booleans(self) -> None:
        assert united([True], [False]).dtype == bool
        column = united([True], None)
        assert column.dtype == "boolean"
        assert column.isna().tolist() == [False, True, True]

    def test_nullable_inputs(self) -> None:
        column = united(pd.array([1, None], dtype="Int64"), [2])
        assert column.dtype == "Int64"
        assert united(pd.array([True, None], dtype="boolean"), [True]).dtype == "boolean"
        assert united(pd.array(["a", None], dtype="string"), ["b"]).tolist()[0::2] == ["a", "b"]

    def test_text_is_categorical_sorted_by_name(self) -> None:
        column = united(["b", "a"], pd.Categorical(["c", "a"], categories=["c", "a", "unused"]))
        assert list(column.cat.categories) == ["a", "b", "c"]
        assert list(column) == ["b", "a", "c", "a"]

    def test_missing_text(self) -> None:
        column = united(["b", None], None, [np.nan])
        assert column.isna().tolist() == [False, True, True, True, True]

    def test_one_and_text_one_are_the_same(self) -> None:
        column = united([1, 2], ["1", "3"], pd.Categorical([1.0, 2.0]), [2.0])
        assert list(column) == ["1", "2", "1", "3", "1", "2", "2"]
        assert list(column.cat.categories) == ["1", "2", "3"]

    @pytest.mark.parametrize("odd", [[True, False], [0.5, 1.0], pd.to_datetime(["2020-01-01", "2021-01-01"])])
    def test_conflicts_become_text_and_are_said(self, odd: list, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "streamx"):
            column = united(odd, ["a"])
        assert isinstance(column.dtype, pd.CategoricalDtype)
        if not isinstance(odd, pd.DatetimeIndex):  # dates are text in every case
            assert "'x' holds" in caplog.text

    def test_a_column_of_nothing(self) -> None:
        for values in ([None, None], [np.nan, np.nan]):
            assert united(values, None).isna().all()
            assert united(values, [1]).dtype == "Int64"

    def test_many_different_texts_stay_text(self) -> None:
        many = [f"t{i}" for i in range(MAX_CATEGORIES + 1)]
        assert united(many).tolist() == many
        assert obs_schema(united(many).to_frame()) == {"x": {"dtype": "string"}}
        assert united(many, None).isna().tolist() == [False] * len(many) + [True, True]
        frame = pd.DataFrame({"batch": many})
        assert isinstance(unite([frame], "batch")["batch"].dtype, pd.CategoricalDtype)
        grown = united(many, before={"dtype": "category", "categories": ["a"]})
        assert grown.tolist() == many  # else every name would go into the manifest
        assert not isinstance(grown.dtype, pd.CategoricalDtype)

    def test_large_unsigned_integers_are_not_wrapped(self) -> None:
        assert united(pd.Series([2**64 - 1], dtype="uint64")).tolist() == [str(2**64 - 1)]

    def test_known_categories_keep_their_codes(self) -> None:
        before = {"dtype": "category", "categories": ["z", "b"]}
        column = united(["a", "b", None], before=before)
        assert list(column.cat.categories) == ["z", "b", "a"]
        assert column.cat.codes.tolist() == [2, 1, -1]

    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ([1, 2], ["a", "1"], ["1", "2", "a", "1"]),
            ([1.0, 2.5], ["2.5", "1"], ["1", "2.5", "2.5", "1"]),
            ([True, False], ["x", "True"], ["True", "False", "x", "True"]),
            (["7", "8"], [8, 9], ["7", "8", "8", "9"]),
        ],
    )
    def test_numbers_that_become_text_later_keep_their_values(
        self, old: list, new: list, expected: list
    ) -> None:
        first = pd.DataFrame(
            {"batch": ["b", "b"], "x": unite([pd.DataFrame({"x": old})], "batch")["x"].array}
        )
        schema = obs_schema(first)
        second = unite([pd.DataFrame({"batch": ["b", "b"], "x": new})], "batch", schema, lambda n: first[n])
        after = (schema | obs_schema(second))["x"]
        whole = pd.concat([cast(first["x"], after), cast(second["x"], after)], ignore_index=True)
        assert list(whole) == expected


FIXTURE = (HealthCheck.function_scoped_fixture,)
values = st.one_of(
    st.lists(st.integers(-5, 5), min_size=1, max_size=4),
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.lists(st.one_of(st.none(), st.text(max_size=3), st.integers(0, 3)), min_size=1, max_size=4),
    st.none(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=4), st.integers(0, 3))
def test_union_in_parts_is_the_union(columns: list, cut: int) -> None:
    """Files appended later give the values that one conversion gives, and no code changes."""
    frames = [
        pd.DataFrame({"batch": ["b"] * (2 if v is None else len(v))} | ({} if v is None else {"x": v}))
        for v in columns
    ]
    whole = unite(frames, "batch")
    assert len(whole) == sum(map(len, frames))
    cut = min(cut, len(frames))
    if cut in (0, len(frames)) or "x" not in whole:
        return
    first = unite(frames[:cut], "batch")
    schema = obs_schema(first)
    second = unite(frames[cut:], "batch", schema, lambda name: first[name])
    after = schema | obs_schema(second)
    if "x" in first:
        kept = [str(c) for c in schema["x"].get("categories", [])]
        assert [str(c) for c in after["x"].get("categories", [])][: len(kept)] == kept
        pieces = [cast(first["x"], after["x"]), cast(second["x"], after["x"])]
        for got, wanted in zip(pd.concat(pieces), whole["x"], strict=True):
            if pd.isna(wanted):
                assert pd.isna(got)
            elif not isinstance(wanted, str):
                assert str(got) in (str(wanted), str(float(wanted))) or float(got) == float(wanted)
            elif isinstance(got, str):  # a float column written earlier has lost what was an integer
                assert got in (wanted, wanted.removesuffix(".0")) or float(got) == float(wanted)


class TestBatches:
    def test_one_per_file(self, tmp_path: Path) -> None:
        made = {"b": sample(11, 7, 0, batch=["u"] * 11), "a": sample(5, 7, 1)}
        store = sx.convert(made, tmp_path / "store")
        assert store.batches == ["a", "b"]
        assert store.batch_key == "batch"
        assert list(store.obs_column("batch_original").iloc[5:]) == ["u"] * 11
        assert store.obs_column("batch_original").iloc[:5].isna().all()

    def test_a_single_files_own_column(self, tmp_path: Path) -> None:
        adata = sample(11, 7, 0, batch=[2, 10] * 5 + [2])
        store = sx.convert(adata, tmp_path / "store")
        assert store.batches == ["10", "2"]
        assert_holds(store, {"adata": adata})

    def test_several_columns_joined(self, tmp_path: Path) -> None:
        adata = sample(4, 7, 0, donor=["d1", "d2", "d1", "d2"], lane=pd.Categorical([1, 1, 2, 2]))
        store = sx.convert(adata, tmp_path / "store", batch_key="donor, lane")
        assert store.batch_key == "donor_lane"
        assert store.batches == ["d1_1", "d1_2", "d2_1", "d2_2"]
        assert list(store.obs["donor_lane"]) == list(
            store.obs["donor"].astype(str) + "_" + store.obs["lane"].astype(str)
        )

    def test_a_joined_name_that_is_taken(self, tmp_path: Path) -> None:
        adata = sample(2, 7, 0, a=["x", "y"], b=["1", "2"], a_b=["old", "older"])
        store = sx.convert(adata, tmp_path / "store", batch_key="a,b")
        assert store.batches == ["x_1", "y_2"]
        assert sorted(store.obs["a_b_original"]) == ["old", "older"]

    def test_files_name_the_same_batch_with_other_dtypes(self, tmp_path: Path) -> None:
        made = {
            "a": with_names(sample(3, 7, 0, donor=[1, 2, 1]), "a"),
            "b": with_names(sample(2, 7, 1, donor=["1", "3"]), "b"),
            "c": with_names(sample(2, 7, 2, donor=pd.Categorical([2.0, 3.0])), "c"),
        }
        store = sx.convert(made, tmp_path / "store", batch_key="donor")
        assert store.batches == ["1", "2", "3"]
        assert store.summary()["batches"] == {"1": 3, "2": 2, "3": 2}

    def test_none_named(self, tmp_path: Path) -> None:
        adata = sample(6, 7, 0, depth=np.arange(6) / 2, donor=list("xyxyxy"), sample=list("pppqqq"))
        with pytest.raises(BatchError, match=r"donor, sample.*; or _streamx_file, if"):
            sx.convert(adata, tmp_path / "store")
        with pytest.raises(BatchError, match="no obs column study"):
            sx.convert(adata, tmp_path / "store", batch_key="study")
        assert list(tmp_path.iterdir()) == []

    def test_a_cell_without_batch(self, tmp_path: Path) -> None:
        adata = sample(3, 7, 0, donor=["x", None, "y"])
        with pytest.raises(BatchError, match=r"1 cells have no batch in donor, the first is 'c1'"):
            sx.convert(adata, tmp_path / "store", batch_key="donor")

    def test_obs_map(self, tmp_path: Path) -> None:
        made = {
            "a": with_names(sample(3, 7, 0, celltype=["T", "B", "T"], kind=["k"] * 3), "a"),
            "b": with_names(sample(2, 7, 1, cell_type=["NK", "B"]), "b"),
        }
        names = tmp_path / "map.json"
        names.write_text(json.dumps({"a": {"celltype": "cell_type"}}))
        store = sx.convert(made, tmp_path / "store", obs_map=str(names))
        assert "celltype" not in store.obs_columns
        assert sorted(store.obs["cell_type"]) == ["B", "B", "NK", "T", "T"]
        for bad, match in (
            ({"a": {"nothing": "x"}}, "names the columns"),
            ({"a": {"celltype": "kind"}}, "several obs columns are named"),
            ({"A": {"celltype": "cell_type"}}, r"names the files \['A'\]\n  fix: the files are \['a', 'b'\]"),
            ([1], "is no map"),
        ):
            names.write_text(json.dumps(bad))
            with pytest.raises(UsageError, match=match):
                sx.convert(made, tmp_path / "other", obs_map=str(names))


class TestNames:
    def unique(self, folder: Path, taken: list[str] = [], **files: list[str]) -> list[str]:  # noqa: B006
        names = joined(map(text_of, files.values()))
        lengths = [len(mine) for mine in files.values()]
        hashes = text_of(taken).hashes()
        return unique_names(names, list(files), lengths, folder, hashes).strings().tolist()

    def test_only_shared_names_get_the_file(self, tmp_path: Path) -> None:
        names = self.unique(tmp_path, a=["c1", "c2"], b=["c2", "c3"])
        assert names == ["c1", "c2-a", "c2-b", "c3"]

    def test_twice_in_a_file(self, tmp_path: Path) -> None:
        names = self.unique(tmp_path, a=["c1", "c1", "c1"], b=["c2"])
        assert names == ["c1-a", "c1-a-1", "c1-a-2", "c2"]

    def test_taken_names(self, tmp_path: Path) -> None:
        taken = ["c1", "c1-b", "c2"]
        names = self.unique(tmp_path, taken, b=["c1", "c2", "c3"])
        assert len(set(names) | set(taken)) == 6
        assert names[2] == "c3"

    def test_in_pieces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = {key: [f"c{i % 41}" for i in range(n)] for key, n in (("a", 90), ("b", 35), ("c", 1))}
        files["c"] = ["alone é"]
        whole = self.unique(tmp_path, ["c3"], **files)
        monkeypatch.setattr("streamx.store.scratch.PIECE_ROWS", 7)
        monkeypatch.setattr("streamx.store.order.BUCKET_ROWS", 10)
        assert self.unique(tmp_path, ["c3"], **files) == whole
        assert len(set(whole)) == 126
        assert whole[-1] == "alone é"

    @settings(max_examples=80, deadline=None, suppress_health_check=FIXTURE)
    @given(
        st.lists(
            st.lists(st.sampled_from(["c", "c-a", "c-a-1", "c-b", "d", ""]), max_size=5),
            min_size=1,
            max_size=3,
        ),
        st.lists(st.sampled_from(["c", "c-a", "c-b-1"]), unique=True),
    )
    def test_always_unique(self, tmp_path: Path, files: list[list[str]], taken: list[str]) -> None:
        names = self.unique(tmp_path, taken, **dict(zip("abc", files, strict=False)))
        assert len(set(names)) == len(names)
        assert not set(names) & set(taken)
        originals = [name for file in files for name in file]
        assert all(new.startswith(old) for new, old in zip(names, originals, strict=True))

    def test_originals_are_kept(self, tmp_path: Path) -> None:
        made = {"a": sample(5, 7, 0), "b": sample(7, 7, 1)}  # both have c0..c4
        store = sx.convert(made, tmp_path / "store")
        assert store.obs_names.is_unique
        assert_holds(store, made)

    @given(st.text(max_size=300))
    @settings(max_examples=200, deadline=None)
    def test_a_column_name_is_one_folder(self, name: str) -> None:
        safe = safe_name(name)
        assert safe
        assert "/" not in safe
        assert "\\" not in safe
        assert safe not in (".", "..", "_index", "zarr.json")
        assert len(safe.encode()) <= 128
        assert safe_name(safe) == safe


class TestRowOrder:
    @settings(max_examples=60, deadline=None, suppress_health_check=FIXTURE)
    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=4),
        st.integers(-(2**70), 2**70),
        st.integers(1, 3),
        st.randoms(use_true_random=False),
    )
    def test_files_in_any_order_give_the_same(
        self, tmp_path: Path, lengths: list[int], seed: int, n_batches: int, random
    ) -> None:
        rng = np.random.default_rng(len(lengths))
        batches = [rng.integers(0, n_batches, n) for n in lengths]
        digests = [7 if i < 2 else i for i in range(len(lengths))]  # two files with the same names
        checksums = [f"{i}" for i in range(len(lengths))]

        def order(which: list[int]) -> list[tuple[int, int]]:
            placed_rows, destination = row_order(
                np.concatenate([batches[i] for i in which]),
                [digests[i] for i in which],
                [checksums[i] for i in which],
                [lengths[i] for i in which],
                seed,
                tmp_path,
            )
            assert (destination[placed_rows] == np.arange(sum(lengths))).all()
            assert sorted(destination) == list(range(sum(lengths)))
            rows = [(i, row) for i in which for row in range(lengths[i])]
            placed = sorted(zip(destination, rows, strict=True))
            codes = [batches[i][row] for _, (i, row) in placed]
            assert codes == sorted(codes)
            return [row for _, row in placed]

        files = list(range(len(lengths)))
        random.shuffle(files)
        assert order(files) == order(sorted(files))

    def test_shuffled_inside_batches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        n = 5000
        codes = np.repeat([0, 1], n)
        order = np.array(row_order(codes, [1], ["x"], [2 * n], 0, tmp_path)[0])
        assert set(order[:n]) == set(range(n))
        assert abs(np.corrcoef(np.arange(n), order[:n])[0, 1]) < 0.05
        other = np.array(row_order(codes, [1], ["x"], [2 * n], 1, tmp_path)[0])
        assert (order != other).mean() > 0.9
        monkeypatch.setattr("streamx.store.scratch.PIECE_ROWS", 1009)
        monkeypatch.setattr("streamx.store.order.BUCKET_ROWS", 700)
        np.testing.assert_array_equal(row_order(codes, [1], ["x"], [2 * n], 0, tmp_path)[0], order)

    def test_digest_tells_names_apart(self) -> None:
        cases = [
            (["a", "b"], ["g"]),
            (["ab"], ["g"]),
            (["a"], ["b", "g"]),
            (["a", "b"], ["h"]),
            (["b", "a"], ["g"]),
        ]
        digests = {names_digest([text_of(o)], v) for o, v in cases}
        assert names_digest([text_of(["a"]), text_of(["b"])], ["g"]) in digests
        assert len(digests) == len(cases)


def test_row_order_of_a_store_ignores_keys_and_order_of_files(tmp_path: Path) -> None:
    made = {
        "a": with_names(sample(23, 7, 0), "a"),
        "b": with_names(sample(19, 7, 1), "b"),
        "c": with_names(sample(5, 7, 2), "c"),
    }
    for i, keys in enumerate(permutations("abc")):
        renamed = {f"{n}_file": made[key] for n, key in enumerate(keys)}
        store = sx.convert(renamed, tmp_path / str(i), batch_key="kind")
        if i == 0:
            names, values = list(store.obs_names), store.read(0, 47).toarray()
        assert list(store.obs_names) == names
        np.testing.assert_array_equal(store.read(0, 47).toarray(), values)
