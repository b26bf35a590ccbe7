"""Every byte accounted for: sizes and checksums of all objects against the manifest."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from streamx.errors import BadFileError, IntegrityError, StreamxError
from streamx.store.location import Location, describe, open_location
from streamx.store.manifest import MARKER, expected_objects, is_unfinished, read_generation
from streamx.threads import run_all, thread_count

FROM_A_BUCKET = 8  # objects that are read at once, whatever the number of cores


def verify_collection(place: str | Path | Location, *, threads: int = 0) -> dict[str, Any]:
    """Read every object of a store or view and compare it with what was written.

    Parameters
    ----------
    place
        The store or view.
    threads
        Threads that read (0: one per core; more from a bucket).

    Returns
    -------
    dict
        ``ok``; ``objects``: how many were read; ``errors``: one ``{"object", "error"}`` for each that is
        missing, cut short, changed, or not in the manifest at all.

    Raises
    ------
    BadFileError
        If this is no store or view.
    """
    location = open_location(place)
    try:
        state = read_generation(location)
        expected = expected_objects(location, state)
    except StreamxError as error:
        if isinstance(error, BadFileError) and not location.exists(MARKER):
            raise  # no store at all

        return {"ok": False, "objects": 0, "errors": [{"object": error.where, "error": error.what}]}
    keys = sorted(expected)
    n = thread_count(threads if threads or not location.shared else FROM_A_BUCKET)
    found = run_all([partial(check_object, location, key, expected[key]) for key in keys], n, "verifying")
    errors = [{"object": key, "error": error} for key, error in zip(keys, found, strict=True) if error]
    known = {*expected, state.path, MARKER}
    if not location.journal.exists():  # else a commit under way is adding objects
        strays = [key for key in location.list() if key not in known]
        others = [key for key in strays if location.shared and is_unfinished(key)]
        errors += [{"object": key, "error": "not in the manifest"} for key in strays if key not in others]
    return {"ok": not errors, "objects": len(keys) + 2, "errors": errors}


def check_object(location: Location, key: str, expected: list[Any]) -> str | None:
    """What is wrong with an object, or None."""
    try:
        found = describe(location.read(key))
    except IntegrityError as error:
        return error.what if location.exists(key) else "missing"
    except StreamxError as error:
        return error.what
    if found[0] != expected[0]:
        return f"{found[0]} bytes, the manifest says {expected[0]}"
    return None if found == expected else f"CRC-32 {found[1]}, the manifest says {expected[1]}"
