"""Exit codes, one JSON object on stdout, no traceback without --debug, and being told to stop."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamx
from streamx import errors
from streamx.cli.main import main
from streamx.cli.show import as_json, columns, plain, table

VERIFY = ["verify", "store"]


@pytest.fixture
def verify_does(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], Any]], None]:
    """Let `streamx verify` call this function instead of the library's."""
    return lambda function: monkeypatch.setitem(vars(streamx), "verify", function)


def raising(error: BaseException) -> Callable[[str], Any]:
    def function(path: str) -> Any:
        raise error

    return function


CODES = [
    (errors.StreamxError("x"), 1),
    (ValueError("x"), 1),
    (errors.UsageError("x"), 2),
    (errors.BadValuesError("x"), 3),
    (errors.EmptyError("x"), 3),
    (errors.PartialError("x"), 4),
    (errors.StorageError("x"), 5),
    (errors.LockedError("x"), 5),
    (OSError(errno.ENOSPC, "No space left on device"), 7),
    (PermissionError(errno.EACCES, "Permission denied", "figures"), 5),
    (errors.IntegrityError("x"), 6),
    (errors.ResourceError("x"), 7),
    (MemoryError(), 7),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: getattr(type(value), "__name__", ""))
def test_exit_code(error: BaseException, code: int, verify_does: Any, capsys: Any) -> None:
    verify_does(raising(error))
    assert main(VERIFY) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "streamx verify: " in captured.err
    assert "Traceback" not in captured.err


def test_error_says_what_where_and_fix(verify_does: Any, capsys: Any) -> None:
    verify_does(raising(errors.GeneError("two genes A", where="b.h5ad", fix="use --duplicate-genes first")))
    main(VERIFY)
    expected = "streamx verify: b.h5ad: two genes A\n  fix: use --duplicate-genes first\n"
    assert capsys.readouterr().err == expected


def test_a_file_where_a_folder_is_to_be(verify_does: Any, capsys: Any) -> None:
    verify_does(raising(FileExistsError(errno.EEXIST, "File exists", "figures.txt")))
    assert main(VERIFY) == 5
    assert capsys.readouterr().err.endswith("figures.txt: File exists\n  fix: choose another place\n")


def test_traceback_with_debug(verify_does: Any, capsys: Any) -> None:
    verify_does(raising(ValueError("deep inside")))
    assert main([*VERIFY, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_json_is_one_object_and_nothing_else(verify_does: Any, capsys: Any) -> None:
    def chatty(path: str) -> dict[str, Any]:
        print("a library that talks")  # noqa: T201
        warnings.warn("watch out", errors.StreamxWarning, stacklevel=1)
        return {"ok": True, "objects": np.int64(3), "errors": [], "share": np.float32("nan")}

    verify_does(chatty)
    assert main([*VERIFY, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"ok": True, "objects": 3, "errors": [], "share": None}
    assert captured.out.count("\n") == 1
    assert "a library that talks" in captured.err
    assert "warning: watch out" in captured.err


def test_json_of_an_error(verify_does: Any, capsys: Any) -> None:
    verify_does(raising(errors.BatchError("no batch", where="a.h5ad", fix="--batch-key donor")))
    assert main(["--json", *VERIFY]) == 3
    record = json.loads(capsys.readouterr().out)
    assert record == {
        "error": "no batch",
        "kind": "BatchError",
        "where": "a.h5ad",
        "fix": "--batch-key donor",
        "exit_code": 3,
    }


def test_failed_verify_exits_6(verify_does: Any) -> None:
    verify_does(lambda path: {"ok": False, "objects": 2, "errors": [{"object": "x", "what": "absent"}]})
    assert main(VERIFY) == 6


def test_project_with_a_failed_query_exits_4(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [{"name": "a", "status": "done"}, {"name": "b", "status": "failed"}]
    monkeypatch.setitem(vars(streamx), "project", lambda *args, **settings: queries)
    assert main(["project", "model", "a.h5ad", "b.h5ad", "-o", "out"]) == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop(number: signal.Signals, code: int, tmp_path: Path) -> None:
    started, cleaned = tmp_path / "started", tmp_path / "cleaned"
    script = f"""
        import sys, time, pathlib, streamx
        from streamx.cli.main import main
        def verify(path):
            try:
                pathlib.Path({str(started)!r}).touch()
                time.sleep(60)
            finally:
                pathlib.Path({str(cleaned)!r}).touch()
        streamx.verify = verify
        sys.exit(main(["verify", "store"]))
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )
    while not started.exists():
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(number)
    try:
        _, err = child.communicate(timeout=10)
    finally:
        child.kill()
    assert child.returncode == code
    assert cleaned.exists()
    assert "Traceback" not in err


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"streamx {streamx.__version__}\n"


def test_plain_values() -> None:
    record = {"a": np.arange(2), "b": (Path("x"), None), 3: {"c": float("inf")}, "d": np.bool_(True)}
    assert json.loads(as_json(record)) == {"a": [0, 1], "b": ["x", None], "3": {"c": None}, "d": True}
    assert plain({"s": "ü"}) == {"s": "ü"}
    assert "ü" in as_json({"s": "ü"})


def test_text_for_people() -> None:
    assert (
        table([{"name": "a", "n": 1}, {"name": "bcd", "n": 12_000}])
        == "name       n\na          1\nbcd   12,000"
    )
    shown = columns({"n_cells": 1_234, "share": 0.51239, "ok": True, "rows": [{"k": 1}], "none": None})
    assert shown == "n_cells  1,234\nshare    0.512\nok       yes\nrows:\nk\n1"
    by_name = columns({"per_label": {"B": {"n": 3, "f1": 0.25}, "NK": {"n": 10, "f1": None}}})
    assert by_name == "per_label:\nname   n     f1\nB      3  0.250\nNK    10      -"
    assert table([{"name": "a", "small": [], "kinds": ["B", "T"]}]) == "name  kinds\na     B, T"
    assert table([{"learnt": {"b1": {"n": 5}, "b2": {"n": 7}}}]) == "learnt\nb1 n 5, b2 n 7"
