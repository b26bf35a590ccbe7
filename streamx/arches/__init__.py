"""The calls that users of scArches and scvi-tools know, on AnnData objects, files, stores and views alike."""

from streamx.arches.keys import setup_anndata
from streamx.arches.scanvi import SCANVI
from streamx.arches.scvi import SCVI
from streamx.arches.totalvi import TOTALVI
from streamx.arches.trvae import TRVAE

__all__ = ["SCANVI", "SCVI", "TOTALVI", "TRVAE", "setup_anndata"]
