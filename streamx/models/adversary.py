"""A classifier of batches by their latents, which totalVI is trained to fool where batches miss proteins.

Without it the encoder can tell batches apart by which proteins are there at all (Gayoso 2021). A training
step lowers the model's loss plus a share of :meth:`Adversary.fool_loss`, then, by an optimiser of its own,
:meth:`Adversary.loss` of the same latents, detached; scvi-tools takes 1 - (weight of the KL divergence) as
the share of both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamx.models.cells import Cells
from streamx.models.layers import linear
from streamx.models.stack import Stack

_N_HIDDEN, _N_LAYERS, _DROPOUT = 32, 2, 0.1


class Adversary(nn.Module):
    """Two hidden layers of 32 units with batch norm and dropout, then a logit per batch.

    Parameters
    ----------
    n_latent, n_batches
        Dimensions of the latent; number of batches, at least two.
    dropout
        Share of hidden units dropped while training.
    generator
        CPU generator for the initial weights; default: seed 0.
    """

    def __init__(
        self,
        n_latent: int,
        n_batches: int,
        *,
        dropout: float = _DROPOUT,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if n_batches < 2:
            raise ValueError(f"an adversary tells batches apart: got {n_batches}, need 2")
        generator = generator or torch.Generator().manual_seed(0)
        self.n_batches = n_batches
        self.stack = Stack(n_latent, _N_HIDDEN, _N_LAYERS, generator=generator, dropout=dropout)
        self.out = linear(_N_HIDDEN, n_batches, generator)

    def forward(self, z_nk: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(n, n_latent) -> ln of the probability of each batch, (n, n_batches)."""
        return self.out(self.stack(z_nk, generator=generator)).float().log_softmax(1)

    def loss(self, z_nk: Tensor, batch_n: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy with the batches that the cells are of; the latents get no gradient."""
        log_nb = self(z_nk.detach(), generator)
        return -log_nb.gather(1, batch_n[:, None]).mean()

    def fool_loss(self, z_nk: Tensor, batch_n: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy with the other batches, each alike: low where the classifier is wrong."""
        log_nb = self(z_nk, generator)
        others_n = log_nb.sum(1) - log_nb.gather(1, batch_n[:, None])[:, 0]
        return -(others_n / (self.n_batches - 1)).mean()


class Fooling(nn.Module):
    """totalVI and the adversary that it is trained to fool: one loss for both.

    A step of alternating optimisers updates the model first and the classifier after, on latents from before;
    neither sees the other's new weights, so one backward pass through both losses does the same. The
    classifier's weights get no gradient from being fooled.
    """

    def __init__(self, model: nn.Module, adversary: Adversary) -> None:
        super().__init__()
        self.model, self.adversary = model, adversary

    def loss(
        self, cells: Cells, kl_weight: float | Tensor = 1.0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The model's losses, while training with the share 1 - kl_weight of the adversary's added."""
        losses, z_nk = self.model.loss_and_latent(cells, kl_weight, generator)  # type: ignore[operator]
        if not self.training:
            return losses
        share = 1 - kl_weight
        for parameter in self.adversary.parameters():
            parameter.requires_grad_(False)
        fooled = self.adversary.fool_loss(z_nk, cells.batch_n, generator)
        for parameter in self.adversary.parameters():
            parameter.requires_grad_(True)
        told = self.adversary.loss(z_nk, cells.batch_n, generator)
        total = losses["loss"] + share * fooled + share * told
        return losses | {"loss": total, "fooled": fooled, "told": told}
