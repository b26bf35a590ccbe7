"""What every index keeps: recall, order, appending, saving, and what becomes of cells without a latent."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamx.errors import BadFileError, BadValuesError, IntegrityError
from streamx.neighbors import build_index, nearest, open_index, open_neighbors, save_index, stored
from streamx.neighbors.ivf import MOST_SEGMENTS, build_lists

SLOW = pytest.param("nndescent", marks=pytest.mark.slow)  # its compiler takes a minute
every_index = pytest.mark.parametrize("method", ["exact", "ivf", SLOW])


def clustered(seed, n, d=8, n_clusters=12):
    """Cells of a few types, as latents are; float32."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).normal(size=(n_clusters, d)) * 3
    return (centers[rng.integers(n_clusters, size=n)] + rng.normal(size=(n, d))).astype(np.float32)


def recall(found, truth):
    return np.mean(found.distances_nm <= truth.distances_nm[:, -1:])


def same(one, other):
    np.testing.assert_array_equal(one.indices_nm, other.indices_nm)
    np.testing.assert_array_equal(one.distances_nm, other.distances_nm)


@every_index
def test_recall_and_true_distances(method):
    reference, query = clustered(1, 5000), clustered(2, 1500)
    found = nearest(reference, query, 15, method=method)
    truth = nearest(reference, query, 15, method="exact")
    assert found.method == method
    assert recall(found, truth) >= 0.94
    assert found.recall == pytest.approx(recall(found, truth), abs=0.02)
    apart = reference[found.indices_nm].astype(float) - query[:, None].astype(float)
    np.testing.assert_allclose(found.distances_nm, np.sqrt((apart**2).sum(axis=2)), rtol=1e-14)
    assert (np.diff(found.distances_nm, axis=1) >= 0).all()


@every_index
def test_a_higher_target_is_reached(method):
    reference, query = clustered(1, 5000), clustered(2, 500)
    found = nearest(reference, query, 50, method=method, target_recall=0.999)
    assert found.recall >= 0.999
    assert recall(found, nearest(reference, query, 50, method="exact")) >= 0.999


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(64, 2000),
    d=st.integers(1, 12),
    k=st.integers(1, 70),
    grid=st.booleans(),
    offset=st.sampled_from([0.0, 1e3]),
    kind=st.sampled_from([np.float32, np.float64]),
)
def test_all_lists_together_are_exact(seed, n, d, k, grid, offset, kind):
    """Also of duplicates; which of many at one distance are given may differ."""
    reference = (clustered(seed, n, d) + offset).astype(kind)
    query = (clustered(seed + 1, 20, d) + offset).astype(kind)
    if grid:
        reference = np.round(reference) + np.arange(n)[:, None].astype(kind) * 0.25
    index = build_lists(reference)
    index.effort = index.centres.n_lists  # 0 would compare all, without lists
    truth = nearest(reference, query, k, method="exact")
    indices, distances = index.search(query, k)
    np.testing.assert_array_equal(distances, truth.distances_nm)
    if not grid:
        np.testing.assert_array_equal(indices, truth.indices_nm)


def test_threads_blocks_and_memory_change_nothing(monkeypatch):
    reference, query = clustered(1, 12_000), clustered(2, 3000)
    once = nearest(reference, query, 15, method="ivf", threads=1)
    same(nearest(reference, query, 15, method="ivf", threads=3), once)
    small = build_lists(reference, memory="300kB")  # laid down on disk, in several parts
    assert isinstance(small.segments[0].flat, np.memmap)
    same(nearest(None, query, 15, index=small), once)
    monkeypatch.setattr("streamx.neighbors.ivf.TASK", 7)
    monkeypatch.setattr("streamx.neighbors.blocks.ROWS", 500)
    monkeypatch.setattr("streamx.neighbors.blocks.blocks.__defaults__", (500,))
    same(nearest(reference, query, 15, method="ivf", threads=2), once)


@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_latents_on_disk_and_whatever_slices(method, tmp_path):
    class Slices:
        """As an array of zarr: a length, a shape and slices."""

        def __init__(self, values):
            self.values, self.shape = values, values.shape

        def __len__(self):
            return len(self.values)

        def __getitem__(self, rows):
            assert isinstance(rows, slice)
            return self.values[rows]

    reference, query = clustered(1, 3000), clustered(2, 700)
    query[5] = np.nan
    np.save(tmp_path / "reference.npy", reference)
    mapped = np.load(tmp_path / "reference.npy", mmap_mode="r")
    once = nearest(reference, query, 15, method=method)
    same(nearest(mapped, query, 15, method=method), once)
    same(nearest(Slices(reference) if method == "ivf" else mapped, Slices(query), 15, method=method), once)


@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_results_in_a_folder(method, tmp_path):
    points = clustered(1, 3000)
    once = nearest(points, n_neighbors=15, method=method)
    found = nearest(points, n_neighbors=15, method=method, out=tmp_path / "graph")
    assert isinstance(found.indices_nm, np.memmap)
    same(found, once)
    again = open_neighbors(tmp_path / "graph")
    same(again, once)
    assert (again.method, again.recall, again.recall_rows) == (once.method, once.recall, once.recall_rows)
    (tmp_path / "graph" / "neighbors.json").unlink()
    with pytest.raises(BadFileError, match="no finished graph"):
        open_neighbors(tmp_path / "graph")
    one = nearest(points[:1], n_neighbors=15, out=tmp_path / "one")
    assert one.indices_nm.shape == open_neighbors(tmp_path / "one").indices_nm.shape == (1, 0)


@every_index
def test_queries_without_a_latent_and_own_cells(method):
    points = clustered(1, 2000)
    query = points[:300].copy()
    query[[0, 9]] = np.nan
    query[17, 3] = np.inf
    found = nearest(points, query, 15, method=method, own_m=np.arange(300))
    assert (found.indices_nm[[0, 9, 17]] == -1).all()
    assert np.isnan(found.distances_nm[[0, 9, 17]]).all()
    rest = np.setdiff1d(np.arange(300), [0, 9, 17])
    assert (found.indices_nm[rest] >= 0).all()
    assert (found.indices_nm[rest] != rest[:, None]).all()
    alone = nearest(points, query[rest], 15, method=method, own_m=rest)
    assert recall(found.take(rest), alone) > 0.9


@every_index
def test_fewer_cells_than_neighbours(method):
    points = clustered(1, 70, n_clusters=70)
    found = nearest(points, clustered(2, 9), 100, method=method)
    np.testing.assert_array_equal(np.sort(found.indices_nm, axis=1), np.tile(np.arange(70), (9, 1)))
    assert nearest(points, n_neighbors=100, method=method).indices_nm.shape == (70, 69)
    assert nearest(points, points[:0], 5, method=method).indices_nm.shape == (0, 5)


def test_duplicates_of_one_cell():
    points = np.repeat(clustered(1, 3), 200, axis=0)
    found = nearest(points, n_neighbors=7, method="ivf")
    assert (found.distances_nm == 0).all()
    assert (found.indices_nm // 200 == np.arange(600)[:, None] // 200).all()
    assert (found.indices_nm != np.arange(600)[:, None]).all()


@every_index
def test_bad_reference_cells_and_queries(method):
    points = clustered(1, 200)
    points[70, 2] = np.nan
    with pytest.raises(BadValuesError, match="row 70"):
        build_index(points, 10, method=method)
    with pytest.raises(BadValuesError, match="NaN"):
        build_index(np.full((100, 3), np.nan), 10, method=method)
    with pytest.raises(BadValuesError, match="dimensions"):
        nearest(clustered(1, 200), np.zeros((5, 2)), method=method)


@every_index
def test_append_is_building_with_all(method):
    points, query = clustered(1, 4000), clustered(2, 500)
    index = build_index(points[:2500], 10, method=method)
    for low in range(2500, 4000, 500):
        index = index.append(points[low : low + 500])
    assert index.append(points[:0]).n == index.n == 4000
    found = nearest(points, query, 15, index=index)
    truth = nearest(points, query, 15, method="exact")
    assert recall(found, truth) >= 0.94
    if method == "exact":
        same(found, truth)
    numbers = np.concatenate([numbers for _, numbers in index.pieces()])
    rows = np.concatenate([rows for rows, _ in index.pieces()])
    np.testing.assert_array_equal(rows[np.argsort(numbers)], points)


def test_lists_are_trained_again_once_they_are_worn():
    even, elsewhere = clustered(1, 3000), clustered(3, 2000, n_clusters=1)
    index = build_lists(even)
    drifted = index.append(elsewhere)
    assert (index.epoch, drifted.epoch, drifted.n) == (0, 1, 5000)
    assert drifted.unevenness < 1.5
    assert index.append(clustered(4, 1500)).epoch == 0
    assert index.append(clustered(4, 3001)).epoch == 1  # twice as many cells
    for number in range(MOST_SEGMENTS):
        assert (index.epoch, len(index.segments)) == (0, number + 1)
        index = index.append(clustered(10 + number, 10))
    assert (index.epoch, len(index.segments), index.n) == (1, 1, 3160)


@every_index
def test_saved_is_reopened(method, tmp_path):
    points, query = clustered(1, 3000), clustered(2, 300)
    index = build_index(points, 10, method=method)
    once = nearest(points, query, 15, index=index)
    save_index(index, tmp_path / "index")
    again = open_index(tmp_path / "index")
    assert (again.method, again.n, again.d, again.effort) == (method, 3000, 8, index.effort)
    same(nearest(points, query, 15, index=again), once)
    longer = again.append(clustered(3, 100))
    save_index(longer, tmp_path / "index")
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").glob("*.npy")}
    once = nearest(None, query, 15, index=longer)
    again = open_index(tmp_path / "index")
    same(nearest(None, query, 15, index=again), once)
    save_index(again.append(clustered(4, 50)), tmp_path / "index")
    if method == "ivf":  # what was there is not written again
        for name, written in files.items():
            assert (tmp_path / "index" / name).stat().st_mtime_ns == written
    save_index(build_index(points[:100], 10, method=method), tmp_path / "index")  # another one
    same(
        nearest(None, query, 15, index=open_index(tmp_path / "index")),
        nearest(points[:100], query, 15, method=method),
    )


@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_damage_is_named(method, tmp_path):
    folder = tmp_path / "index"
    save_index(build_index(clustered(1, 500), 10, method=method), folder)
    for path in sorted(folder.glob("*.npy")):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=path.name):
            open_index(folder)
        path.unlink()
        with pytest.raises(IntegrityError, match="missing"):
            open_index(folder)
        path.write_bytes(good)
    card = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(card | {"method": "other"}))
    with pytest.raises(BadFileError, match="another kind"):
        open_index(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(BadFileError, match="fix:"):
        open_index(folder)
    with pytest.raises(BadFileError, match="fix:"):
        open_index(tmp_path / "nothing")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("worn", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_death_at_every_write_of_an_append(tmp_path, monkeypatch, worn, half):
    """The folder holds the index of before or of after, whole; the same append then ends as if unharmed."""
    folder, query = tmp_path / "index", clustered(2, 50)
    index = build_lists(clustered(1, 1000))
    longer = index.append(clustered(3, 1100 if worn else 200))
    assert longer.epoch == int(worn)
    before, after = index.search(query, 5), longer.search(query, 5)
    write, stop, lived = stored._write, 0, False
    while not lived:
        save_index(index, folder)
        left = stop

        def dying(path, content):
            nonlocal left
            if left == 0:
                if half:
                    path.write_bytes(b"half")
                raise Killed
            left -= 1
            return write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(stored, "_write", dying)
            try:
                save_index(longer, folder)
                lived = True
            except Killed:
                pass
        found = open_index(folder).search(query, 5)
        np.testing.assert_array_equal(found[0], (after if lived else before)[0])
        np.testing.assert_array_equal(found[1], (after if lived else before)[1])
        save_index(longer, folder)
        np.testing.assert_array_equal(open_index(folder).search(query, 5)[0], after[0])
        assert len(list(folder.iterdir())) == 2 + len(longer.arrays())  # the card, the lock
        stop += 1
    assert stop > 3
