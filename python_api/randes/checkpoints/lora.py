"""A LoRA adapter as a fine-tune: ``W = W0 + scaling · B A`` of each weight that it names, rounded to W0's dtype.

Read from a folder as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors``. The products are summed
in fp64, one rank after the other, so that every machine finds the same bytes, and in parts: W never exists whole.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import LazyTensors, chunk_bounds, chunks, headers, rows
from randes.checkpoints.on_disk import open_file
from randes.errors import CheckpointError
from randes_kernels.slices import SLICE_ELEMENTS, spans

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PLAIN = {
    "use_dora": (False,), "bias": ("none",), "lora_bias": (False,), "layer_replication": (None, [], {}),
    "trainable_token_indices": (None, [], {}), "alora_invocation_tokens": (None, []), "target_parameters": (None, []),
    "use_qalora": (False,), "use_bdlora": (None, False), "arrow_config": (None,), "megatron_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
"""What the options that change the update must be; what they are where a config does not have them comes first.
Some initialisations (PiSSA, OLoRA, CorDA, LoftQ) change the base, too."""


class Update(NamedTuple):
    """``scaling · rows @ columns``: (N, r) and (r, K) fp64."""

    rows: Tensor
    columns: Tensor
    scaling: float


class AdapterTensors(LazyTensors):
    """A base's tensors with an adapter's update, each made when somebody asks for it."""

    def __init__(self, base: Mapping[str, Tensor], updates: Mapping[str, Update], whole: Mapping[str, Tensor]) -> None:
        """updates: of a weight's name. whole: the adapter's own of other tensors (``modules_to_save``)."""
        super().__init__(headers(base))
        self.base = base
        self.updates, self._whole = updates, whole

    @property
    def touched(self) -> set[str]:
        """The tensors that may differ from the base's."""
        return {*self.updates, *self._whole}

    def chunks(self, name: str) -> Iterator[Tensor]:
        if name in self._whole:
            yield from chunks(self._whole, name)
        elif name not in self.updates:
            yield from chunks(self.base, name)
        else:
            for (start, end), part in zip(chunk_bounds(self.headers[name]), chunks(self.base, name), strict=True):
                yield _updated(part, self.updates[name], self.updates[name].rows[start:end])

    def rows(self, name: str, start: int, end: int) -> Tensor:
        if name in self._whole:
            return self._whole[name][start:end]
        part = rows(self.base, name, start, end)
        return _updated(part, self.updates[name], self.updates[name].rows[start:end]) if name in self.updates else part


def read_adapter(folder: Path, base: Mapping[str, Tensor] | None) -> AdapterTensors:
    """The adapter in ``folder``, on ``base``. Raises ``CheckpointError`` for what it has that is not supported."""
    if base is None:
        raise CheckpointError(f"{folder} is a LoRA adapter, which needs the model it was trained on; merge it first")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} must have r and lora_alpha, got {error!r}") from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} must be an adapter of peft_type LORA, got {config.get('peft_type')!r}")
    for option, allowed in PLAIN.items():
        if config.get(option, allowed[0]) not in allowed:
            raise CheckpointError(f"{folder} must have {option} = {allowed[0]!r}, got {config[option]!r}")
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}")
    held = open_file(folder / WEIGHTS)
    factors: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in held:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(?:(.+)\.(lora_A|lora_B)\.weight|(.+))", key)
        if match is None or (match[3] and "lora_" in match[3]):
            raise CheckpointError(f"{folder} must hold lora_A and lora_B of linear layers, got {key}")
        if match[3]:
            whole[match[3].replace(".modules_to_save.", ".")] = key
        else:
            factors.setdefault(match[1], {})[match[2]] = key
    updates = {}
    for module, pair in sorted(factors.items()):
        if pair.keys() != {"lora_A", "lora_B"}:
            raise CheckpointError(f"{folder} must hold lora_A and lora_B of each layer, got {sorted(pair)} of {module}")
        own_rank = int(_of_module(config.get("rank_pattern"), module, rank))
        own_alpha = float(_of_module(config.get("alpha_pattern"), module, alpha))
        a, b = (held[pair[side]].double() for side in ("lora_A", "lora_B"))
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != own_rank or b.shape[1] != own_rank:
            raise CheckpointError(
                f"{module} must have lora_A ({own_rank}, in) and lora_B (out, {own_rank}), got {tuple(a.shape)},"
                f" {tuple(b.shape)}"
            )
        if config.get("fan_in_fan_out"):
            a, b = b.mT, a.mT
        scaling = own_alpha / (math.sqrt(own_rank) if config.get("use_rslora") else own_rank)
        updates[f"{module}.weight"] = Update(b, a, scaling)
        _must_fit(folder, f"{module}.weight", (b.shape[0], a.shape[1]), headers(base))
    for name, key in whole.items():
        _must_fit(folder, name, tuple(held.headers[key].shape), headers(base))
    own = {name: held[key].to(headers(base)[name].dtype) for name, key in whole.items()}
    return AdapterTensors(base, updates, own)


def _must_fit(folder: Path, name: str, shape: tuple[int, ...], base: Mapping[str, Tensor]) -> None:
    if name not in base:
        raise CheckpointError(f"{folder} changes {name}, which is not in the base")
    if tuple(base[name].shape) != shape or not base[name].is_floating_point():
        raise CheckpointError(
            f"{folder} must fit {name}, {tuple(base[name].shape)} {base[name].dtype} in the base, got {shape}"
        )


def _of_module(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the whole name or what follows a dot in it."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(value)
    return default


def _updated(base: Tensor, update: Update, rows: Tensor) -> Tensor:
    """Some rows of a weight. Elementwise operations alone: a matmul's sums depend on the machine."""
    result = torch.empty(base.shape, dtype=base.dtype, device="cpu")
    for start, end in spans(len(base), base.shape[1], SLICE_ELEMENTS // 4):
        total = torch.zeros(end - start, base.shape[1], dtype=torch.float64, device="cpu")
        product = torch.empty_like(total)
        for own, column in zip(rows[start:end].unbind(1), update.columns.unbind(0), strict=True):
            total.add_(torch.mul(own[:, None], column, out=product))
        result[start:end] = total.mul_(update.scaling).add_(base[start:end].double())
    return result
