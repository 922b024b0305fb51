"""What each model has of its own in a shared basis: r more columns of K for the weights of a row's model.

    y[m] += (x[m] U) E_j            U (K, r), the same for all models; E (J, r, N); j the model of row m

A decode kernel adds the second product itself, from the projection x U; everything else adds it here, in plain torch.
(Design, section 2.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

FEW_MODELS = 16
"""Up to how many models one product with all of them reads less than a copy of its own model's part for each row."""


class Basis(NamedTuple):
    """``directions``: U (K, r). ``corrections``: E (J, r, N). Both of x's dtype, rows of one piece."""

    directions: Tensor
    corrections: Tensor


def own_product(rows: Tensor, ids: Tensor, corrections: Tensor) -> Tensor:
    """``rows[m] E_j`` (M, N) for rows (M, r) and the model j of each of B equal runs of them; zero for the base."""
    models, rank, width = corrections.shape
    runs = rows.reshape(ids.shape[0], -1, rank)
    if models <= FEW_MODELS:
        own = ids[:, None] == torch.arange(models, device=ids.device)
        y = (runs[:, :, None] * own[:, None, :, None]).flatten(2) @ corrections.flatten(0, 1)
    else:
        known = (ids >= 0) & (ids < models)
        y = torch.bmm(runs * known[:, None, None], corrections[ids.clamp(0, models - 1)])
    return y.reshape(rows.shape[0], width)
