"""A module that a server makes by its name: ``--module litserve_net:Net``."""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """x (B, 32) to logits (B, 4), and scores of each row against the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 48)
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(torch.relu(self.up(x)))
        return {"logits": self.head(y), "scores": y @ y.T}
