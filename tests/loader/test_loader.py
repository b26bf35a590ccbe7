import gc
import re
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from views import make_counts, write_view

from streamx.errors import IntegrityError, ResourceError, UsageError
from streamx.loader.loader import Loader, Minibatch
from streamx.store.collection import Collection

SIZES = [701, 53, 1, 400]


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return write_view(tmp_path_factory.mktemp("loader") / "view", SIZES, proteins=3)


@pytest.fixture(scope="module")
def expected(view: Collection) -> np.ndarray:
    """What the transform makes of all rows."""
    x = make_counts(SIZES)[0].toarray()
    total = view.obs["_streamx_total"].to_numpy()
    assert view.scale_bg is not None
    return np.log1p(x * (1e4 / total)[:, None]) / view.scale_bg[view.batch_codes]


def alive() -> list[str]:
    gc.collect()
    return [t.name for t in threading.enumerate() if t.name.startswith("streamx-prefetch")]


def same(a: list[Minibatch], b: list[Minibatch]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(p.x_ng, q.x_ng) and np.array_equal(p.row_n, q.row_n) for p, q in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("order", ["shuffled", "by_batch", "stratified", "sequential"])
def test_minibatches_hold_what_they_say(view: Collection, expected: np.ndarray, order: str) -> None:
    found = list(Loader(view, 32, order=order))
    rows = np.concatenate([mb.row_n for mb in found])
    assert sorted(rows) == list(range(view.n_obs))
    proteins = view.read_obsm("protein_expression")
    for mb in found:
        np.testing.assert_allclose(mb.x_ng, expected[mb.row_n], rtol=1e-5, atol=1e-7)
        assert mb.x_ng.dtype == np.float32
        assert np.array_equal(mb.batch_n, view.batch_codes[mb.row_n])
        assert np.array_equal(mb.obsm["protein_expression"], proteins[mb.row_n])
        np.testing.assert_allclose(mb.total_n, view.obs["_streamx_total"].to_numpy()[mb.row_n])
        assert len(mb) == len(mb.row_n) <= 32
    assert len(Loader(view, 32, order=order)) == len(found)


def test_raw_counts(view: Collection) -> None:
    x = make_counts(SIZES)[0].toarray()
    for mb in Loader(view, 100, transform=False):
        assert np.array_equal(mb.x_ng, x[mb.row_n])


def test_tensors(view: Collection) -> None:
    numpy, tensors = list(Loader(view, 64)), list(Loader(view, 64, device="cpu"))
    for a, b in zip(numpy, tensors, strict=True):
        assert torch.equal(torch.from_numpy(a.x_ng), b.x_ng)
        assert b.batch_n.dtype == torch.int64
        assert b.obsm["protein_expression"].dtype == torch.float32


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_prefetch_and_threads_change_nothing(view: Collection, prefetch: int, threads: int) -> None:
    small = {"seed": 3, "epoch": 2, "block_rows": 32, "blocks_per_fetch": 2}
    base = list(Loader(view, 32, **small))
    assert same(base, list(Loader(view, 32, prefetch=prefetch, threads=threads, **small)))


def test_epochs(view: Collection) -> None:
    loader = Loader(view, 64, seed=1)
    first, second = list(loader), list(loader)
    assert not same(first, second)
    assert same(first, list(loader.at(0)))
    assert same(second, list(Loader(view, 64, seed=1, epoch=1)))
    assert not same(first, list(Loader(view, 64, seed=2)))


def test_chosen_rows(view: Collection, expected: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random(view.n_obs) < 0.3
    mask[100:400] = False
    for order in ("shuffled", "sequential", "by_batch"):
        for rows, wanted in ((mask, np.flatnonzero(mask)), ((50, 900), np.arange(50, 900))):
            found = list(Loader(view, 16, order=order, rows=rows))
            got = np.concatenate([mb.row_n for mb in found])
            assert sorted(got) == wanted.tolist()
            for mb in found:
                np.testing.assert_allclose(mb.x_ng, expected[mb.row_n], rtol=1e-5, atol=1e-7)
    assert list(Loader(view, rows=np.zeros(view.n_obs, bool))) == []
    for wrong in (np.ones(3, bool), np.arange(5), (5, 10**6)):
        with pytest.raises(UsageError, match="neither a pair"):
            Loader(view, rows=wrong)


def test_no_thread_is_left(view: Collection) -> None:
    loader = Loader(view, 16, block_rows=64, blocks_per_fetch=1)
    list(loader)
    assert alive() == []
    iterator = iter(loader)
    next(iterator)
    assert alive() != []
    del iterator
    assert alive() == []

    def interrupted() -> None:
        for _ in loader:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert alive() == []


def test_an_unreadable_block_is_an_error_not_a_hang(tmp_path: Path) -> None:
    view = write_view(tmp_path / "view", [300, 200])
    for path in (tmp_path / "view" / "shards").rglob("c/*"):
        if path.is_file():
            path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(IntegrityError):
        list(Loader(Collection(view.path), 16))
    assert alive() == []


def test_memory_is_refused_with_numbers(view: Collection) -> None:
    message = (
        r"the loader needs \d+\.\d MB \(1 fetches of .* MB\), the limit is 0.0 MB\n  fix: --memory \d+MB$"
    )
    with pytest.raises(ResourceError, match=message):
        Loader(view, memory=1000)
    small = {"block_rows": 64, "minibatch_size": 16}
    limit = Loader(view, **small).budget.nbytes // 2
    with pytest.raises(ResourceError) as caught:
        Loader(view, memory=limit, **small)
    found = re.search(r"or Loader\(blocks_per_fetch=(\d+)\)", str(caught.value))
    assert found is not None
    fewer = Loader(view, memory=limit, blocks_per_fetch=int(found[1]), **small)
    assert fewer.plan().nbytes == fewer.budget.nbytes <= limit


def test_memory_is_what_was_planned(tmp_path: Path) -> None:
    view = write_view(tmp_path / "view", [30_000, 20_011], n_genes=150)
    made = 0

    class Watched(Loader):
        def _read(self, *args: Any) -> Any:
            nonlocal made
            block = super()._read(*args)
            made += 1
            return block

    loader = Watched(view, 64, blocks_per_fetch=8)
    next(iter(loader))  # what is read once and kept is not the loader's
    loader = Watched(view, 64, blocks_per_fetch=8)
    made = 0
    tracemalloc.start()
    for number, _ in enumerate(loader):
        held = 0
        grows = True
        while number == 0 and (grows or made < loader.prefetch + 1):
            now = tracemalloc.get_traced_memory()[0]
            grows, held = abs(now - held) > 10_000, now
            time.sleep(0.3)  # as a slow model: all that may wait does
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loader.budget.fetches == 4
    assert 0.7 * loader.budget.nbytes < peak < 1.3 * loader.budget.nbytes, (loader.budget, peak)
