"""AnnData-Zarr shards on disk: written once, checked, read as one row space."""

from streamx.store.collection import Collection, open_collection

__all__ = ["Collection", "open_collection"]
