"""Trained models on Zenodo: put there with a card, fetched and unpacked without trust."""

from streamx.share.fetch import fetch
from streamx.share.publish import publish

__all__ = ["fetch", "publish"]
