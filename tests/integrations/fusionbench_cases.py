"""Models, and runs of FusionBench's RanDeS on them that ours are compared with."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import randes
from randes import fusionbench
from randes.checkpoints.sources import write_file

DEPTH, NAMES = 3, ("m0", "m1", "m2")
SOUP, DELTAS, LORA = fusionbench.ALGORITHMS
COMMON = {
    "mode": "random_binary_diagonal_matrix", "target_layer": ["mlp_w", "attn_w"], "random_seed": 42,
    "different_across_layers": True, "joint_matrix_mode": "flatten_hstack", "rank": 1, "random_components": False,
    "shift_layers": 0, "absorber": "None", "debug": 0, "ms_mode": "original", "verbose": 0, "dropout_rate": 1,
}  # fmt: skip
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

State = dict[str, Tensor]


# -------------------------------------------------------------------- the models


def base_state() -> State:
    """Names as CLIP's, three layers."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (10, 32)}
    for layer in range(DEPTH):
        at = f"encoder.layers.{layer}"
        for name in ("q_proj", "out_proj"):
            shapes |= {f"{at}.self_attn.{name}.weight": (32, 32), f"{at}.self_attn.{name}.bias": (32,)}
        shapes |= {f"{at}.mlp.fc1.weight": (48, 32), f"{at}.mlp.fc1.bias": (48,), f"{at}.mlp.fc2.weight": (32, 48)}
        shapes[f"{at}.layer_norm1.weight"] = (32,)
    shapes["classifier.weight"] = (10, 32)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def finetuned(base: State, number: int) -> State:
    generator = torch.Generator().manual_seed(1 + number)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()}


def adapter(base: State, number: int) -> State:
    """LoRA of rank 4 on every matrix of the layers, under PEFT's names."""
    generator, found = torch.Generator().manual_seed(10 + number), {}
    for name, value in base.items():
        if name.startswith("encoder") and value.dim() == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            found[f"{module}.lora_A.weight"] = torch.randn(4, value.shape[1], generator=generator)
            found[f"{module}.lora_B.weight"] = torch.randn(value.shape[0], 4, generator=generator)
    return found


def write_adapter(folder: Path, state: State) -> Path:
    """As PEFT writes it, with a scaling of 1: the original knows of none."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    write_file(folder / "adapter_model.safetensors", state)
    return folder


BASE = base_state()
MODELS = {name: finetuned(BASE, number) for number, name in enumerate(NAMES)}
ADAPTERS = {name: adapter(BASE, number) for number, name in enumerate(NAMES)}


# -------------------------------------------------------------------- the cases


@dataclass(eq=False)
class Case:
    """One run of the original and ours beside it."""

    algorithm: str
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def all_keys(self) -> dict[str, Any]:
        scale = {} if self.algorithm == SOUP else {"scaling_factor": 0.5}
        return COMMON | scale | self.keys

    @property
    def name(self) -> str:
        told = "-".join(str(value) for value in self.keys.values())
        return f"{self.algorithm}-{told}".replace("[", "").replace("]", "").replace("'", "").replace(", ", "+")

    @cached_property
    def superposed(self) -> randes.Superposition:
        """Ours, from the original's own keys."""
        found = fusionbench.options({"_target_": f"a.b.{self.algorithm}", **self.all_keys}, len(NAMES))
        if found.lora:
            with TemporaryDirectory() as folder:
                folders = {name: write_adapter(Path(folder) / name, state) for name, state in ADAPTERS.items()}
                return randes.superpose_adapters(BASE, folders, found.config)
        return randes.compress(BASE, MODELS, found.config, alpha=found.alpha)

    def retrieved(self, name: str) -> State:
        """One model, as the original's class gives it back."""
        if self.algorithm == LORA:
            return dict(randes.merge_adapter(self.superposed, name, BASE, scaling=self.all_keys["scaling_factor"]))
        return self.superposed.retrieve(name)


def of_every_mode(algorithm: str, **keys: Any) -> list[Case]:
    return [Case(algorithm, {"mode": mode, **keys}) for mode in fusionbench.MODES]


CASES = [
    *of_every_mode(DELTAS),
    *of_every_mode(DELTAS, shift_layers=1),
    *of_every_mode(DELTAS, shift_layers=-1),
    *of_every_mode(DELTAS, different_across_layers=False),
    *of_every_mode(LORA),
    *of_every_mode(LORA, shift_layers=1),
    Case(LORA, {"shift_layers": -1}),
    *of_every_mode(SOUP),
    *of_every_mode(SOUP, shift_layers=2, ms_mode="average"),
    *(Case(SOUP, {"target_layer": target}) for target in (["mlp"], ["attn"], ["all"], ["mlp_w", "attn"])),
    Case(SOUP, {"target_layer": ["all"], "mode": "random_diagonal_matrix"}),
    Case(DELTAS, {"target_layer": ["mlp"], "mode": "random_rotation_matrix"}),
    *(Case(DELTAS, {"dropout_rate": rate}) for rate in (2, 3)),
    Case(DELTAS, {"scaling_factor": 1.0, "shift_layers": 1, "dropout_rate": 2}),
    *(
        Case(SOUP, {"absorber": absorber, "ms_mode": mode})
        for absorber in fusionbench.ABSORBERS
        for mode in fusionbench.MS_MODES
    ),
]


def targets(case: Case) -> list[str]:
    """What is superposed, under our names, in the original's order."""
    factors = [FACTOR.sub(r"\1.weight.lora_\2", name) for name in ADAPTERS["m0"]]
    order = factors if case.algorithm == LORA else list(BASE)
    return [name for name in order if name in case.superposed.superposed]


def draws(case: Case) -> tuple[list[Tensor], list[list[int]]]:
    """Our matrices and orders of layers in the order in which the original draws its own."""
    keys, superposition = case.all_keys, case.superposed
    matrices, orders = [], []
    if keys["shift_layers"] == -1:
        for model in NAMES:
            for family in dict.fromkeys(tuple(superposition.family(target)) for target in targets(case)):
                places = [superposition.place(model, tensor) for tensor in family]
                orders.append([next(int(part) for part in place.split(".") if part.isdigit()) for place in places])
    if keys["mode"] != "identity_matrix":
        for place in targets(case):
            for model in NAMES:
                lying = next(t for t in superposition.family(place) if superposition.place(model, t) == place)
                matrices.append(fusionbench.matrix(superposition, model, lying))
    return matrices, orders
