"""The genes that a store or a model speaks, and how other data's genes line up with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from streamx.errors import GeneError, warn

WARN_BELOW = 0.8
REFUSE_BELOW = 0.5
_VERSION = re.compile(r"^(ENS[A-Z]*\d{6,})\.\d+$")
_ENSEMBL = re.compile(r"^ENS([A-Z]*)[GTPE]\d{6,}")


@dataclass(frozen=True)
class Schema:
    """Genes and categories that a model was trained on; a category's code is its position.

    Attributes
    ----------
    genes
        Features of the input, in order.
    batches, batch_key
        Names of the batches, and the obs column that holds them.
    labels, label_key, unlabeled
        Labels and their obs column, where the model was shown any; and what stands for none.
    categories
        Further categorical covariates: (obs column, names) each.
    continuous
        Continuous covariates: obs columns.
    proteins, protein_key
        Names of the proteins and the obsm matrix that holds their counts.
    """

    genes: tuple[str, ...]
    batches: tuple[str, ...] = ()
    batch_key: str | None = None
    labels: tuple[str, ...] = ()
    label_key: str | None = None
    unlabeled: str | None = None
    categories: tuple[tuple[str, tuple[str, ...]], ...] = ()
    continuous: tuple[str, ...] = ()
    proteins: tuple[str, ...] = ()
    protein_key: str | None = None

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Schema:
        """From JSON; what it does not say is empty."""
        known = {f.name: card[f.name] for f in fields(cls) if f.name in card}
        for name, value in known.items():
            if name == "categories":
                known[name] = tuple((str(key), tuple(names)) for key, names in value)
            elif isinstance(value, list):
                known[name] = tuple(value)
        return cls(**known)

    def with_batches(self, names: Iterable[str]) -> Schema:
        """The same and these batches, where they are new, after the old ones."""
        known = set(self.batches)
        return replace(self, batches=self.batches + tuple(n for n in names if n not in known))

    def with_levels(self, names: Mapping[str, Iterable[str]]) -> Schema:
        """The same and these levels of its categorical covariates, where they are new, after the old ones."""
        return replace(
            self,
            categories=tuple(
                (key, (*levels, *(n for n in names.get(key, ()) if n not in levels)))
                for key, levels in self.categories
            ),
        )


@dataclass(frozen=True)
class Alignment:
    """How the columns of some data map onto a target gene axis.

    Attributes
    ----------
    columns
        int64, (len(names),): position in the target of each name, -1 where the target lacks it.
    n_target
        Number of target genes.
    found
        Number of target genes that the data have.
    missing
        Target genes that the data lack, in target order.
    extra
        Genes of the data that the target lacks, in the data's order.
    duplicates
        Names that met a target gene more than once, in the data's order.
    """

    columns: np.ndarray
    n_target: int
    found: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    duplicates: tuple[str, ...]

    @property
    def overlap(self) -> float:
        """Share of the target genes that the data have, in [0, 1]."""
        return self.found / self.n_target if self.n_target else 1.0


def strip_version(name: str) -> str:
    """``ENSG00000141510.16`` -> ``ENSG00000141510``; any other name is returned as it is."""
    match = _VERSION.match(name)
    return match.group(1) if match else name


def align(names: Iterable[str], target: Iterable[str], strip_versions: bool = False) -> Alignment:
    """Map gene names onto a target axis, by exact name.

    Parameters
    ----------
    names
        Genes of the data, possibly with duplicates.
    target
        Genes of the store or model, unique (after stripping, where that is asked for).
    strip_versions
        Compare Ensembl ids without their version, on both sides.

    Raises
    ------
    GeneError
        If the target holds a name twice.
    """
    data, goal = [str(n) for n in names], [str(n) for n in target]
    keys, goal_keys = data, goal
    if strip_versions:
        keys, goal_keys = [strip_version(n) for n in data], [strip_version(n) for n in goal]
    position = {name: i for i, name in enumerate(goal_keys)}
    if len(position) != len(goal_keys):
        twice = next(n for i, n in enumerate(goal_keys) if position[n] != i)
        raise GeneError(f"the target genes hold {twice!r} twice", fix="make the target genes unique")
    columns = np.fromiter((position.get(n, -1) for n in keys), np.int64, len(keys))
    hits = np.bincount(columns[columns >= 0], minlength=len(goal))
    repeated = {goal_keys[i] for i in np.flatnonzero(hits > 1)}
    return Alignment(
        columns=columns,
        n_target=len(goal),
        found=int((hits > 0).sum()),
        missing=tuple(goal[i] for i in np.flatnonzero(hits == 0)),
        extra=tuple(data[i] for i in np.flatnonzero(columns < 0)),
        duplicates=tuple(dict.fromkeys(n for n in keys if n in repeated)),
    )


def check_overlap(
    alignment: Alignment,
    names: Sequence[str],
    target: Sequence[str],
    *,
    where: str,
    strip_versions: bool = False,
) -> None:
    """Refuse data that share fewer than 50 % of the target genes, warn below 80 %.

    Raises
    ------
    GeneError
        Below 50 %; the message names the likely cause (other organism, versions, other kind of name).
    """
    if alignment.overlap >= WARN_BELOW:
        return
    what = (
        f"{alignment.found:,} of {alignment.n_target:,} genes found ({alignment.overlap:.0%}); "
        f"missing: {_some(alignment.missing)}"
    )
    cause, fix = _diagnose(alignment, list(map(str, names)), list(map(str, target)), strip_versions)
    if alignment.overlap >= REFUSE_BELOW:
        warn(f"{what}; missing genes count as zero{cause}", where=where, fix=fix)
        return
    raise GeneError(f"{what}, and at least {REFUSE_BELOW:.0%} are needed{cause}", where=where, fix=fix)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _diagnose(
    alignment: Alignment, names: list[str], target: list[str], strip_versions: bool
) -> tuple[str, str]:
    """Why genes do not match, and what mends it: ("; cause", fix)."""
    wanted = set(target)
    prefixes = [
        {m.group(1) for m in map(_ENSEMBL.match, group) if m} for group in (names, target)
    ]  # species part of Ensembl ids: "" human, "MUS" mouse
    if prefixes[0] and prefixes[1] and not prefixes[0] & prefixes[1]:
        return "; wrong organism: the Ensembl ids are of different species", "use data of the same organism"
    if not strip_versions and align_share(map(strip_version, names), set(map(strip_version, wanted))) > max(
        alignment.overlap, REFUSE_BELOW
    ):
        return "; the Ensembl ids differ in their versions", "strip the versions (--strip-versions)"
    if bool(prefixes[0]) != bool(prefixes[1]):
        kind = ("Ensembl ids", "gene symbols")
        ours, theirs = kind if prefixes[0] else kind[::-1]
        return f"; these are {ours}, the target has {theirs}", "name the genes alike on both sides"
    folded = len({n.upper() for n in names} & {n.upper() for n in wanted})
    if folded > max(1, 1.5 * alignment.found):  # compared with what is found: a file may hold few genes
        cause = f"; wrong organism: ignoring upper and lower case {folded:,} match (human ACTB, mouse Actb)"
        return cause, "map onto a reference of the same organism, or rename the genes to its orthologs"
    if not alignment.found:
        cause = "; no name is shared: another organism, or another kind of gene name"
        return cause, "use data of the same organism, with genes named alike"
    return "", "check that the data come from the same organism and genome annotation"


def align_share(names: Iterable[str], target: set[str]) -> float:
    """Share of ``target`` that occurs among ``names``."""
    return len(target.intersection(names)) / max(len(target), 1)
