"""Pictures (``streamx.pl``): embedding, confusion, history, meta, meta2, sankey; and the UMAP that they draw.

Each takes arrays or anything with AnnData's ``obs`` and ``obsm``, returns what it drew, and imports
matplotlib only when called. SCALEX's and scArches' own names for them work too.
"""

from __future__ import annotations

from streamx.labels import crosstab
from streamx.plots.agreement import confusion, match_clusters
from streamx.plots.curves import history
from streamx.plots.layout import umap
from streamx.plots.profiles import meta, meta2
from streamx.plots.sankey import sankey
from streamx.plots.scatter import embedding

plot_confusion, plot_meta, plot_meta2, sankey_diagram = confusion, meta, meta2, sankey

__all__ = [
    "confusion",
    "crosstab",
    "embedding",
    "history",
    "match_clusters",
    "meta",
    "meta2",
    "plot_confusion",
    "plot_meta",
    "plot_meta2",
    "sankey",
    "sankey_diagram",
    "umap",
]
