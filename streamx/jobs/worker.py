"""A process that maps one query after the other, as the coordinator names them on stdin.

A line each: first the job, then a query at a time (pickles in base64); answered by ``ready``, then ``done``
or ``busy``, or what stops the whole job. It ends when the coordinator closes stdin, or has died.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import pickle
import signal
import sys

from streamx.errors import named
from streamx.jobs.run import map_query
from streamx.jobs.spread import BUSY, DONE, ERROR, READY


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a whole job step: the coordinator ends us
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    job = pickle.loads(base64.b64decode(sys.stdin.buffer.readline()))
    with contextlib.suppress(BrokenPipeError):
        os.write(answers, READY)
        for line in sys.stdin.buffer:
            try:
                finished = map_query(job, pickle.loads(base64.b64decode(line)))
            except Exception as error:
                os.write(answers, ERROR + base64.b64encode(pickle.dumps(named(error))) + b"\n")
                return
            os.write(answers, DONE if finished else BUSY)


if __name__ == "__main__":
    main()
