"""When to stop, and when to slow down: rules over the losses of epochs, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EarlyStopping:
    """State of the rule "stop after ``patience`` epochs without a lower loss, or at a NaN".

    Attributes
    ----------
    patience
        Epochs without improvement that end the training; 0: they never do, and no epoch counts as the best.
    best
        Lowest loss so far.
    best_epoch
        Its epoch, -1 before the first.
    waited
        Epochs since then.
    stopped
        The rule says stop.
    threshold
        A loss improves if it is lower by more than this.
    lr_patience, lr_factor
        So many epochs without improvement are let pass; after the next one the learning rate is multiplied
        by the factor (as by torch's, and scArches'); 0: never.
    lr_waited, lr_scale
        Epochs since the last improvement or change of the rate; the product of all factors so far.
    """

    patience: int
    best: float = math.inf
    best_epoch: int = -1
    waited: int = 0
    stopped: bool = False
    threshold: float = 0.0
    lr_patience: int = 0
    lr_factor: float = 1.0
    lr_waited: int = 0
    lr_scale: float = 1.0

    def after(self, epoch: int, loss: float) -> EarlyStopping:
        """The state after one more epoch."""
        if math.isnan(loss):
            return replace(self, waited=self.waited + 1, stopped=True)
        if loss < self.best - self.threshold:
            return replace(self, best=loss, best_epoch=epoch, waited=0, lr_waited=0)
        waited, lr_waited, lr_scale = self.waited + 1, self.lr_waited + 1, self.lr_scale
        if self.lr_patience and lr_waited > self.lr_patience:
            lr_waited, lr_scale = 0, lr_scale * self.lr_factor
        stopped = bool(self.patience) and waited >= self.patience
        return replace(self, waited=waited, stopped=stopped, lr_waited=lr_waited, lr_scale=lr_scale)

    def keeps(self, epoch: int) -> bool:
        """Whether this epoch is the best so far, whose weights will be restored."""
        return bool(self.patience) and self.best_epoch == epoch
