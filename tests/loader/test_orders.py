"""Ranks, resuming, outputs, weighted draws, strata, splits: what a loader promises beside its minibatches."""

import gc
import os
import pickle
import threading
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from views import make_counts, write_view

from streamx.errors import UsageError
from streamx.loader.deliver import OUTPUTS
from streamx.loader.loader import Loader
from streamx.loader.pairs import pairs
from streamx.loader.plan import Runs, make_plan
from streamx.loader.rows import split
from streamx.store.collection import Collection

SIZES = [701, 53, 1, 400]
SMALL: dict[str, Any] = {"block_rows": 32, "blocks_per_fetch": 3, "seed": 3}


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return write_view(tmp_path_factory.mktemp("orders") / "view", SIZES, proteins=3)


def rows(loader: Any) -> list[list[int]]:
    return [mb.row_n.tolist() for mb in loader]


@pytest.mark.parametrize("order", ["shuffled", "by_batch", "stratified", "sequential"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_one_sequence(view: Collection, order: str, drop_last: bool) -> None:
    settings = SMALL | {"order": order, "drop_last": drop_last}
    alone = rows(Loader(view, 16, **settings))
    for world in (1, 2, 4):
        ranks = [rows(Loader(view, 16, rank=r, world=world, **settings)) for r in range(world)]
        assert [len(found) for found in ranks] == [
            len(Loader(view, 16, rank=r, world=world, **settings)) for r in range(world)
        ]
        steps = max(map(len, ranks))
        together = [ranks[r][i] for i in range(steps) for r in range(world) if i < len(ranks[r])]
        if drop_last:
            assert len({len(found) for found in ranks}) == 1
            assert together == alone[: len(alone) // world * world]
        else:
            assert together == alone


@pytest.mark.parametrize("order", ["shuffled", "by_batch", "stratified"])
def test_resumes_at_every_step_at_any_world_size(view: Collection, order: str) -> None:
    settings = SMALL | {"order": order}
    first, second = rows(Loader(view, 32, epoch=4, **settings)), rows(Loader(view, 32, epoch=5, **settings))
    loader = Loader(view, 32, epoch=4, **settings)
    states = [loader.state_dict()]
    states += [loader.state_dict() for _ in loader]
    assert len(states) == len(first) + 1
    for done, state in [*enumerate(states)][:: 1 if order == "shuffled" else 4]:
        state = pickle.loads(pickle.dumps(state))
        for world in (1, 3) if done % 5 == 0 else (1,):
            ranks = [Loader(view, 32, rank=r, world=world, **settings) for r in range(world)]
            for own in ranks:
                own.load_state_dict(state)
            found = [rows(own) for own in ranks]
            left = first[done:] or second
            assert [found[i % world][i // world] for i in range(len(left))] == left
    # from four ranks in step to one
    four = [Loader(view, 32, epoch=4, rank=r, world=4, **settings) for r in range(4)]
    for own in four:
        iterator = iter(own)
        next(iterator), next(iterator)
        assert own.state_dict()["minibatch"] == 8
    one = Loader(view, 32, **settings)
    one.load_state_dict(four[3].state_dict())
    assert rows(one) == first[8:]
    with pytest.raises(UsageError, match="another seed"):
        Loader(view, 32, **(settings | {"seed": 9})).load_state_dict(states[3])


def test_resuming_reads_nothing_that_was_given(view: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Collection.gather

    def counted(self: Collection, ranges: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(sum(b - a for a, b in ranges))
        return original(self, ranges, *args, **kwargs)

    monkeypatch.setattr(Collection, "gather", counted)
    loader = Loader(view, 32, **SMALL)
    left = rows(loader.at(0, len(loader) - 2))
    assert len(left) == 2
    assert sum(read) <= 2 * 96


def test_carry_over_at_a_million_cells() -> None:
    bounds = np.cumsum([0, 400_000, 1, 250_003, 349_996])
    runs = bounds, np.array([0, 1, 2, 0])

    def order(start: int, rank: int, world: int, fetch: int) -> np.ndarray:
        plan = make_plan(runs, minibatch_size=100, seed=1, start=start, rank=rank, world=world)
        found = plan.fetch(fetch)
        return np.concatenate([np.arange(a, b) for a, b in found.ranges])[found.order]

    whole = make_plan(runs, minibatch_size=100, seed=1)
    assert whole.n_minibatches == 10_000
    number = whole.fetch_of(7_777)
    first = whole.fetch(number).first
    inside = order(0, 0, 1, number)[(7_777 - first) * 100 :].reshape(-1, 100)
    for world in (2, 7):
        ranks = [order(7_777, r, world, number).reshape(-1, 100) for r in range(world)]
        for i, expected in enumerate(inside):
            assert np.array_equal(ranks[i % world][i // world], expected)


def test_outputs_say_the_same(view: Collection) -> None:
    found = {
        name: list(Loader(view, 50, output=name, **SMALL)) for name in ("dense", "scipy", "csr", "compact")
    }
    raw = list(Loader(view, 50, output="scipy", transform=False, **SMALL))
    for dense, scipy, csr, compact, stored in zip(*found.values(), raw, strict=True):
        assert np.array_equal(dense.x_ng, scipy.x_ng.toarray())
        assert scipy.x_ng.has_canonical_format
        assert (scipy.x_ng.dtype, scipy.x_ng.indices.dtype) == (np.float32, np.int32)
        assert np.array_equal(dense.x_ng, csr.x_ng.scipy().toarray())
        assert np.array_equal(dense.x_ng, csr.x_ng.dense())
        assert np.array_equal(stored.x_ng.toarray(), compact.x_ng.dense())
        assert (compact.x_ng.indices.dtype, compact.x_ng.data.dtype) == (np.uint16, view.value_dtype)
        assert csr.x_ng.shape == compact.x_ng.shape == dense.x_ng.shape
    with pytest.raises(UsageError, match="output 'sparse'"):
        Loader(view, output="sparse")


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_minibatch_that_is_kept_is_never_overwritten(view: Collection, output: str) -> None:
    settings = SMALL | {"output": output, "transform": False}
    x = make_counts(SIZES)[0].toarray()
    kept = [mb for epoch in range(3) for mb in Loader(view, 16, epoch=epoch, **settings)][::3]
    list(Loader(view, 16, **settings))
    for mb in kept:
        got = mb.x_ng if output == "dense" else mb.x_ng.toarray() if output == "scipy" else mb.x_ng.dense()
        assert np.array_equal(got, x[mb.row_n])


def test_weighted_draws(view: Collection) -> None:
    x = make_counts(SIZES)[0].toarray()
    loader = Loader(view, 32, weights="balanced", n_samples=8_000, transform=False, **SMALL)
    drawn = np.concatenate(rows(loader))
    assert len(drawn) == 8_000
    share = np.bincount(view.batch_codes[drawn], minlength=4) / 8_000
    assert np.abs(share - 0.25).max() < 0.02
    for mb in loader.at(1):
        assert np.array_equal(mb.x_ng, x[mb.row_n])
    assert rows(loader.at(2)) == rows(loader.at(2)) != rows(loader.at(3))
    weights = np.zeros(view.n_obs)
    weights[[5, 700, 900]] = [1, 2, 1]
    drawn = np.concatenate(rows(Loader(view, 64, weights=weights, n_samples=4_000, **SMALL)))
    share = np.bincount(drawn, minlength=view.n_obs)[[5, 700, 900]] / 4_000
    assert np.abs(share - [0.25, 0.5, 0.25]).max() < 0.03
    for wrong in (np.ones(3), -np.ones(view.n_obs), "rare"):
        with pytest.raises(UsageError):
            Loader(view, weights=wrong)
    with pytest.raises(UsageError, match="no row"):
        list(Loader(view, weights=np.zeros(view.n_obs)))


def test_strata_of_a_column(view: Collection) -> None:
    label = view.obs_column("type").astype("category").cat.codes.to_numpy()
    share = np.bincount(label) / len(label)
    for mb in list(Loader(view, 60, order="stratified", stratify="type", seed=1))[:-1]:
        assert np.abs(np.bincount(label[mb.row_n], minlength=len(share)) - 60 * share).max() <= 2


def test_split() -> None:
    codes = np.repeat([0, 1, 2], [600, 300, 101])
    parts = split(1001, {"train": 0.8, "validation": 0.1, "test": 0.1}, seed=4, code_n=codes)
    assert np.array_equal(sum(mask.astype(int) for mask in parts.values()), np.ones(1001))
    for mask, share in zip(parts.values(), (0.8, 0.1, 0.1), strict=True):
        assert np.abs(np.bincount(codes[mask]) - np.array([600, 300, 101]) * share).max() <= 1
    again, other = (split(1001, {"a": 0.5, "b": 0.5}, seed=s) for s in (0, 1))
    assert np.array_equal(again["a"], split(1001, {"a": 0.5, "b": 0.5}, seed=0)["a"])
    assert not np.array_equal(again["a"], other["a"])
    with pytest.raises(UsageError, match="add up"):
        split(10, {"a": 0.5, "b": 0.6})


@pytest.mark.parametrize("world", [1, 2])
def test_pairs_of_all_and_labelled_cells(view: Collection, world: int) -> None:
    mask = np.zeros(view.n_obs, bool)
    mask[100:330] = True
    for rank in range(world):
        ranks = SMALL | {"rank": rank, "world": world}
        every, labelled = Loader(view, 32, **ranks), Loader(view, 32, rows=mask, drop_last=True, **ranks)
        found = [list(pairs(every, labelled, epoch)) for epoch in range(3)]
        passes = [rows(labelled.at(turn)) for turn in range(20)]
        flat = [mb.row_n.tolist() for epoch in found for _, mb in epoch]
        assert flat == [batch for turn in passes for batch in turn][: len(flat)]
        assert [[mb.row_n.tolist() for mb, _ in epoch] for epoch in found] == [
            rows(every.at(e)) for e in range(3)
        ]
        left = list(pairs(every, labelled, 2, done=5))
        assert [b.row_n.tolist() for _, b in left] == [b.row_n.tolist() for _, b in found[2]][5:]
    with pytest.raises(UsageError, match="no cell has a label"):
        next(pairs(every, Loader(view, rows=np.zeros(view.n_obs, bool)), 0))


class _Dataset(torch.utils.data.IterableDataset):
    """As a user would write it: each of torch's workers takes its share."""

    def __init__(self, view: Collection) -> None:
        self.view = view

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        rank, world = (info.id, info.num_workers) if info else (0, 1)
        for mb in Loader(self.view, 32, rank=rank, world=world, device="cpu", **SMALL):
            yield mb.x_ng, mb.row_n


@pytest.mark.parametrize("context", [None, "spawn", "fork"])
def test_inside_torch_dataloader(view: Collection, context: str | None) -> None:
    busy = iter(Loader(view, 32, **SMALL))  # a fork must not hang on what these threads hold
    next(busy)
    settings = {"num_workers": 2, "multiprocessing_context": context} if context else {}
    loader = torch.utils.data.DataLoader(
        _Dataset(view), batch_size=None, timeout=60 if context else 0, **settings
    )
    found = {tuple(row_n.tolist()): x_ng for x_ng, row_n in loader}
    expected = list(Loader(view, 32, **SMALL))
    assert len(found) == len(expected)
    for mb in expected:
        assert np.array_equal(found[tuple(mb.row_n.tolist())].numpy(), mb.x_ng)


@pytest.mark.parametrize("times", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_many_loaders_leave_nothing(view: Collection, times: int) -> None:
    def held() -> tuple[int, int, int]:
        gc.collect()
        n_bytes = psutil.Process().memory_info().rss
        return threading.active_count(), len(os.listdir("/proc/self/fd")), n_bytes

    for number in range(times):
        loader = Loader(Collection(view.path), 32, **SMALL)
        iterator = iter(loader)
        for _ in range(number % 3):
            next(iterator)
        if number == 20:
            before = held()
    del iterator, loader
    after = held()
    assert after[:2] <= before[:2]
    assert after[2] - before[2] < 30_000_000


@pytest.mark.parametrize("order", ["shuffled", "by_batch", "stratified"])
def test_a_billion_cells(order: str) -> None:
    """Planned, split over 64 ranks, entered in the middle: a plan is no list of rows."""
    import resource
    import time

    rng = np.random.default_rng(0)
    sizes = rng.integers(1_000, 30_000_000, 70)
    sizes = (sizes * (1e9 / sizes.sum())).astype(np.int64)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    runs: Runs = bounds, rng.permutation(70)
    memory, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    plan = make_plan(runs, order=order, minibatch_size=256, seed=1)
    middle = plan.n_minibatches // 2
    seen: list[np.ndarray] = []
    for rank in (0, 63):
        own = make_plan(runs, order=order, minibatch_size=256, seed=1, start=middle, rank=rank, world=64)
        fetch = own.fetch(own.fetch_of(middle) + 1)
        seen.append(np.concatenate([np.arange(a, b) for a, b in fetch.ranges])[fetch.order])
    assert len(seen[0]) > 0
    assert not np.intersect1d(*seen).size
    assert time.process_time() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # kB
