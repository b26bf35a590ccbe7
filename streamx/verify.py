"""``verify``: is every byte of a store, view or model what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from streamx.errors import StreamxError
from streamx.store.location import Location, open_location
from streamx.store.manifest import MARKER
from streamx.store.verify import check_object, verify_collection


def verify(place: str | Path | Location, *, threads: int = 0) -> dict[str, Any]:
    """Read every object of a store, view or model and compare it with what was written.

    Of a model: its card, weights, tables and history, and the latents of its reference by their own
    checksums. The reference's obs is not covered, because ``annotate`` may change it.

    Parameters
    ----------
    place
        Folder of the store, view or model.
    threads
        Threads that read (0: one per core).

    Returns
    -------
    dict
        ``ok``; ``objects``: how many were read; ``errors``: one ``{"object", "error"}`` for each that is
        missing, cut short, changed, or (in a store or view) not in the manifest at all.

    Raises
    ------
    BadFileError
        If it is none of these.
    """
    location = open_location(place)
    if location.exists("model.json") and not location.exists(MARKER):
        return _verify_model(location)
    return verify_collection(location, threads=threads)


def _verify_model(location: Location) -> dict[str, Any]:
    from streamx.mapping import read_reference
    from streamx.train.model import CARD, read_card

    found: dict[str, str | None] = {}
    try:
        card = read_card(location)
        assert card is not None
        found[CARD] = None
        found |= {key: check_object(location, key, of) for key, of in card["files"].items()}
    except StreamxError as error:
        found[CARD] = error.what
    try:
        assert np.ndim(read_reference(location).latent_nk) == 2  # every chunk is read
        found["reference.zarr"] = None
    except (StreamxError, OSError, ValueError, AttributeError, RecursionError) as error:  # of any JSON
        found["reference.zarr"] = str(getattr(error, "what", error))
    errors = [{"object": key, "error": error} for key, error in found.items() if error]
    return {"ok": not errors, "objects": len(found), "errors": errors}
