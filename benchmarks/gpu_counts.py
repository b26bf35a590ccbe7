"""Count models on a GPU: cells per second, how long the GPU idles; ours from disk, scvi-tools from memory.

    python benchmarks/gpu_counts.py --work build/count_training --out gpu_counts.jsonl

``--work`` holds the views and files that ``count_training.py`` prepares (same cells, genes and defaults for
both packages). Two measures, one JSON line each:

* train: all of ``sx.train`` or of scvi-tools' ``model.train()``, wall-clock, after a first run that loads and
  compiles; the reference's latents and the validation after each epoch are included in ours.
* steps: a step of ours with its minibatch from the disk, recorded as one CUDA graph or not: rate, kernel
  time, and the share of the time in which no kernel ran.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

import torch  # noqa: E402
from count_training import SETS, SETTINGS  # noqa: E402
from gpu import measured  # noqa: E402

from streamx.config import TRAINING  # noqa: E402
from streamx.store.collection import open_collection  # noqa: E402
from streamx.train import counts  # noqa: E402
from streamx.train.distributed import ALONE  # noqa: E402
from streamx.train.fit import make_optimizer  # noqa: E402
from streamx.train.graph import RecordedStep  # noqa: E402
from streamx.train.run import _configs, train  # noqa: E402
from streamx.train.task import Run, Task  # noqa: E402


def trained(model: str, view: Path, settings: dict[str, Any], epochs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        options = settings | {"device": "cuda", "model": model, "progress": False}
        train(view, Path(folder) / "first", max_epochs=1, **options)
        start = time.perf_counter()
        done = train(view, Path(folder) / "model", max_epochs=epochs, **options)
        seconds = time.perf_counter() - start
        card = json.loads((Path(folder) / "model" / "model.json").read_text())["training"]
    cells = epochs * round(card["n_cells"] * TRAINING[model]["train_size"])
    return {"cells_per_second": round(cells / seconds), "seconds": round(seconds, 2), "loss": done.loss}


def peer(model: str, data: Path, epochs: int, dense: bool) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(HERE / "peers" / "scvi_fit.py"), "--data", str(data)]
    command += ["--model", model, "--epochs", str(epochs), "--accelerator", "gpu"]
    command += ["--dense"] if dense else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    found = json.loads(done.stdout.splitlines()[-1])
    rate = round(found["cells"] / found["wall_s"])
    return {"cells_per_second": rate, "seconds": found["wall_s"], "versions": found["versions"]}


def endless(task: Task) -> Iterator[tuple[Any, ...]]:
    epoch = 0
    while True:
        yield from task.minibatches(epoch, 0)
        epoch += 1


def steps(model: str, view: Path, settings: dict[str, Any], recorded: bool, n: int) -> dict[str, Any]:
    """As ``streamx.train`` makes them."""
    config, network = _configs(settings | {"model": model, "device": "cuda"})
    opened = open_collection(view)
    run = Run(opened, counts.schema_of(opened, config), config, network, torch.device("cuda"), ALONE, None)
    task = counts.prepare(run, False)
    if task.optimizer is not None:
        optimizer = task.optimizer(config, ALONE)
    else:
        assert config.eps is not None  # every count model has one
        optimizer = make_optimizer(task.module, config.lr, config.weight_decay, eps=config.eps)
    recording = RecordedStep(optimizer, task.loss, nullcontext())
    step, minibatches = recording if recorded else recording._step, endless(task)
    task.module.train()
    return measured(lambda: step(*next(minibatches)), config.minibatch_size, n, torch.device("cuda"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(SETS), choices=tuple(SETS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def say(line: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        try:
            found = make()
        except Exception as error:  # a peer that is missing must not end the run
            found = {"failed": f"{type(error).__name__}: {str(error)[-600:]}"}
        text = json.dumps(line | found | about)
        print(text, flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(text + "\n")

    for model in args.models:
        folder = args.work / SETS[model]
        view, data = folder / "view", folder / "cells.h5ad"
        for recorded in (True, False):
            settings = SETTINGS[model] | {"graph": "on" if recorded else "off"}
            line = {"model": model, "way": "streamx", "recorded": recorded}
            say(
                line | {"measure": "steps"},
                lambda m=model, s=settings, r=recorded, v=view: steps(m, v, s, r, args.steps),
            )
            say(
                line | {"measure": "train", "epochs": args.epochs},
                lambda m=model, s=settings, v=view: trained(m, v, s, args.epochs),
            )
        for dense in (False, True):
            way = "scvi-tools" + (" dense" if dense else "")
            say(
                {"model": model, "way": way, "measure": "train", "epochs": args.epochs},
                lambda m=model, d=data, x=dense: peer(m, d, args.epochs, x),
            )


if __name__ == "__main__":
    main()
