"""Other methods' ways to keep deltas: what comes back, and in how many bytes."""

import torch
from rival_methods import turned
from rivals import rivals


def test_other_methods_give_a_delta_back_in_the_size_that_they_say() -> None:
    """Every form on small deltas: unbiased ones in their own size, and no more bytes than a file of them needs."""
    torch.manual_seed(0)
    deltas = torch.randn(8, 64, 96)
    for rival in rivals():
        for form in (rival.matrices, rival.table):
            made, nbytes = form.method(deltas)
            size = (made * deltas).sum((1, 2)) / deltas.square().sum((1, 2))
            assert made.shape == deltas.shape
            assert nbytes <= 2.1 * deltas.numel() or "rank" in form.name
            if not rival.alone and "rank" not in form.name and "magnitude" not in form.name:
                torch.testing.assert_close(size, torch.ones(8), rtol=2e-3, atol=0)


def test_a_rotation_keeps_norms_and_is_undone() -> None:
    torch.manual_seed(0)
    deltas = torch.randn(8, 64, 96)
    there = turned(deltas, 3)
    torch.testing.assert_close(there.norm(dim=-1), deltas.norm(dim=-1))
    torch.testing.assert_close(turned(there, 3, back=True), deltas)
