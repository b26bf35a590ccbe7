"""Minibatches of all cells beside minibatches of labelled ones, for models that learn from both."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing

from streamx.errors import UsageError
from streamx.loader.deliver import Minibatch
from streamx.loader.loader import Loader


def pairs(
    every: Loader, labelled: Loader, epoch: int, done: int = 0
) -> Iterator[tuple[Minibatch, Minibatch]]:
    """One epoch of ``every``, each minibatch beside the next one of ``labelled``.

    The labelled cells are fewer: their epochs follow one another without regard to those of ``every``, so
    that all of them are seen equally often. Which pass, and where in it, follows from (epoch, step) alone.

    Parameters
    ----------
    every, labelled
        Two loaders over the same view and ranks, the second with ``rows`` where there is a label.
    done
        Pairs (of this rank) to leave out at the beginning.

    Raises
    ------
    UsageError
        If there is no labelled minibatch.
    """
    n = len(labelled.at(0))
    if n == 0:
        raise UsageError("no cell has a label", fix="name the obs column that holds labels, or train without")
    number = epoch * len(every.at(epoch)) + done

    def endless() -> Generator[Minibatch]:
        turn, at = divmod(number, n)
        while True:
            yield from labelled.at(turn, at * labelled.world)
            turn, at = turn + 1, 0

    with closing(endless()) as others:
        yield from zip(every.at(epoch, done * every.world), others, strict=False)
