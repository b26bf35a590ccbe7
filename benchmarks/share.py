"""What it takes to publish and fetch a model: CPU seconds and memory, against a service on this machine.

    python benchmarks/share.py --megabytes 500

The model is a small one beside a file of random bytes; the service is that of the tests
(tests/fake_zenodo.py), in a process of its own. `publish` and `fetch` are one process each; a JSON line for
each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from provenance import ROOT, commit, machine

TESTS = ROOT / "tests"
SERVER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from fake_zenodo import serving
with serving() as zenodo:
    print(zenodo.api, flush=True)
    sys.stdin.read()
"""


def write_model(folder: Path, megabytes: int) -> None:
    """A model of few cells, and bytes that no compression makes fewer."""
    sys.path.insert(0, str(TESTS))
    from views import write_view

    import streamx as sx

    view = write_view(folder / "view", [60, 40], expressed=0.2)
    sx.train(view, folder / "model", max_iteration=4, n_hidden=8, progress=False)
    rng = np.random.default_rng(0)
    with (folder / "model" / "more.bin").open("wb") as out:
        for _ in range(megabytes):
            out.write(rng.bytes(1_000_000))


def measured(argv: list[str]) -> dict[str, float]:
    """One command of ours in a process of its own."""
    import streamx as sx
    from streamx.cli.main import invoke, peak_rss_bytes

    wall = time.monotonic()
    invoke(argv)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "verb": argv[0],
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "seconds": round(time.monotonic() - wall, 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "streamx": sx.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="one command, measured")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measured(args.run)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        write_model(home, args.megabytes)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(TESTS)], stdin=-1, stdout=-1, text=True, env=os.environ
        )
        assert server.stdin is not None
        assert server.stdout is not None
        api = server.stdout.readline().strip()
        environment = os.environ | {"ZENODO_TOKEN": "s3cret-T0ken", "no_proxy": "127.0.0.1"}
        for argv in (
            ["publish", str(home / "model"), "--url", api, "--creator", "Doe, Jane"],
            ["fetch", "100", "-o", str(home / "got"), "--url", api],
        ):
            command = [sys.executable, __file__, "--run", *argv]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            row = {"megabytes": args.megabytes, **json.loads(done.stdout)}
            row |= {"commit": commit(), "machine": machine(), "python": platform.python_version()}
            print(json.dumps(row), flush=True)
        server.stdin.close()
        server.wait()


if __name__ == "__main__":
    main()
