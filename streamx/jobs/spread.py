"""Queries of a job onto processes: this one, workers of this machine, or those of a dask cluster.

Each way takes queries and says of each, in any order, whether it is finished (another process may have it).
A worker that dies costs the query that it had; that one is given to another, a few times.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import pickle
import selectors
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from streamx.errors import ResourceError, StreamxError
from streamx.jobs.run import Job, map_query

log = logging.getLogger("streamx")

DEATHS = 5  # of workers over one query, or before one was ready
READY, DONE, BUSY = b"ready\n", b"done\n", b"busy\n"
ERROR = b"error "  # and a pickle in base64: of the job, not of the query

Query = Mapping[str, Any]
Spread = Callable[[Sequence[Query]], Iterator[tuple[Query, bool | str]]]  # finished? or what happened instead


@contextlib.contextmanager
def in_turn(job: Job) -> Iterator[Spread]:
    """One after the other, in this process."""
    yield lambda queries: ((query, map_query(job, query)) for query in queries)


@contextlib.contextmanager
def on_workers(job: Job, number: int) -> Iterator[Spread]:
    """On processes of this machine, which load the reference once and live as long as the block."""
    workers: list[_Worker] = []
    try:
        yield lambda queries: _share(job, queries, workers, number)
    finally:
        for worker in workers:
            worker.stop()


def _share(
    job: Job, queries: Sequence[Query], workers: list[_Worker], number: int
) -> Iterator[tuple[Query, bool | str]]:
    waiting, deaths = deque(queries), Counter[str]()
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.answers, selectors.EVENT_READ, worker)
        while waiting or any(worker.query for worker in workers):
            while len(workers) < min(number, len(waiting) + sum(bool(w.query) for w in workers)):
                worker = _Worker(job)
                workers.append(worker)
                selector.register(worker.answers, selectors.EVENT_READ, worker)
            for worker in workers:
                if worker.ready and worker.query is None and waiting:
                    worker.give(waiting.popleft())
            for found, _ in selector.select():
                worker = found.data
                answer, query = worker.answers.readline(), worker.query
                if answer == READY:
                    worker.ready, deaths[""] = True, 0
                    continue
                if answer in (DONE, BUSY):
                    worker.query = None
                    yield query, answer == DONE
                    continue
                if answer.startswith(ERROR):
                    raise pickle.loads(base64.b64decode(answer.removeprefix(ERROR)))
                selector.unregister(worker.answers)
                workers.remove(worker)
                how = worker.stop()
                deaths[query["name"] if query else ""] += 1
                if query is None:
                    if deaths[""] == DEATHS:
                        raise ResourceError(
                            f"workers die before they have begun ({how})",
                            fix="--workers 1 shows the reason",
                        )
                    continue
                log.warning("%s: its worker died (%s)", query["name"], how)
                if deaths[query["name"]] < DEATHS:
                    waiting.append(query)
                else:
                    yield query, f"{DEATHS} workers died over it, the last by {how}"


class _Worker:
    """A process of :mod:`streamx.jobs.worker`, and the query that it has."""

    def __init__(self, job: Job) -> None:
        self.query: Query | None = None
        self.ready = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamx.jobs.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is the coordinator's, which ends us
        )
        assert self.process.stdout is not None
        self.answers = self.process.stdout
        self._send(job)

    def give(self, query: Query) -> None:
        self.query = query
        self._send(query)

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: its answers end, which is seen there
            self.process.stdin.write(base64.b64encode(pickle.dumps(value)) + b"\n")

    def stop(self) -> str:
        """End the process; what ended it, if something had before."""
        code = self.process.poll()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        code = self.process.returncode if code is None else code
        return f"signal {-code}" if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def on_dask(job: Job, client: Any) -> Iterator[Spread]:
    """On the workers of a dask cluster, each of which loads the reference once."""
    yield lambda queries: _submit(job, queries, client)


def _submit(job: Job, queries: Sequence[Query], client: Any) -> Iterator[tuple[Query, bool | str]]:
    from distributed import as_completed

    futures = {client.submit(map_query, job, query, pure=False): query for query in queries}
    try:
        for future in as_completed(list(futures)):
            error = future.exception()
            if isinstance(error, StreamxError):  # of the job: those of queries are recorded
                raise error
            yield futures[future], f"{type(error).__name__}: {error}" if error else future.result()
    finally:
        client.cancel(list(futures))
