"""``streamx integrate``: SCALEX's one command, with its own spellings and what they mean there.

Here ``--batch_name`` is the obs column with the batches and ``--batch_key`` the column that records the
files; with hyphens they mean the same. Spellings that SCALEX's texts list beside its own are understood too.
"""

from __future__ import annotations

import argparse
import typing
from dataclasses import fields
from typing import Any

from streamx.cli.verb import METAVARS, Result, Verb, default_text, given, value_type
from streamx.config import IntegrateConfig
from streamx.errors import UsageError, warn

ALIASES: dict[str, tuple[str, ...]] = {
    "batch_categories": ("-b",),
    "outdir": ("-o",),
    "projection": ("-p", "-c", "--checkpoint"),
    "gpu": ("-g",),
    "min_cells": ("--min_cell",),
    "min_features": ("--min_gene",),
    "n_top_features": ("--n_top_genes",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="*", metavar="DATA", help="files or folders, each one batch")
    more: dict[str, Any] = {"nargs": "+", "default": [], "metavar": "DATA"}
    parser.add_argument("-d", "--data_list", "--data-list", help="the same", **more)
    parser.add_argument("-t", "--test_list", "--test-list", help="accepted, without effect", **more)
    hints = typing.get_type_hints(IntegrateConfig)
    for setting in fields(IntegrateConfig):
        if setting.name == "show":  # a terminal has no figure to show
            continue
        kind, several = value_type(hints[setting.name])
        spellings = dict.fromkeys([f"--{setting.name}", f"--{setting.name.replace('_', '-')}"])
        names = (*(n for n in ALIASES.get(setting.name, ()) if n[1] != "-"), *spellings)
        names = (*names, *(n for n in ALIASES.get(setting.name, ()) if n.startswith("--")))
        shape: dict[str, Any] = {"action": "store_true"}
        if kind is not bool:
            choices = setting.metadata.get("choices")
            shape = {"type": kind, "nargs": "+" if several else None, "choices": choices}
            shape["metavar"] = None if choices else METAVARS[kind]
        help = setting.metadata["help"] + default_text(setting)
        parser.add_argument(*names, dest=setting.name, default=argparse.SUPPRESS, help=help, **shape)


def run(args: argparse.Namespace) -> Result:
    data = [*args.data, *args.data_list]
    if not data:
        raise UsageError("no data", fix="name files: streamx integrate a.h5ad b.h5ad -o output")
    if args.test_list:
        warn("--test_list has no effect, here as in SCALEX")
    settings = {"outdir": "output/", "show": False, "min_features": None, **given(args, IntegrateConfig)}
    from streamx.integrate import SCALEX

    adata = SCALEX(data, **settings)
    return {
        "outdir": settings["outdir"],
        "n_cells": adata.n_obs,
        "n_genes": adata.n_vars,
        "n_batches": int(adata.obs["batch"].nunique()),
    }


VERB = Verb(
    name="integrate",
    help="SCALEX in one command: files in, one integrated h5ad with latent, UMAP and clusters out",
    example="  streamx integrate a.h5ad b.h5ad -o output --batch_categories a b\n"
    "  streamx integrate new.h5ad --projection output -o mapped",
    add_arguments=add_arguments,
    run=run,
    aliases=("scalex",),
    measured=True,
)
