"""SCALEX's one call (``streamx.SCALEX``, ``streamx integrate``) and the one AnnData that it returns."""

from __future__ import annotations

from streamx.integrate.call import SCALEX, integrate

__all__ = ["SCALEX", "integrate"]
