"""Who may import whom (README, "How it is built"), and what a mere import or `--help` may load.

A floor lists the rooms below it. Imports inside functions count: a lazy import is still a dependency.
"""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import streamx
from streamx.cli.main import VERBS

PACKAGE = Path(streamx.__file__).parent

CORE = {"errors", "schema", "config", "threads", "compiled", "memory", "cluster"}
DATA = CORE | {"store", "preprocess", "loader"}

# room -> rooms of streamx that it may import (itself always)
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "schema": CORE,
    "config": CORE,
    "threads": CORE,
    "compiled": set(),
    "memory": CORE,
    "cluster": CORE,
    "simulate": CORE | {"store"},
    "store": CORE,
    "preprocess": CORE | {"store"},
    "loader": CORE | {"store", "preprocess"},
    "models": CORE,
    "posterior": CORE | {"models"},
    "train": DATA | {"models", "interop"},
    "interop": CORE | {"models"},
    "query": DATA | {"train"},
    "project": DATA | {"models", "train", "query"},
    "neighbors": CORE,
    "labels": CORE,
    "transfer": CORE | {"labels", "neighbors"},
    "metrics": CORE | {"labels", "neighbors"},
    "plots": CORE | {"labels", "neighbors", "metrics"},
    "figures": CORE | {"store", "labels", "neighbors", "metrics", "plots", "mapping"},
    "report": CORE | {"store", "labels", "neighbors", "metrics", "plots", "mapping"},
    "mapping": CORE | {"store", "train", "labels", "neighbors", "transfer", "metrics"},
    "surgery": DATA | {"models", "train", "query", "project", "mapping"},
    "jobs": CORE | {"store", "train", "labels", "query", "project", "mapping", "surgery"},
    "arches": DATA
    | {"models", "posterior", "train", "query", "project", "surgery"}
    | {"labels", "neighbors", "metrics", "plots"},
    "export": CORE | {"store", "arches", "interop"},
    "verify": CORE | {"store", "train", "mapping"},
    "integrate": DATA
    | {"models", "train", "interop", "project", "mapping", "neighbors", "transfer", "metrics", "plots"},
    "share": CORE | {"store", "train", "interop", "verify"},
    "demo": {"demo"},
    "__main__": {"cli"},
    "cli": DATA
    | {
        "models",
        "train",
        "interop",
        "project",
        "surgery",
        "mapping",
        "integrate",
        "verify",
        "export",
        "figures",
        "plots",
        "report",
        "share",
        "demo",
        "jobs",
    }
    | {"simulate"},
}

# room -> packages of others that it must not import
CLOSED: dict[str, set[str]] = {
    "errors": {"torch", "zarr", "anndata", "scanpy", "dask", "pandas"},
    "config": {"torch", "zarr", "anndata", "scanpy", "dask", "pandas", "numpy"},
    "schema": {"torch", "zarr", "anndata", "scanpy", "dask"},
    "store": {"torch", "scanpy"},
    "preprocess": {"torch", "scanpy"},
    "loader": {"torch"},
    "models": {"zarr", "anndata", "scanpy", "dask"},
    "posterior": {"zarr", "anndata", "scanpy", "dask"},
    "neighbors": {"torch", "zarr", "anndata"},
    "labels": {"torch", "zarr", "anndata"},
    "transfer": {"torch", "zarr", "anndata"},
    "metrics": {"torch", "zarr", "anndata"},
    "plots": {"torch", "zarr"},
}
TOUCHES_A_DEVICE = {"loader/transform.py"}  # the only file below `models` that may import torch

HEAVY = ("torch", "scanpy", "anndata", "numba", "dask", "zarr", "pandas", "h5py", "scipy", "matplotlib")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_floor(path: Path) -> None:
    room, name = room_of(path), path.relative_to(PACKAGE).as_posix()
    assert room in ROOMS, f"{name}: which floor is {room!r} on? Say so here and in README, 'How it is built'"
    for dotted in imports(path):
        top, *rest = dotted.split(".")
        if (
            top == "streamx"
            and rest
            and (PACKAGE / rest[0]).with_suffix(".py").exists() | (PACKAGE / rest[0]).is_dir()
        ):
            assert rest[0] == room or rest[0] in ROOMS[room], f"{name} may not import streamx.{rest[0]}"
        elif top in CLOSED.get(room, ()) and name not in TOUCHES_A_DEVICE:
            pytest.fail(f"{name} may not import {top}")


def test_every_import_is_declared() -> None:
    """Also what another package brings along; in constraints.txt each has its version."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {name_of(line) for line in project["dependencies"]}
    declared |= {name_of(line) for extra in ("mudata", "cloud", "cluster") for line in extras[extra]}
    known = packages_distributions()
    imported = {dotted.split(".")[0] for path in FILES for dotted in imports(path)}
    others = imported - sys.stdlib_module_names - {"streamx"}
    from_where = {top: {name_of(dist) for dist in known.get(top, [top])} for top in others}
    assert {top for top, names in from_where.items() if not names & declared} == set()
    pinned = (PACKAGE.parent / "constraints.txt").read_text().splitlines()
    assert declared <= {name_of(line) for line in pinned}


def name_of(requirement: str) -> str:
    """The package that a line asks for, as registries spell it."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_nobody_imports_the_command_line() -> None:
    for path in FILES:
        if room_of(path) not in ("cli", "__main__"):
            assert not any(dotted.startswith("streamx.cli") for dotted in imports(path)), path


def loaded_by(code: str) -> set[str]:
    """Heavy packages in `sys.modules` after running `code` in a fresh interpreter."""
    report = (
        "import atexit, sys\n"
        "@atexit.register\n"  # `--help` leaves by SystemExit
        "def report():\n"
        f"    print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", report + code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stderr.split())


def test_import_is_light() -> None:
    assert loaded_by("import streamx") == set()


@pytest.mark.parametrize("argv", [["--help"], *([verb.name, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_is_light(argv: list[str]) -> None:
    assert loaded_by(f"from streamx.cli.main import main; main({argv!r})") == set()


@pytest.mark.parametrize(
    "module",
    ["streamx.store", "streamx.preprocess", "streamx.loader", "streamx.neighbors", "streamx.metrics"],
)
def test_runs_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None\nimport pkgutil, importlib, {module} as room\n" + (
        "for info in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "    if info.name != 'streamx.loader.transform': importlib.import_module(info.name)\n"
    )
    assert "torch" not in loaded_by(code + "del sys.modules['torch']")


def test_help_is_fast() -> None:
    """In seconds of the processor: other work on the machine is not ours."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def seconds() -> float:
        before = spent()
        subprocess.run([sys.executable, "-m", "streamx.cli.main", "--help"], capture_output=True, check=True)
        return spent() - before

    assert min(seconds() for _ in range(5)) < 0.5
