"""What a report says, as plain values: read from disk by collect.py, turned into HTML by page.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from streamx.config import UNLABELED

if TYPE_CHECKING:
    import pandas as pd

BINS = 10  # of the histogram of uncertainties, from 0 to 1


@dataclass(frozen=True)
class Metric:
    """A metric, its 95 % interval if it was sampled, the cells that it rests on.

    Attributes
    ----------
    reason
        Why it has no value; or, of one without an interval, why it is not exact.
    """

    name: str
    value: float | None
    interval: tuple[float, float] | None
    n: int
    reason: str | None


@dataclass(frozen=True)
class Labelling:
    """Transferred labels of the cells that have a latent.

    Attributes
    ----------
    counts, uncertainty
        Cells, and their mean uncertainty, per label.
    histogram
        Cells per tenth of the uncertainty, (10,).
    mean
        Mean uncertainty; NaN without cells.
    novel
        Cells per label that are stranger to the reference than 95 % of its own; None if nobody asked.
    """

    counts: dict[str, int]
    uncertainty: dict[str, float]
    histogram: np.ndarray
    mean: float
    novel: dict[str, int] | None = None

    @property
    def n_unknown(self) -> int:
        return sum(self.counts.get(label, 0) for label in UNLABELED)

    @property
    def n_novel(self) -> int | None:
        return None if self.novel is None else sum(self.novel.values())


@dataclass(frozen=True)
class Query:
    """One mapped query, or why there is none.

    Attributes
    ----------
    error
        What went wrong, and what to do; None if it was mapped.
    n_passed
        Cells that have a latent.
    given
        Cells per pair (given label, transferred label); None where no labels were given.
    agreement
        Accuracy and its kin, where labels were given.
    about
        Further facts for the record: hashes, settings.
    spent
        ``seconds``, ``cpu_seconds`` and ``peak_rss_bytes`` of mapping it, where a job has measured them.
    """

    name: str
    source: str = ""
    error: str | None = None
    n_cells: int = 0
    n_passed: int = 0
    gene_overlap: float | None = None
    n_genes_found: int | None = None
    missing_genes: list[str] = field(default_factory=list)
    batches: dict[str, int] = field(default_factory=dict)
    labelling: Labelling | None = None
    given: pd.DataFrame | None = None
    agreement: dict[str, Any] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    spent: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """What the queries were mapped onto."""

    name: str
    n_cells: int
    n_genes: int | None
    batches: dict[str, int]
    labels: dict[str, int]
    about: dict[str, Any]


@dataclass(frozen=True)
class Sketch:
    """Cells that are drawn.

    Attributes
    ----------
    latent_nk
        float32 (n_cells, n_latent), finite.
    origin_n
        Position of each cell's query; -1 for the reference.
    label_n, uncertainty_n
        Label (of the reference its own, of queries the transferred one; ``unknown`` for none), and its
        uncertainty (NaN for the reference).
    """

    latent_nk: np.ndarray
    origin_n: np.ndarray
    label_n: np.ndarray
    uncertainty_n: np.ndarray


@dataclass(frozen=True)
class Facts:
    """Everything on the page.

    Attributes
    ----------
    metrics
        Of the reference and all queries together; empty if a single query has them.
    about, settings
        Versions, and the settings of the job.
    """

    reference: Reference
    queries: list[Query]
    label_key: str | None
    sketch: Sketch
    metrics: list[Metric]
    about: dict[str, Any]
    settings: dict[str, Any]

    @property
    def mapped(self) -> list[Query]:
        return [query for query in self.queries if query.error is None]

    @property
    def failed(self) -> list[Query]:
        return [query for query in self.queries if query.error is not None]
