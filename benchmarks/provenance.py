"""What a benchmark's row says of where it was made."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """Short hash of the checkout, with "+" if files differ from it."""
    asked = ("git", "-C", str(ROOT))
    try:
        name = subprocess.run([*asked, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
        changed = subprocess.run(
            [*asked, "status", "--porcelain", "--untracked-files=no", "streamx"],
            capture_output=True,
            text=True,
        ).stdout
    except OSError:
        return "unknown"
    return (name.strip() or "unknown") + ("+" if changed.strip() else "")


def machine() -> str:
    """Processor and number of cores."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"
