"""What a job is made of, without opening anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamx.errors import UsageError
from streamx.jobs.plan import decisive, make_plan, parse_part, part_of, steps_of
from streamx.query import Request
from streamx.store.location import open_location


@given(st.integers(0, 40), st.integers(1, 9))
def test_parts_share_the_queries(n: int, parts: int) -> None:
    found = [part_of(range(n), number, parts) for number in range(1, parts + 1)]
    assert sorted(query for part in found for query in part) == list(range(n))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_no_such_part(text: str) -> None:
    with pytest.raises(UsageError, match="task"):
        parse_part(text)
    assert parse_part("3/16") == (3, 16)


def test_a_setting_goes_to_every_step_that_has_it() -> None:
    steps = steps_of({"label_key": "type", "seed": 7, "min_features": 3, "truth_key": "known"})
    assert steps.transfer is not None
    assert steps.metrics is not None
    assert (steps.transfer["seed"], steps.metrics["seed"]) == (7, 7)
    assert steps.metrics["truth_key"] == "known"
    assert steps.project == {"min_features": 3, "memory": "4GB", "threads": 1}
    assert steps.surgery is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nonsense": 1}, "unknown setting"),
        ({"threshold": 0.5}, "transfer, which is left out"),
        ({"metrics": False, "resolution": "1"}, "metrics, which is left out"),
        ({"max_epochs": 3}, "surgery, which is left out"),
        ({"surgery": "sometimes"}, "sometimes"),
        ({"label_key": "type", "n_neighbors": 3, "method": "loud"}, "loud"),
        ({"workers": 0}, "workers"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        steps_of(settings)


def plan(folder: Path, **settings: Any) -> dict[str, Any]:
    asked = [Request("a", (folder / "a.h5ad",)), Request("b", ("s3://cells/b.h5ad",))]
    places = open_location(folder / "model"), open_location(folder / "out")
    return make_plan(places[0], "id", asked, places[1], steps_of(settings))


def test_the_plan_holds_what_decides_the_result(tmp_path: Path) -> None:
    found = plan(tmp_path, workers=8, memory="1GB", threads=3, device="cpu")
    assert found == plan(tmp_path)
    assert found != plan(tmp_path, min_features=1)
    assert found["reference"] == {"path": "../model", "id": "id"}
    assert found["queries"] == [
        {"name": "a", "source": [str(tmp_path / "a.h5ad")]},
        {"name": "b", "source": ["s3://cells/b.h5ad"]},
    ]
    extended = decisive(steps_of({"surgery": "per-query", "max_epochs": 2}))["surgery"]
    assert (extended["mode"], extended["max_epochs"], extended["freeze_expression"]) == ("per-query", 2, True)


def test_cells_in_memory_are_refused(tmp_path: Path) -> None:
    places = open_location(tmp_path / "model"), open_location(tmp_path / "out")
    with pytest.raises(UsageError, match="a query is a dict"):
        make_plan(places[0], "id", [Request("a", ({},))], places[1], steps_of({}))
