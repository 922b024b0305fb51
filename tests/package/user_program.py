"""What somebody writes who has the installed package alone: it is run, and its types are checked (test_package.py)."""

import copy

import torch
from torch import Tensor, nn

import randes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


def finetuned(base: nn.Module, seed: int) -> nn.Module:
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.01 * torch.randn(value.shape, generator=generator)
    return model


def main() -> None:
    base = Net()
    models: dict[str, nn.Module] = {name: finetuned(base, seed) for seed, name in enumerate(("german", "legal"))}
    superposition: randes.Superposition = randes.compress(base, models, randes.Config(group_size=2))
    superposition.save("store")
    model: randes.SuperposedModel = randes.load("store", Net())
    x = torch.ones(3, 32)
    y = model(x, adapter_names=["german", "legal", "__base__"])
    error: float = superposition.verify("german", models["german"]).relative_error
    state: dict[str, Tensor] = superposition.retrieve("legal")
    rows: list[int] = [row.store for row in randes.plan(base, 8)]
    assert torch.allclose(y[2], base(x)[2], atol=1e-5)
    assert 0 < error < 1
    assert state.keys() == base.state_dict().keys()
    assert min(rows) > 0
    print(randes.__version__, randes.__file__, sorted(superposition), sep="\n")


if __name__ == "__main__":
    main()
