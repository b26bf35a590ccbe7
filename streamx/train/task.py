"""What the engine and a model's own file say to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamx.config import TrainConfig
from streamx.schema import Schema
from streamx.store.collection import Collection
from streamx.store.journal import Journal
from streamx.threads import thread_count
from streamx.train.distributed import Ranks


@dataclass(frozen=True, eq=False)
class Run:
    """What a training works with; processes other than the first have no journal.

    Attributes
    ----------
    name
        Of its state in the journal.
    split
        Masks ``train`` and ``validation`` over the view's cells, where these are chosen; None: by
        ``train_size``.
    """

    view: Collection
    schema: Schema
    config: TrainConfig
    network: Any
    device: torch.device
    ranks: Ranks
    journal: Journal | None
    name: str = "training"
    split: Mapping[str, np.ndarray] | None = None

    @property
    def reading(self) -> dict[str, Any]:
        return {"memory": self.config.memory, "threads": thread_count(self.config.threads)}


@dataclass(frozen=True, eq=False)
class Task:
    """A model to train, and what it is trained with.

    Attributes
    ----------
    minibatches, loss, validate
        As :func:`streamx.train.fit.fit` takes them.
    n_minibatches
        Of an epoch, of this process.
    recordable
        The loss looks at no value and its minibatches are tensors: a GPU may record a step.
    base
        History of a training that came before.
    result
        The network to keep, where that is only a part of what is trained.
    optimizer
        Makes the optimiser from the settings, where one Adam for all weights will not do.
    """

    module: Any
    minibatches: Callable[[int, int], Iterable[tuple[Any, ...]]]
    loss: Callable[..., dict[str, Tensor]]
    n_minibatches: int
    validate: Callable[[int], tuple[dict[str, Tensor], float]] | None = None
    recordable: bool = False
    base: list[dict[str, float]] = field(default_factory=list)
    result: Any = None
    optimizer: Callable[[TrainConfig, Ranks], Any] | None = None


@dataclass(frozen=True, eq=False)
class Finished:
    """What a trained model keeps of its reference: latents (n_cells, n_latent), and tables by name."""

    z_nk: np.ndarray
    tables: dict[str, np.ndarray] = field(default_factory=dict)
