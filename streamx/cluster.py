"""A dask cluster that does the work, where one is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from streamx.errors import StorageError, UsageError
from streamx.threads import thread_count

CONNECT_SECONDS = 30


@contextlib.contextmanager
def client_of(dask: Any) -> Iterator[Any]:
    """A ``distributed`` client, active inside the block, or None.

    Parameters
    ----------
    dask
        None; a client; the address of a scheduler; ``"local"`` for workers of this machine, one per core, or
        ``"local:N"`` for so many. What is started here ends with the block.

    Raises
    ------
    UsageError
        If ``distributed`` is not installed, or this is no address.
    StorageError
        If no scheduler answers there.
    """
    if dask is None or not isinstance(dask, str):
        yield dask
        return
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise UsageError("dask's cluster is not installed", fix="pip install distributed") from None
    kind, _, number = dask.partition(":")
    if kind == "local":
        if number and not (number.isdigit() and int(number)):
            raise UsageError(f"dask = {dask!r}", fix="local:N, with the number of workers")
        workers = int(number or thread_count(0))
        with (
            LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    if "://" not in dask:
        raise UsageError(f"dask = {dask!r}", fix="local, local:N, or an address as tcp://host:8786")
    try:
        client = Client(dask, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"no dask scheduler answers ({error})", where=dask, fix="start one: dask scheduler"
        ) from None
    with client:
        yield client
