"""``streamx demo``: the main job on embedded real cells, command by command."""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path

from streamx.cli.show import number
from streamx.cli.verb import Result, Verb
from streamx.demo import DATA, LABEL_KEY, QUERY

MAX_ITERATION = 1_000  # of the default 30,000: enough for 1,183 cells
SHOWN = (  # of each verb's result, what is worth a line here
    "n_cells",
    "n_genes",
    "n_batches",
    "bytes_per_cell",
    "epochs",
    "steps",
    "loss",
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "n_unknown",
    "knn_recall",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="demo", metavar="DIR", help="where to work (default: demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the training (default: 0)")


def command_lines(folder: Path, seed: int) -> list[list[str]]:
    """The commands, as one would type them in the folder where `streamx demo` was called."""
    data, store, view = folder / "data", folder / "store", folder / "view"
    model, mapped, figures = (folder / f"{what}-{seed}" for what in ("model", "mapped", "figures"))
    query = data / f"{QUERY}.h5ad"
    truth = f"--label-key {LABEL_KEY} --truth-key {LABEL_KEY}"
    lines = [
        f"convert {data / 'sc_celseq2*.h5ad'} -o {store}",
        f"preprocess {store} -o {view}",
        f"train {view} -o {model} --seed {seed} --max-iteration {MAX_ITERATION}",
        f"project {model} {query} -o {mapped}",
        f"transfer {model} {mapped} {truth}",
        f"metrics {model} {mapped} --label-key {LABEL_KEY}",
        f"plot {model} {mapped} -o {figures} --label-key {LABEL_KEY}",
    ]
    return [line.split(" ") for line in lines]


def run(args: argparse.Namespace) -> Result:
    from streamx.cli.main import invoke

    folder = Path(args.output)
    if not (folder / "data").exists():
        shutil.copytree(DATA, folder / "data")
    results: dict[str, Result] = {}
    for argv in command_lines(folder, args.seed):
        print("$ streamx", shlex.join(argv).replace("'", ""), flush=True)
        results[argv[0]] = invoke(argv)
        facts = [f"{key} {number(results[argv[0]][key])}" for key in SHOWN if key in results[argv[0]]]
        print("  " + ", ".join(facts) if facts else "  done", flush=True)
    return {
        "seed": args.seed,
        "accuracy": results["transfer"]["accuracy"],
        "balanced_accuracy": results["transfer"]["balanced_accuracy"],
        "metrics": results["metrics"],
        "figures": results["plot"]["figures"],
    }


VERB = Verb(
    name="demo",
    help="run the whole way on embedded real cells in under two minutes, showing each command",
    example="  streamx demo -o demo --seed 1",
    add_arguments=add_arguments,
    run=run,
    measured=True,
    talks=True,
)
