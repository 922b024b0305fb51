"""A store served in a process that has no base: its weights come from the store."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import finetune, net
from torch import Tensor, nn

import randes

NAMES = ["m0", "m1", "__base__", "m1"]


class Tied(nn.Module):
    """A head that is the table of embeddings, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.mix = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.mix(self.embed(tokens)).mean(1)) * self.scale
        return y


def tokens(rows: int) -> Tensor:
    return torch.arange(6 * rows).view(rows, 6) % 11


def made(folder: Path, **options: object) -> tuple[nn.Module, dict[str, nn.Module]]:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(3)}
    randes.compress(base, models, **options).save(folder)
    return base, models


@pytest.mark.parametrize("options", [{}, {"centre": True}, {"others": "average"}, {"vectors": True}, {"rank": 0}])
def test_a_store_is_served_by_a_module_with_any_weights(options: dict[str, object], tmp_path: Path) -> None:
    base, _ = made(tmp_path / "store", **options)
    expected = randes.SuperposedModel(base, tmp_path / "store")(tokens(4), adapter_names=NAMES)
    for path in (tmp_path / "store", str(tmp_path / "store"), randes.Superposition.load(tmp_path / "store")):
        model = randes.load(path, net(seed=99), capacity=4)
        torch.testing.assert_close(model(tokens(4), adapter_names=NAMES), expected, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_and_buffers_come_from_the_store_too(device: str, tmp_path: Path) -> None:
    base = Tied()
    with torch.no_grad():
        base.scale += 1  # type: ignore[operator]
    models = {"m0": finetune(base, 0), "m1": finetune(base, 1)}
    randes.compress(base, models).save(tmp_path / "store")
    with torch.device(device):
        module = Tied()
    model = randes.load(tmp_path / "store", module)
    expected = randes.SuperposedModel(base, tmp_path / "store")(tokens(4), adapter_names=NAMES)
    torch.testing.assert_close(model(tokens(4), adapter_names=NAMES), expected, rtol=0, atol=0)
    plain = model.unload()
    assert plain.head.weight is plain.embed.weight
    assert {value.device.type for value in plain.state_dict().values()} == {"cpu"}


def test_it_is_served_in_the_modules_own_dtype(tmp_path: Path) -> None:
    made(tmp_path / "store")
    model = randes.load(tmp_path / "store", net(seed=5, dtype=torch.bfloat16))
    assert model(tokens(4), adapter_names=NAMES).dtype == torch.bfloat16


def test_a_packed_store_is_served_in_a_new_process(tmp_path: Path) -> None:
    base, models = made(tmp_path / "store")
    packed = randes.compress(base, models).pack(2)
    packed.save(tmp_path / "packed")
    expected = randes.load(packed, net(seed=3))(tokens(4), adapter_names=NAMES)
    program = (
        "import sys, torch, randes; from models import net\n"
        "x = torch.arange(24).view(4, 6) % 11\n"
        f"y = randes.load(sys.argv[1], net(seed=7))(x, adapter_names={NAMES!r})\n"
        "print(y.double().flatten().tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", program, tmp_path / "packed"], capture_output=True, text=True,
                         env={"PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = torch.tensor(eval(ran.stdout), dtype=torch.float64).view_as(expected)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)


def test_another_module_is_refused_and_unchanged(tmp_path: Path) -> None:
    made(tmp_path / "store")
    other = net(seed=1)
    other.head = nn.Linear(32, 6)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(randes.BaseMismatchError, match=r"head.weight must be \(5, 32\) as in the store's"):
        randes.load(tmp_path / "store", other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(randes.BaseMismatchError, match="the model must have the base's tensors"):
        randes.load(tmp_path / "store", nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"module must be given, a model of the base's class: randes.load\(store, Net"):
        randes.load(tmp_path / "store")
    with pytest.raises(ValueError, match=r"module must be an nn.Module, got str"):
        randes.load(tmp_path / "store", "net")  # type: ignore[arg-type]
    with pytest.raises(randes.StoreError, match="is not a store"):
        randes.load(tmp_path / "nowhere", net())
    served = net()
    randes.load(tmp_path / "store", served)
    with pytest.raises(ValueError, match="module is served by a superposition already"):
        randes.load(tmp_path / "store", served)
    with torch.device("meta"):
        rotary = net()
        rotary.register_buffer("cache", torch.ones(1), persistent=False)
    with pytest.raises(randes.BaseMismatchError, match="cache is on the meta device and in no checkpoint"):
        randes.load(tmp_path / "store", rotary)


def test_errors_say_what_to_write(tmp_path: Path) -> None:
    made(tmp_path / "store")
    with pytest.raises(randes.BaseMismatchError, match=r"randes.load\(store, model\) loads the base's weights"):
        randes.SuperposedModel(net(seed=1), randes.Superposition.load(tmp_path / "store"))
    with pytest.raises(ValueError, match=r"superposition must be one, or a store's folder, got Net"):
        randes.SuperposedModel(net(), net())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"base_module must be an nn.Module, got PosixPath"):
        randes.SuperposedModel(tmp_path, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"serve one of your own with randes.load\(store, module\)"):
        randes.from_pretrained(net(), tmp_path / "store")  # type: ignore[arg-type]
