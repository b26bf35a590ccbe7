"""Nearest neighbours: arrays in, arrays out."""

from streamx.neighbors.index import Index, Neighbors, build_index, choose_method, nearest, reach_recall

__all__ = ["Index", "Neighbors", "build_index", "choose_method", "nearest", "reach_recall"]
