"""The gene axis of several files: join, duplicates, versions, order, what was measured; odd names."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from store_samples import assert_holds, sample, with_names

import streamx as sx
from streamx.errors import GeneError, InputError, UsageError
from streamx.store.genes import (
    column_map,
    common_var,
    join_genes,
    map_columns,
    measured_mask,
    pack_mask,
    resolve_names,
    unpack_mask,
)

genes_ = st.lists(st.sampled_from(["g1", "g2", "g3", "g1.1", "g1-1", "ENSG00000000001.2", ""]), max_size=7)


class TestNames:
    @settings(max_examples=100, deadline=None)
    @given(genes_, st.sampled_from(["first", "sum", "unique"]), st.booleans())
    def test_rules(self, names: list[str], rule: str, strip: bool) -> None:
        resolved = resolve_names(names, rule=rule, strip_versions=strip)
        assert len(resolved) == len(names)
        kept = [name for name in resolved if name is not None]
        if rule != "sum":
            assert len(set(kept)) == len(kept)
        if rule == "unique":
            assert len(kept) == len(names)
            once = [name for name in names if names.count(name) == 1]
            assert strip or set(once) <= set(kept)
        if len(set(names)) == len(names) and not strip:
            assert resolved == names

    def test_twice_is_an_error(self) -> None:
        with pytest.raises(GeneError, match="2 gene names occur more than once: a, b") as caught:
            resolve_names(["a", "b", "a", "b", "c"], where="file.h5ad")
        assert "--duplicate-genes" in str(caught.value)
        assert "file.h5ad" in str(caught.value)

    def test_versions(self) -> None:
        names = ["ENSG00000141510.16", "ENSMUSG00000000001.4", "AC012345.1", "ENSG00000141510"]
        assert resolve_names(names[:3], strip_versions=True) == [
            "ENSG00000141510",
            "ENSMUSG00000000001",
            "AC012345.1",
        ]
        with pytest.raises(GeneError, match="ENSG00000141510"):  # twice only when stripped
            resolve_names(names, strip_versions=True)


class TestJoin:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.lists(st.sampled_from("abcdef"), unique=True), min_size=1, max_size=4))
    def test_is_that_of_sets_in_order_of_appearance(self, axes: list[list[str]]) -> None:
        union = join_genes(axes, "outer")
        assert set(union) == set().union(*axes)
        assert union == list(dict.fromkeys(name for axis in axes for name in axis))
        shared = set(axes[0]).intersection(*axes)
        if not shared:
            with pytest.raises(GeneError, match="share no gene"):
                join_genes(axes, "inner")
        else:
            assert join_genes(axes, "inner") == [name for name in axes[0] if name in shared]

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(-1, 5), min_size=1, max_size=8), st.integers(0, 3), st.integers(0, 2**32 - 1))
    def test_mapped_columns_are_a_matrix_product(self, columns: list[int], n: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        x_ng = rng.integers(0, 3, (n, len(columns))).astype(rng.choice(["u1", "i4", "f4"]))
        where = np.array(columns)
        product = np.zeros((len(columns), 6))
        product[np.flatnonzero(where >= 0), where[where >= 0]] = 1
        mapped = map_columns(sparse.csr_matrix(x_ng), where, 6)
        mapped.check_format()
        assert mapped.has_canonical_format
        np.testing.assert_array_equal(mapped.toarray(), x_ng @ product)
        np.testing.assert_array_equal(measured_mask(where, 6), product.any(axis=0))

    def test_sums_do_not_wrap(self) -> None:
        x_ng = sparse.csr_matrix(np.array([[200, 100]], dtype=np.uint8))
        assert map_columns(x_ng, np.array([0, 0]), 1).toarray().tolist() == [[300]]

    @given(st.lists(st.booleans(), max_size=40))
    def test_mask_as_text(self, mask: list[bool]) -> None:
        assert unpack_mask(pack_mask(np.array(mask, dtype=bool)), len(mask)).tolist() == mask

    def test_column_map(self) -> None:
        assert column_map(["b", None, "x", "a"], ["a", "b"]).tolist() == [1, -1, -1, 0]


def test_common_var_keeps_what_all_agree_on() -> None:
    frames = [
        pd.DataFrame({"id": ["e1", "e2"], "n": [1, 2], "own": [1, 1], "differs": [1, 2]}, index=["a", "b"]),
        pd.DataFrame({"id": ["e2", "e3"], "n": [2, 3], "differs": [9, 9], "na": [1, 1]}, index=["b", "c"]),
    ]
    var = common_var(frames, [["a", "b"], ["b", "c"]], ["a", "b", "c"])
    assert list(var.columns) == ["id", "n"]
    assert var["id"].tolist() == ["e1", "e2", "e3"]
    assert var["n"].tolist() == [1, 2, 3]
    assert common_var(frames[:1], [["a", "b"]], ["a", "b"]).columns.tolist() == list(frames[0].columns)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
class TestConvert:
    def files(self) -> dict[str, ad.AnnData]:
        return {
            "a": with_names(sample(23, ["g1", "g2", "g3", "g4"], 0, donor=["p"] * 11 + ["q"] * 12), "a"),
            "b": with_names(sample(19, ["g4", "g9", "g2"], 1, donor=["q"] * 19), "b"),
        }

    def test_inner(self, tmp_path: Path) -> None:
        store = sx.convert(self.files(), tmp_path / "store")
        assert list(store.var_names) == ["g2", "g4"]
        assert_holds(store, self.files())
        assert store.measured_bg.all()

    def test_outer(self, tmp_path: Path) -> None:
        store = sx.convert(self.files(), tmp_path / "store", join="outer", batch_key="donor")
        assert list(store.var_names) == ["g1", "g2", "g3", "g4", "g9"]
        assert_holds(store, self.files())
        assert store.batches == ["p", "q"]
        # p is in the first file only; q in both: measured where both measured
        assert store.measured_bg.tolist() == [
            [True, True, True, True, False],
            [False, True, False, True, False],
        ]
        table = store.sources.set_index("key")
        assert table.loc["b", "n_genes"] == 3
        assert table.loc["b", "overlap"] == pytest.approx(0.6)
        assert table.loc["b", "n_dropped"] == 0

    def test_no_gene_in_common(self, tmp_path: Path) -> None:
        made = self.files()
        made["b"].var_names = ["x", "y", "z"]
        with pytest.raises(GeneError, match="share no gene"):
            sx.convert(made, tmp_path / "store")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("rule", ["first", "sum", "unique"])
    def test_duplicate_genes(self, tmp_path: Path, rule: str) -> None:
        adata = sample(17, ["g1", "g2", "g1", "g3", "g1"], 0, density=0.8)
        dense = adata.X.toarray()
        store = sx.convert(adata, tmp_path / "store", batch_key="kind", duplicate_genes=rule)
        expected = {
            "first": (["g1", "g2", "g3"], dense[:, [0, 1, 3]]),
            "sum": (
                ["g1", "g2", "g3"],
                np.stack([dense[:, [0, 2, 4]].sum(1), dense[:, 1], dense[:, 3]], axis=1),
            ),
            "unique": (["g1", "g2", "g1-1", "g3", "g1-2"], dense),
        }[rule]
        assert list(store.var_names) == expected[0]
        order = np.argsort(store.obs_column("_streamx_file_row").to_numpy())
        np.testing.assert_array_equal(store.read(0, 17).toarray()[order], expected[1])

    def test_duplicate_genes_are_refused_by_default(self, tmp_path: Path) -> None:
        with pytest.raises(GeneError, match="g1"):
            sx.convert(sample(17, ["g1", "g2", "g1"], 0), tmp_path / "store", batch_key="kind")

    def test_versions_differ(self, tmp_path: Path) -> None:
        names = [f"ENSG{i:011d}" for i in range(8)]
        made = {
            "a": with_names(sample(5, [f"{name}.{i}" for i, name in enumerate(names)], 0), "a"),
            "b": with_names(sample(6, names[::-1], 1), "b"),
        }
        with pytest.raises(GeneError, match="--strip-versions"):
            sx.convert(made, tmp_path / "store")
        store = sx.convert(made, tmp_path / "store", strip_versions=True)
        assert list(store.var_names) == names
        made["a"].var_names = names
        assert_holds(store, made)

    def test_a_protein_matrix_of_integers_and_floats(self, tmp_path: Path) -> None:
        made = self.files()
        for key, dtype in (("a", np.int64), ("b", np.float32)):
            made[key].obsm["protein_expression"] = np.full((made[key].n_obs, 2), 7, dtype=dtype)
        store = sx.convert(made, tmp_path / "store")
        assert (store.read_obsm("protein_expression") == 7).all()


class TestOddNames:
    NAMES = (
        "../x",
        "a/b",
        "/etc",
        "..",
        ".",
        "",
        "ß µ/漢字",
        "c\\d",
        "zarr.json",
        "c",
        "__a__",
        "x" * 300,
        "_index",
        "tab\t",
        "nul\0",
    )

    def test_obs_columns(self, tmp_path: Path) -> None:
        adata = sample(5, 7, 0)
        for i, name in enumerate(self.NAMES):
            adata.obs[name] = [f"{i}-{k}" for k in range(5)]
        store = sx.convert(adata, tmp_path / "in" / "store", batch_key="kind")
        assert len(store.obs_columns) == len(self.NAMES) + 4
        for i in range(len(self.NAMES)):
            found = [name for name in store.obs_columns if f"{i}-0" in set(store.obs[name])]
            assert len(found) == 1
            assert sorted(store.obs[found[0]]) == [f"{i}-{k}" for k in range(5)]
        assert os.listdir(tmp_path) == ["in"]
        assert os.listdir(tmp_path / "in") == ["store"]
        plain = ad.read_zarr(tmp_path / "in" / "store" / "shards" / "000000.zarr")
        assert list(plain.obs.columns) == store.obs_columns
        assert sx.verify(tmp_path / "in" / "store")["ok"]

    def test_columns_that_would_be_one(self, tmp_path: Path) -> None:
        adata = sample(3, 7, 0, **{"a/b": [1, 2, 3], "a|b": [1, 2, 3]})
        with pytest.raises(UsageError, match=r"several obs columns are named \['a\|b'\]"):
            sx.convert(adata, tmp_path / "store", batch_key="a|b")

    def test_var_columns(self, tmp_path: Path) -> None:
        adata = sample(3, 7, 0)
        for i, name in enumerate(self.NAMES):
            adata.var[name] = i
        store = sx.convert(adata, tmp_path / "in" / "store", batch_key="kind")
        assert sorted(store.var.iloc[0]) == list(range(len(self.NAMES)))
        assert os.listdir(tmp_path / "in") == ["store"]
        assert ad.read_zarr(tmp_path / "in" / "store" / "shards" / "000000.zarr").var.shape == (
            7,
            len(self.NAMES),
        )

    def test_file_keys_batches_cells_genes(self, tmp_path: Path) -> None:
        odd = [name for name in self.NAMES if name]
        made = {key: with_names(sample(2, odd, i), "../") for i, key in enumerate(odd)}
        store = sx.convert(made, tmp_path / "in" / "store")
        assert set(store.batches) == set(odd)
        assert list(store.var_names) == odd
        assert_holds(store, made)
        assert os.listdir(tmp_path / "in") == ["store"]
        assert sx.verify(tmp_path / "in" / "store")["ok"]

    def test_streamx_columns_of_an_earlier_store_are_dropped(self, tmp_path: Path) -> None:
        store = sx.convert(sample(9, 7, 0), tmp_path / "a", batch_key="kind")
        again = sx.convert(store.to_anndata(), tmp_path / "b", batch_key="kind")
        assert again.obs_columns == store.obs_columns
        np.testing.assert_array_equal(np.sort(again.obs_column("_streamx_file_row")), np.arange(9))

    def test_a_shard_is_an_input_itself(self, tmp_path: Path) -> None:
        store = sx.convert(sample(9, 7, 0), tmp_path / "a", batch_key="kind")
        again = sx.convert(tmp_path / "a/shards/000000.zarr", tmp_path / "b", batch_key="kind")
        assert sorted(again.obs_names) == sorted(store.obs_names)
        with pytest.raises((UsageError, InputError)):
            sx.convert(tmp_path / "a", tmp_path / "c")
