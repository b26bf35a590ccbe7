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
SHOWN = {  # of each verb's result, what is worth a line here
    "convert": ("n_cells", "n_genes", "n_batches", "bytes_per_cell"),
    "preprocess": ("n_cells", "n_genes"),
    "train": ("epochs", "steps", "loss", "cells_per_second"),
    "project": ("name", "n_cells", "n_passed", "gene_overlap"),
    "transfer": ("accuracy", "balanced_accuracy", "macro_f1", "n_unknown", "knn_recall"),
    "metrics": ("batch_entropy_mixing", "ilisi", "same_batch", "asw_label", "nmi", "ari"),
}
SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "n_unknown")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="demo", metavar="DIR", help="where to work (default: demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the training (default: 0)")


def command_lines(folder: Path, seed: int) -> list[str]:
    """The commands, as one would type them in the folder where `streamx demo` was called."""
    folder = Path(shlex.quote(str(folder)))
    data, store, view = folder / "data", folder / "store", folder / "view"
    model, mapped, figures = (folder / f"{what}-{seed}" for what in ("model", "mapped", "figures"))
    return [
        f"convert {data / 'sc_celseq2*.h5ad'} -o {store}",
        f"preprocess {store} -o {view}",
        f"train {view} -o {model} --seed {seed} --max-iteration {MAX_ITERATION}",
        f"project {model} {data / QUERY}.h5ad -o {mapped}",
        f"transfer {model} {mapped} --label-key {LABEL_KEY} --truth-key {LABEL_KEY}",
        f"metrics {model} {mapped} --label-key {LABEL_KEY}",
        f"plot {model} {mapped} -o {figures} --label-key {LABEL_KEY}",
    ]


def run(args: argparse.Namespace) -> Result:
    from streamx.cli.main import invoke

    folder = Path(args.output)
    if not (folder / "data").exists():
        shutil.copytree(DATA, folder / "data")
    results: dict[str, Result] = {}
    for line in command_lines(folder, args.seed):
        print(f"$ streamx {line}", flush=True)
        verb = line.split(" ", 1)[0]
        results[verb] = invoke(shlex.split(line))
        told = results[verb]["queries"][0] if verb == "project" else results[verb]
        facts = [f"{name} {number(told[name])}" for name in SHOWN.get(verb, ())]
        if facts:
            print("  " + ", ".join(facts), flush=True)
    details = results["metrics"].pop("details")
    return {
        "seed": args.seed,
        **{name: results["transfer"][name] for name in SCORES},
        "metrics": results["metrics"],
        "perfect_mixing": details["batch_entropy_mixing"]["perfect"],
        "figures": results["plot"]["figures"],
    }


def show(result: Result) -> str:
    """What it came to, in words."""
    mixing, perfect = result["metrics"]["batch_entropy_mixing"], result["perfect_mixing"]
    return (
        f"\n{result['accuracy']:.1%} of the Drop-seq cells, which no model had seen, got the cell line that "
        f"their genotype says\n(balanced over lines {result['balanced_accuracy']:.1%}); batches mix with an "
        f"entropy of {mixing:.3f} (perfect: {perfect:.3f}).\n"
        f"Figures: {Path(result['figures'][0]).parent}. Done in {result['seconds']:.0f} s; "
        f"peak memory {result['peak_rss_bytes'] / 1e6:,.0f} MB."
    )


VERB = Verb(
    name="demo",
    help="run the whole way on embedded real cells in under two minutes, showing each command",
    example="  streamx demo -o demo --seed 1",
    add_arguments=add_arguments,
    run=run,
    show=show,
    measured=True,
    talks=True,
)
