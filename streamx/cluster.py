"""A dask cluster that does the work, where one is asked for or a client is active.

Its workers see the same files. One that dies costs what it was doing, which dask gives to another.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

from streamx.errors import ResourceError, StorageError, UsageError
from streamx.threads import run_all, thread_count

T = TypeVar("T")

CONNECT_SECONDS = 30
# Ctrl-C reaches the workers that we start too: theirs to end is ours, and their tracebacks say nothing.
LEFT_TO_US = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


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
        raise UsageError("dask's cluster is not installed", fix="pip install 'streamx[cluster]'") from None
    kind, _, number = dask.partition(":")
    if kind == "local":
        if number and not (number.isdigit() and int(number)):
            raise UsageError(f"dask = {dask!r}", fix="local:N, with the number of workers")
        workers = int(number or thread_count(0))
        with (
            LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address=None, preload=[LEFT_TO_US]
            ) as cluster,
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


def active_client() -> Any:
    """The ``distributed`` client that is active here, or None; None also inside a task of one.

    A task that waited for others would keep the thread that these need.
    """
    distributed = sys.modules.get("distributed")  # who has a client has imported it
    if distributed is None:
        return None
    with contextlib.suppress(ValueError):
        distributed.get_worker()
        return None
    try:
        return distributed.get_client()
    except ValueError:
        return None


def run_spread(
    tasks: Sequence[Callable[[], T]], portable: Sequence[bool], threads: int, progress: str
) -> list[T]:
    """As :func:`streamx.threads.run_all`, on the workers of the active client, where there is one.

    Parameters
    ----------
    portable
        Of each task, whether it can be sent to another process; the others run here, on threads.

    Raises
    ------
    ResourceError
        If workers die over the same task again and again.
    """
    client = active_client()
    if client is None:
        return run_all(tasks, threads, progress)
    from distributed import KilledWorker, as_completed

    sent = {client.submit(tasks[at], pure=False): at for at in range(len(tasks)) if portable[at]}
    stay = [at for at in range(len(tasks)) if not portable[at]]
    try:
        here = run_all([tasks[at] for at in stay], threads, progress)
        found = dict(zip(stay, here, strict=True))
        with tqdm(total=len(sent), desc=progress, disable=None, leave=False) as bar:
            for future in as_completed(list(sent)):
                # at once: a result that lies on a worker is lost with it, and made again
                found[sent[future]] = future.result()
                bar.update()
        return [found[at] for at in range(len(tasks))]
    except KilledWorker as error:
        raise ResourceError(
            f"workers of the cluster died: {error}", fix="give them more memory, then run it again"
        ) from None
    finally:
        client.cancel(list(sent))
