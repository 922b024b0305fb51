"""Scikit-learn's digits, sixteen tasks made of them, and a small transformer encoder to solve them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIZE = 8
CLASSES = 10
HELD_OUT = 597
BATCH = 64


class Images(NamedTuple):
    """``pixels`` (count, 8, 8) fp32 in 0 to 1; ``labels`` (count,) int64."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A new problem made of the digits: other pixels, other labels, or both."""

    name: str
    pixels: Callable[[Tensor], Tensor] = lambda pixels: pixels
    labels: Callable[[Tensor], Tensor] = lambda labels: labels

    def of(self, images: Images) -> Images:
        """The task's version of ``images``."""
        return Images(self.pixels(images.pixels).contiguous(), self.labels(images.labels))


def load(seed: int) -> tuple[Images, Images]:
    """Training and held-out images, 1200 and 597, split at random."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    return Images(pixels[training], labels[training]), Images(pixels[held_out], labels[held_out])


def _pixel_order(seed: int) -> Callable[[Tensor], Tensor]:
    order = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(seed))
    return lambda pixels: pixels.flatten(1)[:, order].view(pixels.shape)


def _label_order(seed: int) -> Callable[[Tensor], Tensor]:
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    return lambda labels: order[labels]


def _checkered(pixels: Tensor) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.where((rows + columns) % 2 == 0, pixels, 1 - pixels)


TASKS = (
    Task("rot90", lambda pixels: pixels.rot90(1, (1, 2))),
    Task("inverted", lambda pixels: 1 - pixels),
    Task("mirrored", lambda pixels: pixels.flip(2)),
    Task("pixels-a", _pixel_order(1)),
    Task("labels-a", labels=_label_order(1)),
    Task("rot180", lambda pixels: pixels.rot90(2, (1, 2))),
    Task("pixels-b", _pixel_order(2)),
    Task("labels-b", labels=_label_order(2)),
    Task("rot270", lambda pixels: pixels.rot90(3, (1, 2))),
    Task("upside-down", lambda pixels: pixels.flip(1)),
    Task("transposed", lambda pixels: pixels.mT),
    Task("shifted", lambda pixels: pixels.roll((4, 4), (1, 2))),
    Task("checkered", _checkered),
    Task("inverted-rot90", lambda pixels: 1 - pixels.rot90(1, (1, 2))),
    Task("pixels-c", _pixel_order(3)),
    Task("labels-c", labels=_label_order(3)),
)


class Attention(nn.Module):
    """Self-attention whose four projections are linear layers that it calls."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → (B, T, width)"""
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → (B, T, width)"""
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return mixed


class DigitEncoder(nn.Module):
    """A transformer encoder over the eight rows of an image: (B, 8, 8) → (B, 10) logits."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.row = nn.Linear(SIZE, width)
        self.position = nn.Embedding(SIZE, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """``pixels``: (B, 8, 8)."""
        positions = torch.arange(SIZE, device=pixels.device).expand(pixels.shape[:2])
        x = self.row(pixels) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def train(
    model: nn.Module,
    images: Images,
    *,
    epochs: int,
    rate: float,
    seed: int,
    step: Callable[[], None],
    only: set[str] | None = None,
) -> None:
    """Train ``model`` in place with AdamW, one warm-up and a cosine decay of ``rate``.

    step: called after each epoch. only: the parameters to train, by name; all where it is not given.
    """
    chosen = [parameter for name, parameter in model.named_parameters() if only is None or name in only]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.01, fused=True)
    steps = epochs * -(-len(images.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images.labels), generator=generator), BATCH):
            loss = F.cross_entropy(model(images.pixels[rows]), images.labels[rows])
            gradients = torch.autograd.grad(loss, chosen)
            for parameter, gradient in zip(chosen, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """The share of images that ``model`` labels right."""
    return float((model(images.pixels).argmax(-1) == images.labels).float().mean())
