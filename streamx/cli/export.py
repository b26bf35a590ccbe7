"""``streamx export``: a trained count model in the files of scvi-tools."""

from __future__ import annotations

import argparse

from streamx.cli.verb import Result, Verb

LAYOUT = """\
FOLDER gets one file, model.pt, as scvi-tools 1.4 saves it: weights under its names, genes, categories and
settings. Then, in Python, scvi.model.SCVI.load("FOLDER", adata), or SCANVI, TOTALVI, gives the same latents.
adata holds raw counts of the model's genes, in their order, and the obs columns (and obsm matrix of proteins)
that the result names.
  scvi     SCVI
  scanvi   SCANVI
  totalvi  TOTALVI, if it was trained with --input-transform scaled, as scvi-tools 1.4 does in any case
SCALEX and trVAE are refused: scvi-tools has no such models.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}\n\n{LAYOUT}"
    parser.add_argument("model", metavar="MODEL", help="a model that `train` or `surgery` wrote")
    parser.add_argument("-o", "--out", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--layer", metavar="TEXT", help="layer of adata with the counts (default: X)")


def run(args: argparse.Namespace) -> Result:
    import streamx as sx

    return dict(sx.export(args.model, args.out, layer=args.layer))


VERB = Verb(
    name="export",
    help="write a scVI, scANVI or totalVI as a folder that scvi-tools loads",
    example="  streamx export model -o for_scvi_tools",
    add_arguments=add_arguments,
    run=run,
)
