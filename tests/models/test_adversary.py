import pytest
import torch
import torch.nn.functional as F

from streamx.models.adversary import Adversary


def test_losses_are_cross_entropies() -> None:
    adversary = Adversary(4, 3).eval()
    z_nk, batch_n = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3
    log_nb = adversary(z_nk)
    torch.testing.assert_close(log_nb.exp().sum(1), torch.ones(10))
    torch.testing.assert_close(adversary.loss(z_nk, batch_n), F.nll_loss(log_nb, batch_n))
    others_nb = (1 - F.one_hot(batch_n, 3)) / 2
    torch.testing.assert_close(adversary.fool_loss(z_nk, batch_n), F.cross_entropy(log_nb, others_nb))


def test_alternating_steps_learn_and_fool() -> None:
    """The classifier tells two clouds apart; then latents that move down its fool loss are not told apart."""
    draw = torch.Generator().manual_seed(0)
    batch_n = torch.arange(200) % 2
    z_nk = torch.randn(200, 4, generator=draw) + 3.0 * batch_n[:, None]
    z_nk.requires_grad_()
    adversary = Adversary(4, 2)
    steps = torch.optim.Adam(adversary.parameters(), lr=1e-2)
    for _ in range(250):  # the batch norms' running statistics move by a hundredth per step
        steps.zero_grad()
        adversary.loss(z_nk, batch_n, draw).backward()
        steps.step()
    assert z_nk.grad is None, "the classifier's own loss moves no latent"
    adversary.eval()
    told = adversary.loss(z_nk, batch_n).item()
    assert told < 0.1
    for _ in range(30):
        (gradient,) = torch.autograd.grad(adversary.fool_loss(z_nk, batch_n), z_nk)
        z_nk.data -= 50.0 * gradient
    assert adversary.loss(z_nk, batch_n).item() > 0.6


def test_needs_two_batches() -> None:
    with pytest.raises(ValueError, match="need 2"):
        Adversary(4, 1)
