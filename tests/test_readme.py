"""README's commands are commands, and its tree is the tree."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import streamx
from streamx.cli.main import VERBS, make_parser
from streamx.demo import DATA

PACKAGE = Path(streamx.__file__).parent
ROOT = PACKAGE.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:\$ )?(?:\.venv/bin/)?streamx (.+)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str) -> None:
    assert make_parser().parse_args(shlex.split(command)).verb


def test_two_commands_that_ci_runs() -> None:
    setups = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)
    assert len(setups) == 2
    assert setups[0].endswith("streamx demo")
    assert setups[1].endswith("pytest")


def test_every_verb_is_named() -> None:
    missing = [verb.name for verb in VERBS if not re.search(rf"\b{verb.name}\b", README)]
    assert missing == []


def test_every_room_is_in_the_tree() -> None:
    tree = README.split("## How it is built")[1]
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert [room for room in sorted(rooms) if f"{room}/" not in tree] == []


def test_lines_of_python_run(needs_torch: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = README.split("```python\n")[1].split("```")[0]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 10
    shutil.copytree(DATA, tmp_path / "demo/data")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(lines.replace("max_iteration=1000", "max_iteration=18"), found)
    assert 0 < found["scores"]["ilisi"] < 1
    assert found["adata"].shape == (1_183, 5_000)


def test_no_path_of_a_machine() -> None:
    assert not re.search(r"/(home|root|Users|tmp|opt)/", README)
