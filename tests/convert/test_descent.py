"""Orthogonalised momentum: against the singular value decomposition, in steps of the size promised."""

from __future__ import annotations

import pytest
import torch

from mla.convert.descent import Muon, orthogonalise, schedule


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 6, 17), (2, 17, 6), (1, 1)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalise(1e-9 * x)
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    inner = u.mT @ made.double() @ vh.mT
    found = inner.diagonal(dim1=-2, dim2=-1)
    # The polynomial does not converge to one: it lands around it.
    assert ((found > 0.6) & (found < 1.3)).all()
    torch.testing.assert_close(inner, torch.diag_embed(found), atol=1e-4, rtol=0)


def test_zero_stays_zero():
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_every_matrix_moves_by_the_rate_times_its_own_size():
    sizes = torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    start = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1)) * sizes
    flat = start.clone().flatten(0, 1).requires_grad_()
    muon = Muon([flat], [lambda w: [w.view(3, 8, 16)]])
    flat.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    muon.step(0.01)
    moved = (flat.detach().view(3, 8, 16) - start).square().mean((1, 2)).sqrt()
    size = start.square().mean((1, 2)).sqrt()
    assert ((moved / size > 0.006) & (moved / size < 0.013)).all()
    assert flat.grad is None


def test_it_solves_least_squares_of_bad_condition():
    """Inputs whose directions differ thirtyfold in size: plain descent would not see the small ones."""
    chance = torch.Generator().manual_seed(3)
    inputs = torch.randn(256, 12, generator=chance) * torch.logspace(0, -1.5, 12)
    truth = torch.randn(7, 12, generator=chance)
    w = (truth + torch.randn(7, 12, generator=chance)).requires_grad_()
    muon = Muon([w], [lambda w: [w]])
    for step in range(400):
        ((inputs @ (w - truth).T).square().sum()).backward()
        muon.step(0.3 * schedule((step + 1) / 401, warm_up=0.05))
    assert float((w.detach() - truth).square().mean()) < 1e-3


def test_a_copy_of_the_state_goes_on_alike():
    chance = torch.Generator().manual_seed(4)
    start, gradients = torch.randn(6, 4, generator=chance), torch.randn(4, 6, 4, generator=chance)

    def run(w, muon, gradients):
        for gradient in gradients:
            w.grad = gradient.clone()
            muon.step(0.1)

    whole = start.clone().requires_grad_()
    run(whole, Muon([whole], [lambda w: [w]]), gradients)
    first = start.clone().requires_grad_()
    muon = Muon([first], [lambda w: [w]])
    run(first, muon, gradients[:2])
    second = first.detach().clone().requires_grad_()
    other = Muon([second], [lambda w: [w]])
    other.load_state_dict(muon.state_dict())
    run(second, other, gradients[2:])
    torch.testing.assert_close(second, whole, rtol=0, atol=0)


def test_the_schedule_rises_and_falls_to_zero():
    assert schedule(0.01, warm_up=0.02) == pytest.approx(0.5, rel=1e-2)
    assert schedule(0.5, warm_up=0.02) == pytest.approx(0.5)
    assert schedule(1.0, warm_up=0.02) == 0 == schedule(1.7, warm_up=0.02)
