"""A job in a bucket, and its report beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mapped_job import write_job, write_reference

import streamx as sx
from streamx.report import run
from streamx.store.bucket import Bucket


def test_report_of_a_job_in_a_bucket(
    bucket: Callable[..., Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "lay_out_cells", lambda sketch, **_: sketch.latent_nk[:, :2])
    write_reference(tmp_path / "model")
    write_job(tmp_path / "model", tmp_path / "out", ["first"], failed=["broken"])
    there = bucket("job")
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        there.write(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    sx.report(f"{there}/out", f"{there}/page.html", progress=False)
    sx.report(tmp_path / "out", tmp_path / "page.html", progress=False)
    here = (tmp_path / "page.html").read_text()
    assert there.read("page.html").decode() == here.replace(str(tmp_path), str(there))
