"""When to stop: a rule over the losses of epochs, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EarlyStopping:
    """State of the rule "stop after ``patience`` epochs without a lower loss, or at a NaN".

    Attributes
    ----------
    patience
        Epochs without improvement that end the training.
    best
        Lowest loss so far.
    best_epoch
        Its epoch, -1 before the first.
    waited
        Epochs since then.
    stopped
        The rule says stop.
    """

    patience: int
    best: float = math.inf
    best_epoch: int = -1
    waited: int = 0
    stopped: bool = False

    def after(self, epoch: int, loss: float) -> EarlyStopping:
        """The state after one more epoch."""
        if math.isnan(loss):
            return replace(self, waited=self.waited + 1, stopped=True)
        if loss < self.best:
            return replace(self, best=loss, best_epoch=epoch, waited=0)
        return replace(self, waited=self.waited + 1, stopped=self.waited + 1 >= self.patience)

    def improved_at(self, epoch: int) -> bool:
        return self.best_epoch == epoch
