"""``streamx activity``: a store of peaks -> a store of genes."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from streamx.cli.info import show
from streamx.cli.verb import Result, Verb, add_settings, given
from streamx.config import ActivityConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="the store of peaks to read")
    parser.add_argument("-o", "--output", required=True, metavar="STORE", help="the store of genes to write")
    add_settings(parser, ActivityConfig)


def run(args: argparse.Namespace) -> Result:
    from streamx.preprocess.activity import activity_store

    made, links, needs = activity_store(args.store, args.output, **given(args, ActivityConfig))
    found = {"n_peaks": links.map_pg.shape[0], "n_peaks_in_genes": links.n_linked}
    found |= {"n_genes_without_peak": links.n_without}
    predicted = {"predicted": asdict(needs)} if needs is not None else {}
    return {"store": args.output, **made.summary(), **found, **predicted}


VERB = Verb(
    name="activity",
    help="add up the counts of the peaks of each gene, so that ATAC can be integrated with RNA",
    example="  streamx activity peaks -o genes --genes gencode.vM10.gtf.gz\n"
    "  streamx activity peaks -o genes --peak-genes links.tsv --memory 2GB",
    add_arguments=add_arguments,
    run=run,
    show=show,
    measured=True,
)
