"""Nearest neighbours: arrays in, arrays out."""

from streamx.neighbors.index import Neighbors, build_index, choose_method, nearest, reach_recall

__all__ = ["Neighbors", "build_index", "choose_method", "nearest", "reach_recall"]
