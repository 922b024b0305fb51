"""FusionBench's RanDeS methods in our terms: their configuration, unchanged, as a ``Config``.

What each key means was read from the original, and ``tests/integrations/test_fusionbench_beside.py`` runs both on the
same models with the same matrices; docs/paper.md lists where the original is at fault. ``randes.fusionbench.method`` is
the other direction: our method inside FusionBench's own command line.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import headers
from randes.config import Config, Others
from randes.errors import RandesError
from randes.superposition.superposition import Superposition
from randes_kernels import slices

Algorithm = Literal["superposed_model_soup", "superposed_task_arithmetic", "superposed_task_arithmetic_lora"]

ALGORITHMS: dict[str, Algorithm] = {
    "SuperposedModelSoupAlgorithm": "superposed_model_soup",
    "SuperposedTaskArithmeticAlgorithm": "superposed_task_arithmetic",
    "SuperposedTaskArithmeticLoRAAlgorithm": "superposed_task_arithmetic_lora",
}
"""FusionBench's classes, as ``_target_`` names them, and its configurations' ``name``."""
MODES: dict[str, dict[str, Any]] = {
    "random_binary_diagonal_matrix": {"signs": "columns"},
    "random_rotation_matrix": {"signs": "columns", "matrix": "rotation"},
    "random_dense_matrix": {"signs": "columns", "matrix": "dense"},
    "random_diagonal_matrix": {"signs": "columns", "matrix": "diagonal"},
    "identity_matrix": {"signs": "none"},
}
TARGETS = ("mlp_w", "attn_w", "mlp", "attn", "all")
ABSORBERS: dict[str, Others] = {"average": "average", "pretrained": "base", "None": "sum"}
MS_MODES = ("average", "original")
IDLE = ("joint_matrix_mode", "rank", "random_components")
"""Keys that the original takes and never reads."""
KEYS = frozenset({
    "mode", "target_layer", "random_seed", "different_across_layers", "shift_layers", "absorber", "ms_mode",
    "scaling_factor", "dropout_rate", "debug", "verbose", "model_path", *IDLE,
})  # fmt: skip


class Options(NamedTuple):
    """What a configuration of FusionBench's comes to.

    alpha: what retrieved deltas (of a soup, weights; of LoRA, the product of B and A) are scaled by. lora: whether
    models are LoRA adapters, whose A and B are superposed. notes: what a user should know, a sentence each.
    """

    config: Config
    alpha: float
    lora: bool
    notes: tuple[str, ...]


def options(mapping: Mapping[str, Any], models: int) -> Options:
    """FusionBench's keys as ``Config``: pass ``config`` and ``alpha`` to ``randes.compress``.

    mapping: a configuration of one of its three RanDeS methods, which ``name`` or ``_target_`` says; or one that has it
    under ``method``. models: how many will be superposed, all in one group; the soup's average divides by it.
    Raises ``ValueError`` for another method, an unknown key, or a value that the original has no meaning for.
    """
    if isinstance(mapping.get("method"), Mapping):
        mapping = mapping["method"]
    method = _algorithm(mapping)
    given = {key: value for key, value in mapping.items() if key != "name" and not key.startswith("_")}
    if unknown := sorted(set(given) - KEYS):
        raise ValueError(f"the configuration of {method} must have FusionBench's keys only, got {', '.join(unknown)}")
    if not isinstance(models, int) or models < 1:
        raise ValueError(f"models must be an integer of at least 1, got {models!r}")
    soup, lora = method == "superposed_model_soup", method == "superposed_task_arithmetic_lora"
    absorber = str(given.get("absorber", "None"))
    _one_of("absorber", absorber, tuple(ABSORBERS))
    ms_mode = given.get("ms_mode", "average")
    _one_of("ms_mode", ms_mode, MS_MODES)
    scale = given.get("scaling_factor", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ValueError(f"scaling_factor must be a number, got {scale!r}")
    config = Config(
        **_mode(given),
        **_targets(given.get("target_layer", ["mlp_w", "attn_w"])),
        gains="shared",
        origin="zero" if soup else "base",
        others=ABSORBERS[absorber] if soup else "sum",
        shuffle_layers=given.get("shift_layers", 0),
        every=given.get("dropout_rate", 1),
        per_layer=given.get("different_across_layers", True),
        seed=given.get("random_seed", 0),
        group_size=models,
        min_width=1,
        vectors=True,
        embeddings="shared",
        rank=0,
    )
    alpha = (1 / models if ms_mode == "average" else 1.0) if soup else float(scale)
    return Options(config, alpha, lora, tuple(_notes(method, given, absorber, ms_mode, models)))


def read(path: str | PathLike[str]) -> dict[str, Any]:
    """One of FusionBench's YAML files. Raises ``RandesError`` without PyYAML and ``ValueError`` for another file."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise RandesError("reading YAML needs PyYAML: python -m pip install 'randes[yaml]'") from error
    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a YAML file: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold one mapping of keys to values, got {type(found).__name__}")
    return found


def _algorithm(mapping: Mapping[str, Any]) -> Algorithm:
    named = mapping.get("_target_", mapping.get("name"))
    last = str(named).rpartition(".")[2]
    for target, name in ALGORITHMS.items():
        if last in (target, name):
            return name
    known = ", ".join((*ALGORITHMS.values(), *ALGORITHMS))
    raise ValueError(f"the configuration's name or _target_ must be one of {known}, got {named!r}")


def _mode(given: Mapping[str, Any]) -> dict[str, Any]:
    mode = given.get("mode")
    _one_of("mode", mode, tuple(MODES))
    return MODES[str(mode)]


class _Targets(NamedTuple):
    """Where biases are taken of some layers and not of others, which patterns cannot say."""

    names: tuple[str, ...]

    def __call__(self, name: str, shape: tuple[int, ...]) -> bool:
        found = {"mlp": "mlp" in name or "Dense" in name, "attn": "attn" in name or "Attention" in name}
        return any(
            found[target.removesuffix("_w")] and not (target.endswith("_w") and "bias" in name) for target in self.names
        )


def _targets(target_layer: object) -> dict[str, Any]:
    """The original looks at names alone: whatever has ``mlp`` or ``attn`` in it, whatever its shape."""
    named = (target_layer,) if isinstance(target_layer, str) else target_layer
    if not isinstance(named, list | tuple) or not named:
        raise ValueError(f"target_layer must be a list of {', '.join(TARGETS)}, got {target_layer!r}")
    for target in named:
        _one_of("target_layer", target, TARGETS)
    if "all" in named:
        return {"include": ("*",), "exclude": ()}
    without_biases = {target.endswith("_w") for target in named}
    if len(without_biases) == 2:
        return {"include": _Targets(tuple(named)), "exclude": ()}
    patterns = {"mlp": ("*mlp*", "*Dense*"), "attn": ("*attn*", "*Attention*")}
    include = dict.fromkeys(pattern for target in named for pattern in patterns[target.removesuffix("_w")])
    return {"include": tuple(include), "exclude": ("*bias*",) if without_biases == {True} else ()}


def _notes(method: str, given: Mapping[str, Any], absorber: str, ms_mode: object, models: int) -> list[str]:
    """What would surprise one who knows the original."""
    notes = []
    if idle := [key for key in IDLE if key in given]:
        notes.append(f"{', '.join(idle)}: the original reads none of it, and nothing is done with it here")
    if method == "superposed_model_soup":
        if ms_mode == "average" and given["mode"] != "identity_matrix":
            notes.append(f"ms_mode average: every weight comes back divided by {models}, as in the original")
        if absorber != "None" and ms_mode == "average":
            notes.append(f"absorber {absorber}: kept as it is; the original divides it by {models} here")
        if absorber == "None" and ms_mode == "original":
            notes.append(f"absorber None: what is not superposed comes back as the sum of {models} models, as there")
        if "scaling_factor" in given:
            notes.append("scaling_factor: the original's soup has none, and nothing is done with it here")
    else:
        if idle := [key for key in ("absorber", "ms_mode") if key in given]:
            notes.append(f"{', '.join(idle)}: of model soups alone, as in the original")
        if method.endswith("lora"):
            notes.append("target_layer: the factors of every weight that the adapters change are superposed")
            notes.append(
                f"scaling_factor: goes with 'randes merge-adapter --scaling {given.get('scaling_factor', 1.0)}'"
            )
    if given.get("debug") or given.get("verbose"):
        notes.append("debug, verbose: see 'randes report' and randes.inspect.analysis")
    if given.get("model_path"):
        notes.append("model_path: nothing is pickled; the store goes where --out says")
    return notes


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def matrix(superposition: Superposition, name: str, tensor: str) -> Tensor:
    """What a model's delta of a tensor is multiplied with, from the right, before it is summed; row signs aside.

    fp32: (1, K) where it is diagonal, as FusionBench's contexts are, and (K, K) else. For comparisons with other
    implementations: nothing of ours makes it. Raises ``UnknownModelError``, and ``ValueError`` for a tensor that is not
    superposed.
    """
    superposition.member(name)
    if tensor not in superposition.superposed:
        raise ValueError(f"tensor must be one that is superposed, got {tensor!r}")
    shape = headers(superposition.base)[tensor].shape
    turn = slices.turn(superposition.key(name), superposition.tensor_id(tensor), shape, superposition.transform(tensor))
    if turn.mixer is not None:
        diagonal = superposition.config.matrix == "diagonal"
        one = torch.ones(1, shape[-1]) if diagonal else torch.eye(shape[-1])
        return turn.mixer.turn(one.double()).float()
    columns = torch.ones(shape[-1]) if turn.columns is None else turn.columns
    return columns[None] if turn.source is None else columns.diag()[:, turn.source]
