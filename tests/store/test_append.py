"""New files join an existing store: genes aligned to its axis, codes that never change, generations."""

from __future__ import annotations

import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from store_samples import assert_holds, rows_of, sample, tree, with_names

import streamx as sx
from streamx.errors import BatchError, GeneError, InputError, StreamxWarning, UsageError

GENES = [f"g{i}" for i in range(20)]


def first(n: int = 31, **obs: object) -> ad.AnnData:
    columns = obs or {"donor": ["d2", "d1"] * (n // 2) + ["d2"] * (n % 2), "age": np.arange(n)}
    return with_names(sample(n, GENES, 0, **columns), "a")


def second(genes: list[str] = GENES, n: int = 17, **obs: object) -> ad.AnnData:
    columns = obs or {"donor": ["d1", "d0"] * (n // 2) + ["d3"] * (n % 2), "age": np.arange(n)}
    return with_names(sample(n, genes, 1, **columns), "b")


def stored_codes(place: Path, column: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(place.glob(f"*/00000[01].zarr/**/{column}/codes/c/0"))]


def test_same_genes(tmp_path: Path, tiny_geometry: None) -> None:
    place = tmp_path / "store"
    old = sx.convert({"a": first()}, place, batch_key="donor", shard_rows=13)
    before = tree(place)
    store = sx.convert({"b": second()}, place, append=True, shard_rows=13)
    assert (store.generation, store.shape) == (2, (48, 20))
    assert_holds(store, {"a": first(), "b": second()})
    assert store.batches == ["d1", "d2", "d0", "d3"]
    assert [s.n_obs for part in store.parts for s in part.shards] == [13, 13, 5, 13, 4]
    assert sx.verify(place)["ok"]
    after = tree(place)
    changed = [key for key in before if after[key] != before[key]]
    assert changed == ["/streamx.json"]
    assert list(store.obs_names[:31]) == list(old.obs_names)
    np.testing.assert_array_equal(old.read(0, 31).toarray(), store.read(0, 31).toarray())
    np.testing.assert_array_equal(store.batch_codes[:31], old.batch_codes)
    x_ng = store.read(25, 40)
    np.testing.assert_array_equal(x_ng.toarray(), store.read(0, 48).toarray()[25:40])
    lazy = store.to_anndata(lazy=True)
    np.testing.assert_array_equal(lazy.X.compute().toarray(), store.read(0, 48).toarray())


def test_codes_never_change(tmp_path: Path) -> None:
    """Names that sort first come last; the bytes of what was written stay, whatever follows."""
    place = tmp_path / "store"
    sx.convert({"m": first(kind=["m", "n"] * 15 + ["m"], donor=["d5"] * 31)}, place, batch_key="donor")
    known = {name: stored_codes(place, name) for name in ("kind", "donor", "_streamx_file")}
    categories: dict[str, list[str]] = {"kind": ["m", "n"], "donor": ["d5"], "_streamx_file": ["m"]}
    for i, key in enumerate("zac"):
        new = with_names(sample(5, GENES, i, kind=[key, "n", "b", key, "0"], donor=[f"d{i}"] * 5), key)
        store = sx.convert({key: new}, place, append=True)
        for name, codes in known.items():
            assert stored_codes(place, name)[: len(codes)] == codes
            now = store.manifest.obs_schema[name]["categories"]
            assert now[: len(categories[name])] == categories[name]
            assert now[len(categories[name]) :] == sorted(now[len(categories[name]) :])
            categories[name] = now
    assert store.generation == 4
    assert store.batches == ["d5", "d0", "d1", "d2"]
    assert list(store.obs_column("_streamx_file").cat.categories) == ["m", "z", "a", "c"]


class TestGenes:
    def test_other_order_and_a_few_missing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        place = tmp_path / "store"
        sx.convert({"a": first()}, place, batch_key="donor")
        new = second([*GENES[:2:-1], "other1", "other2"])
        with caplog.at_level(logging.INFO, "streamx"):
            store = sx.convert({"b": new}, place, append=True)
        assert "17 of the 20 genes of the store (85 %), 2 genes of its own dropped" in caplog.text
        assert_holds(store, {"a": first(), "b": new})
        measured = dict(zip(store.batches, store.measured_bg, strict=True))
        assert measured["d2"].all()
        for batch in ("d1", "d0", "d3"):  # d1: in both files
            assert (~measured[batch]).nonzero()[0].tolist() == [0, 1, 2]
        entry = store.sources.set_index("key").loc["b"]
        assert (entry["n_genes"], entry["n_dropped"], entry["overlap"]) == (19, 2, 0.85)

    def test_warned_below_80(self, tmp_path: Path) -> None:
        sx.convert({"a": first()}, tmp_path / "store", batch_key="donor")
        with pytest.warns(StreamxWarning, match=r"12 of 20 genes found \(60%\)"):
            store = sx.convert({"b": second(GENES[:12])}, tmp_path / "store", append=True)
        assert_holds(store, {"a": first(), "b": second(GENES[:12])})

    def test_refused_below_50(self, tmp_path: Path) -> None:
        place = tmp_path / "store"
        sx.convert({"a": first()}, place, batch_key="donor")
        before = tree(place)
        with pytest.raises(GeneError, match="9 of 20 genes found"):
            sx.convert({"b": second(GENES[:9])}, place, append=True)
        with pytest.raises(GeneError, match="wrong organism"):
            sx.convert({"b": second([g.upper() for g in GENES])}, place, append=True)
        assert tree(tmp_path) == {f"/store{key}": value for key, value in before.items()}

    def test_versions_are_stripped_as_before(self, tmp_path: Path) -> None:
        names = [f"ENSG{i:011d}" for i in range(20)]
        made = [first(), second()]
        made[0].var_names = [f"{n}.1" for n in names]
        made[1].var_names = [f"{n}.2" for n in names]
        sx.convert({"a": made[0]}, tmp_path / "store", batch_key="donor", strip_versions=True)
        store = sx.convert({"b": made[1]}, tmp_path / "store", append=True)
        assert (store.read(31, 48).sum(), store.n_vars) == (made[1].X.sum(), 20)

    def test_axis_of_an_outer_join(self, tmp_path: Path) -> None:
        made = {"a": first(), "b": second(["x1", *GENES])}
        sx.convert(made, tmp_path / "store", join="outer")
        third = with_names(sample(5, ["x1", *GENES], 4), "c")
        assert_holds(sx.convert({"c": third}, tmp_path / "store", append=True), made | {"c": third})


class TestObs:
    def test_columns_that_one_side_lacks(self, tmp_path: Path) -> None:
        one = first(donor=["d"] * 31, m=np.arange(31), f=np.linspace(0, 1, 31), b=[True] * 31, t=["x"] * 31)
        two = second(donor=["d"] * 17, new_m=np.arange(17), new_b=[False] * 17, new_t=["y"] * 17)
        sx.convert({"a": one}, tmp_path / "store", batch_key="donor")
        store = sx.convert({"b": two}, tmp_path / "store", append=True)
        assert_holds(store, {"a": one, "b": two})
        for name, dtype in {
            "m": "Int64",
            "f": "float64",
            "b": "boolean",
            "new_m": "Int64",
            "new_b": "boolean",
        }.items():
            assert store.obs_column(name).dtype == dtype
            missing = slice(0, 31) if name.startswith("new") else slice(31, 48)
            assert store.obs_column(name).iloc[missing].isna().all(), name
        for shard in (tmp_path / "store" / "shards").iterdir():
            ad.read_zarr(shard)

    @pytest.mark.parametrize(
        ("old", "new", "dtype", "expected"),
        [
            ([1, 2], ["x", "1"], "category", ["1", "2", "x", "1"]),
            ([0.5, np.nan], ["x", "1"], "category", ["0.5", None, "x", "1"]),
            ([True, False], [3, 4], "category", ["True", "False", "3", "4"]),
            (["1", "x"], [1, 2], "category", ["1", "x", "1", "2"]),
            ([1, 2], [0.5, np.nan], "float64", [1.0, 2.0, 0.5, None]),
            ([1, None], [0.5, 1.5], "float64", [1.0, None, 0.5, 1.5]),
            (pd.array([1, None], dtype="Int64"), [0.5, 1.5], "float64", [1.0, None, 0.5, 1.5]),
            ([None, None], [1, 2], "category", [None, None, "1", "2"]),
        ],
    )
    def test_dtypes_that_conflict(
        self, tmp_path: Path, old: list, new: list, dtype: str, expected: list
    ) -> None:
        make = {"donor": ["d", "d"]}
        sx.convert(
            {"a": with_names(sample(2, GENES, 0, **make, v=old), "a")}, tmp_path / "store", batch_key="donor"
        )
        two = with_names(sample(2, GENES, 1, **make, v=new), "b")
        store = sx.convert({"b": two}, tmp_path / "store", append=True)
        assert store.manifest.obs_schema["v"]["dtype"] == dtype
        found = store.obs_column("v").iloc[[*rows_of(store, "a"), *rows_of(store, "b")]]
        assert [None if pd.isna(v) else v for v in found] == expected
        third = with_names(sample(2, GENES, 2, **make, v=["9", "x"]), "c")
        again = sx.convert({"c": third}, tmp_path / "store", append=True).obs_column("v")
        assert again.isna().sum() == found.isna().sum()

    def test_names_that_are_taken(self, tmp_path: Path) -> None:
        one, two = sample(9, GENES, 0, donor=["d"] * 9), sample(12, GENES, 1, donor=["e"] * 12)
        old = sx.convert({"a": one}, tmp_path / "store", batch_key="donor")
        store = sx.convert({"b": two}, tmp_path / "store", append=True)
        assert store.obs_names.is_unique
        assert list(store.obs_names[:9]) == list(old.obs_names)
        assert set(store.obs_names[9:]) == {*(f"c{i}-b" for i in range(9)), "c9", "c10", "c11"}
        assert_holds(store, {"a": one, "b": two})

    def test_batches_are_files(self, tmp_path: Path) -> None:
        """A key that is taken gets a number, and so its batch: never an alias of another's."""
        made = {"a": first(), "b": second()}
        sx.convert(made, tmp_path / "store")
        third = with_names(sample(7, GENES, 8), "c")
        store = sx.convert({"a": third}, tmp_path / "store", append=True)
        assert store.batches == ["a", "b", "a-2"]
        assert store.summary()["batches"] == {"a": 31, "b": 17, "a-2": 7}
        assert_holds(store, {**made, "a-2": third})

    def test_no_batch_column(self, tmp_path: Path) -> None:
        sx.convert({"a": first()}, tmp_path / "store", batch_key="donor")
        with pytest.raises(BatchError, match="no obs column donor"):
            sx.convert({"b": second(patient=["p"] * 17)}, tmp_path / "store", append=True)
        with pytest.raises(UsageError, match="the store's batches are 'donor'"):
            sx.convert({"b": second()}, tmp_path / "store", append=True, batch_key="age")
        sx.convert({"b": second()}, tmp_path / "store", append=True, batch_key="donor")

    def test_joined_batches(self, tmp_path: Path) -> None:
        make = {"p": ["x", "y"] * 8 + ["x"], "q": [1, 2] * 8 + [1]}
        sx.convert({"a": with_names(sample(17, GENES, 0, **make), "a")}, tmp_path / "store", batch_key="p,q")
        store = sx.convert({"b": second(**(make | {"q": [3] * 17}))}, tmp_path / "store", append=True)
        assert store.batches == ["x_1", "y_2", "x_3", "y_3"]


class TestModalities:
    def proteins(self, adata: ad.AnnData, names: list[str], value: int) -> ad.AnnData:
        adata.obsm["protein_expression"] = pd.DataFrame(
            np.full((adata.n_obs, len(names)), value), columns=names, index=adata.obs_names
        )
        return adata

    def test_features_are_aligned(self, tmp_path: Path) -> None:
        sx.convert({"a": self.proteins(first(), ["CD3", "CD4"], 5)}, tmp_path / "store", batch_key="donor")
        store = sx.convert({"b": self.proteins(second(), ["CD4", "CD8"], 7)}, tmp_path / "store", append=True)
        assert store.modalities["protein_expression"] == {
            "names": ["CD3", "CD4"],
            "measured": {"d1": [True, True], "d2": [True, True], "d0": [False, True], "d3": [False, True]},
        }
        values = store.read_obsm("protein_expression")
        assert (values[:31] == 5).all()
        assert (values[31:] == [0, 7]).all()

    def test_a_file_without(self, tmp_path: Path) -> None:
        sx.convert({"a": self.proteins(first(), ["CD3", "CD4"], 5)}, tmp_path / "store", batch_key="donor")
        store = sx.convert({"b": second()}, tmp_path / "store", append=True)
        assert (store.read_obsm("protein_expression", 31, 48) == 0).all()
        assert store.read_obsm("protein_expression").shape == (48, 2)
        measured = store.modalities["protein_expression"]["measured"]
        assert measured["d2"] == [True, True]
        assert not any(measured.get("d0", [False]))
        store.to_anndata()

    def test_only_the_new_file_has_it(self, tmp_path: Path) -> None:
        sx.convert({"a": first()}, tmp_path / "store", batch_key="donor")
        store = sx.convert({"b": self.proteins(second(), ["CD3"], 1)}, tmp_path / "store", append=True)
        assert store.modalities == {}


class TestTwice:
    def test_the_newest_again_is_done_already(self, tmp_path: Path) -> None:
        place = tmp_path / "store"
        sx.convert({"a": first()}, place, batch_key="donor")
        for _ in range(2):
            store = sx.convert({"b": second()}, place, append=True)
            assert (store.generation, store.n_obs) == (2, 48)

    def test_an_older_one_is_refused(self, tmp_path: Path) -> None:
        place = tmp_path / "store"
        sx.convert({"a": first()}, place, batch_key="donor")
        sx.convert({"b": second()}, place, append=True)
        before = tree(tmp_path)
        for again in (
            {"a": first()},
            {"other": first()},
            {"c": sample(3, GENES, 5, donor=["d"] * 3), "a": first()},
        ):
            with pytest.raises(InputError, match="is in the store already, as 'a'"):
                sx.convert(again, place, append=True)
        assert tree(tmp_path) == before

    def test_the_same_content_twice_in_one_run_is_said(self, tmp_path: Path) -> None:
        with pytest.warns(StreamxWarning, match="holds the same as 'a'"):
            store = sx.convert({"a": first(), "b": first()}, tmp_path / "store")
        assert store.n_obs == 62
        assert store.obs_names.is_unique


def test_values_of_other_width(tmp_path: Path) -> None:
    """Each part has the smallest dtype of its own; reading widens."""
    sx.convert({"a": first()}, tmp_path / "store", batch_key="donor")
    large = second()
    large.X.data[0] = 70_000
    store = sx.convert({"b": large}, tmp_path / "store", append=True)
    assert_holds(store, {"a": first(), "b": large})
    assert store.maximum == 70_000
    assert store.read(0, 48, dtype="stored").data.max() == 70_000
    assert store.summary()["value_dtype"] == "uint32"


def test_append_gives_the_cells_of_a_fresh_store(tmp_path: Path) -> None:
    """Other order of batches and rows, the same cells, values, names and obs."""
    made = {
        "a": first(),
        "b": second(),
        "c": with_names(sample(9, GENES, 7, donor=["d1"] * 9, age=range(9)), "c"),
    }
    fresh = sx.convert(made, tmp_path / "fresh", batch_key="donor").to_anndata()
    sx.convert({"a": made["a"]}, tmp_path / "store", batch_key="donor")
    for key in "bc":
        store = sx.convert({key: made[key]}, tmp_path / "store", append=True)
    grown = store.to_anndata()[fresh.obs_names]
    np.testing.assert_array_equal(grown.X.toarray(), fresh.X.toarray())
    for name in fresh.obs.columns:
        assert list(grown.obs[name]) == list(fresh.obs[name])


def test_a_view_takes_no_files(tmp_path: Path) -> None:
    from scipy import sparse

    from streamx.store.pack import Content, write_part
    from streamx.store.spill import Slab

    content = Content(
        kind="view",
        obs=pd.DataFrame({"batch": pd.Categorical(["a"] * 3)}, index=list("xyz")),
        var=pd.DataFrame(index=["g"]),
        batch_key="batch",
        fingerprint={},
        view={},
    )
    x_ng = sparse.csr_matrix(np.ones((3, 1), dtype=np.float32))
    write_part(tmp_path / "view", [Slab("a", np.arange(3), lambda: (x_ng, {}))], content)
    with pytest.raises(UsageError, match="is a view"):
        sx.convert({"b": second()}, tmp_path / "view", append=True)
    with pytest.raises(UsageError, match="is a view"):
        sx.annotate(tmp_path / "view", pd.DataFrame({"l": [1]}, index=["x"]))


def test_text_with_too_many_values_for_categories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing text stays missing, also where a later file makes categories too many."""
    monkeypatch.setattr("streamx.store.cells.MAX_CATEGORIES", 8)
    one = first(
        donor=["d"] * 31, few=["x", "y", None] * 10 + ["x"], many=[None, *(f"t{i}" for i in range(30))]
    )
    two = second(donor=["d"] * 17, few=[f"z{i}" for i in range(16)] + [None])
    store = sx.convert({"a": one}, tmp_path / "store", batch_key="donor")
    assert [store.manifest.obs_schema[name]["dtype"] for name in ("few", "many")] == ["category", "string"]
    store = sx.convert({"b": two}, tmp_path / "store", append=True)
    assert [store.manifest.obs_schema[name]["dtype"] for name in ("few", "many")] == ["string", "string"]
    assert_holds(store, {"a": one, "b": two})
    assert store.obs_column("many").iloc[31:].isna().all()
    assert ad.read_zarr(tmp_path / "store/shards/000000.zarr").obs["many"].isna().sum() == 1
    assert store.to_anndata().obs["few"].isna().sum() == 11
