"""Small networks and fine-tunes of them, shared by the tests."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import randes

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
"""What products in fp32 differ by."""
TRANSFORMS = {
    "both": randes.Config(rank=0),
    "columns": randes.Config(signs="columns", rank=0),
    "none": randes.Config(signs="none", rank=0),
    "permuted": randes.Config(permute=1, rank=0),
    "granules": randes.Config(permute=8, segments=2, rank=0),
    "shuffled": randes.Config(shuffle_layers=-1, rank=0),
    "everything": randes.Config(permute=8, shuffle_layers=-1, group_size=2, seed=7, rank=0),
}
"""One configuration for each way of turning a delta."""


class Block(nn.Module):
    """x + down(relu(up(norm(x)))), with widths that are not powers of two."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Tokens (B, T) to classes (B, 5): every kind of layer that a row of a mixed batch has its own of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.layers = nn.ModuleList(Block(32, 48) for _ in range(3))
        self.norm = nn.RMSNorm(32)
        self.head = nn.Linear(32, 5)
        self.register_buffer("temperature", torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1)) / self.temperature


class Scaled(nn.Module):
    """A linear layer times a parameter of its own, which no row can be routed to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.gamma = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gamma


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def linear(n: int = 48, k: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n).to(dtype)


def finetune(base: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """A copy whose every parameter moved by noise of this size."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return tuned


def superposed(
    base: nn.Module, count: int, config: randes.Config | None = None, size: float = 0.05
) -> tuple[randes.Superposition, dict[str, nn.Module]]:
    """``count`` fine-tunes m0, m1, ... of ``base``, and their superposition over a copy of it."""
    superposition = randes.Superposition.create(copy.deepcopy(base), config)
    tuned = {f"m{number}": finetune(base, number, size) for number in range(count)}
    for name, model in tuned.items():
        superposition.add(name, model)
    return superposition, tuned


def alone(base: nn.Module, superposition: randes.Superposition, name: str) -> nn.Module:
    """A plain model with one retrieved state dict, or the base: what a row of a batch must be answered as."""
    model = copy.deepcopy(base)
    if name != "__base__":
        model.load_state_dict(superposition.retrieve(name))
    return model


def counted(model: nn.Module, **how: Any) -> tuple[Any, list[torch.fx.GraphModule]]:
    """A model compiled without graph breaks, and the programs that were made of it so far."""
    programs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        programs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=keep, **how), programs


def plain_names(model: nn.Module) -> set[str]:
    """The names in a served model's state dict, as the base has them: what models differ in is called ``base_…``."""
    return {name.removeprefix("base_model.").replace("base_", "") for name in model.state_dict()}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by name, to the byte."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def stored(superposition: randes.Superposition, folder: Path) -> dict[str, bytes]:
    """What a superposition is on disk, saved anew at ``folder``."""
    superposition.save(folder)
    return content(folder)


def deep(layers: int = 4) -> nn.Module:
    """Many tensors, each a write of its own."""
    torch.manual_seed(0)
    return nn.Sequential(*(linear(32, 32) for _ in range(layers)), nn.Linear(32, 2))


def tokens(rows: int, length: int = 4) -> Tensor:
    """What a ``Net`` takes."""
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(rows))


def uses(
    sup: randes.Superposition, base: nn.Module, tuned: nn.Module, folder: Path
) -> tuple[Callable[[], object], ...]:
    """All that a superposition of ``base`` with ``tuned`` as "m0" is used for."""
    return (
        lambda: sup.add("m1", tuned),
        lambda: sup.remove("m0", tuned),
        lambda: sup.retrieve("m0"),
        lambda: sup.save(folder),
        lambda: randes.SuperposedModel(base, sup),
    )
