"""streamx: integrate and map single-cell atlases that don't fit in memory."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# name -> module that holds it; imported on first use, so that `import streamx` costs nothing.
_PUBLIC: dict[str, str] = {
    "open": "streamx.store.collection:open_collection",
    "open_location": "streamx.store.location:open_location",
    "convert": "streamx.store.convert:convert",
    "verify": "streamx.verify:verify",
    "annotate": "streamx.store.annotate:annotate",
    "gene_activity": "streamx.preprocess.activity:gene_activity",
    "preprocess": "streamx.preprocess.run:preprocess",
    "Loader": "streamx.loader.loader:Loader",
    "train": "streamx.train.run:train",
    "project": "streamx.project:project",
    "surgery": "streamx.surgery:surgery",
    "transfer": "streamx.mapping:transfer",
    "metrics": "streamx.mapping:metrics",
    "map": "streamx.jobs.call:map_queries",
    "status": "streamx.jobs.status:status",
    "export": "streamx.export:export",
    "report": "streamx.report:report",
    "integrate": "streamx.integrate:integrate",
    "simulate": "streamx.simulate.write:simulate",
    "SCALEX": "streamx.integrate:SCALEX",
    "scalex": "streamx.integrate.scalex",
    "SCVI": "streamx.arches.scvi:SCVI",
    "SCANVI": "streamx.arches.scanvi:SCANVI",
    "TOTALVI": "streamx.arches.totalvi:TOTALVI",
    "TRVAE": "streamx.arches.trvae:TRVAE",
    "SCVI_EVAL": "streamx.arches.evaluate:SCVI_EVAL",
    "TRVAE_EVAL": "streamx.arches.evaluate:TRVAE_EVAL",
    "dataset": "streamx.arches.dataset",
    "setup_anndata": "streamx.arches.keys:setup_anndata",
    "publish": "streamx.share.publish:publish",
    "fetch": "streamx.share.fetch:fetch",
    "zenodo": "streamx.share.zenodo",
    "pl": "streamx.plots",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'streamx' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = import_module(module)
    return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


class _Package(ModuleType):
    """Lets a public function and the module that holds it share a name, as `streamx.preprocess` does:
    once imported, the module takes the name, and can still be called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and ":" in _PUBLIC.get(name, ""):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return __getattr__(self.__name__.removeprefix(f"{__name__}."))(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
