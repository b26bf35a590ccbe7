"""Nearest neighbours: arrays in, arrays out."""

from streamx.neighbors.index import (
    Index,
    Neighbors,
    build_index,
    choose_method,
    nearest,
    open_index,
    open_neighbors,
    reach_recall,
    save_index,
)
from streamx.neighbors.kept import kept_index

__all__ = [
    "Index",
    "Neighbors",
    "build_index",
    "choose_method",
    "kept_index",
    "nearest",
    "open_index",
    "open_neighbors",
    "reach_recall",
    "save_index",
]
