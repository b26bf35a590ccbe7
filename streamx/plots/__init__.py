"""Pictures (``streamx.pl``): embedding, confusion, history, meta, meta2; and the UMAP that they draw.

Each takes arrays or anything with AnnData's ``obs`` and ``obsm``, returns what it drew, and imports
matplotlib only when called.
"""

from __future__ import annotations

from streamx.plots.agreement import confusion, match_clusters
from streamx.plots.curves import history
from streamx.plots.layout import place, umap
from streamx.plots.profiles import meta, meta2
from streamx.plots.scatter import embedding

__all__ = ["confusion", "embedding", "history", "match_clusters", "meta", "meta2", "place", "umap"]
