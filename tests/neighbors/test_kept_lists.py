"""An index beside a reference: found again, appended to, made again where it is damaged."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamx.neighbors import kept, kept_index, save_index
from streamx.neighbors.kept import checksums

IVF = {"method": "ivf", "seed": 3, "threads": 1}


def points(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(8, 5)) * 4)[rng.integers(8, size=n)] + rng.normal(size=(n, 5))


def folders(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


def test_lists_of_the_first_cells_get_the_others_appended(tmp_path: Path) -> None:
    x_nk = points(3_000).astype(np.float32)
    kept_index(tmp_path, x_nk[:2_000], 10, **IVF)
    [before] = folders(tmp_path)
    longer = kept_index(tmp_path, x_nk, 10, **IVF)
    [after] = folders(tmp_path)
    assert (before != after, longer.n) == (True, 3_000)
    assert len(longer.segments) == 2
    again = kept_index(tmp_path, x_nk, 10, **IVF)
    longer.effort = again.effort = longer.efforts[-1]  # every list is looked through
    truth = np.linalg.norm(x_nk[:50, None].astype(float) - x_nk[None], axis=2).argsort(axis=1, kind="stable")
    for index in (longer, again):
        np.testing.assert_array_equal(index.search(x_nk[:50], 7)[0], truth[:, :7])


def test_other_first_cells_are_another_reference(tmp_path: Path) -> None:
    x_nk = points(3_000).astype(np.float32)
    kept_index(tmp_path, x_nk[:2_000], 10, **IVF)
    kept_index(tmp_path, x_nk[500:], 10, **IVF)
    assert len(folders(tmp_path)) == 2


def test_a_damaged_one_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x_nk = points(2_500).astype(np.float32)
    kept_index(tmp_path, x_nk[:2_000], 10, **IVF)
    [folder] = tmp_path.iterdir()
    array = next(folder.glob("*.npy"))
    array.write_bytes(array.read_bytes()[:-4])
    assert kept_index(tmp_path, x_nk, 10, **IVF).n == 2_500
    assert "made again" in caplog.text


@pytest.mark.parametrize("n", [1, 200, 300_000])
def test_checksums_of_beginnings(n: int) -> None:
    import zlib

    x_nk = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    cuts = {1, n, max(1, n // 2), min(n, 131_072), n + 1}
    assert checksums(x_nk, cuts) == {cut: zlib.crc32(x_nk[:cut].tobytes()) for cut in cuts if cut <= n}


@pytest.mark.parametrize("n_before", [0, 2_000])
def test_several_miss_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_before: int) -> None:
    """As workers of a mapping job do: one makes or lengthens it, the others find what it made."""
    x_nk = points(3_000).astype(np.float32)
    if n_before:
        kept_index(tmp_path, x_nk[:n_before], 10, **IVF)
    saved = list[Path]()

    def saves_slowly(index: Any, folder: Path) -> None:
        saved.append(folder)
        time.sleep(0.2)  # without a lock, the others make theirs meanwhile
        save_index(index, folder)

    monkeypatch.setattr(kept, "save_index", saves_slowly)

    def search() -> Any:
        return kept_index(tmp_path, x_nk, 10, **IVF).search(x_nk[:50], 7)

    with ThreadPoolExecutor(4) as pool:
        found = [task.result() for task in [pool.submit(search) for _ in range(4)]]
    assert [path.name for path in saved] == folders(tmp_path)
    for indices, distances in found[1:]:
        np.testing.assert_array_equal(indices, found[0][0])
        np.testing.assert_array_equal(distances, found[0][1])
