"""Real data for ``streamx demo``: 1,408 cells of five lines and batches, 5,000 genes (``data/SOURCE.md``)."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
REFERENCE = ("sc_celseq2", "sc_celseq2_5cl_p1", "sc_celseq2_5cl_p2", "sc_celseq2_5cl_p3")
QUERY = "sc_dropseq"
LABEL_KEY = "cell_line"
