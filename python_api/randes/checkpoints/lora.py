"""A LoRA adapter as a fine-tune: ``W = W0 + scaling · B A`` of each weight that it names, rounded to W0's dtype.

Read from a folder as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors``. The products are summed
in fp64, one rank after the other, so that every machine finds the same bytes, and in parts: W never exists whole.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from randes.checkpoints import schema
from randes.checkpoints.files import read_whole
from randes.checkpoints.lazy_tensors import LazyTensors, chunk_bounds, chunks, headers, rows
from randes.checkpoints.on_disk import open_file
from randes.checkpoints.remote.locations import Location
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


MOST_STEPS = 3 * 10**8
"""Of matching patterns, at worst: a few seconds."""


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


def read_adapter(folder: Location, base: Mapping[str, Tensor] | None) -> AdapterTensors:
    """The adapter in ``folder``, on ``base``. Raises ``CheckpointError`` for what it has that is not supported."""
    if base is None:
        raise CheckpointError(f"{folder} is a LoRA adapter, which needs the model it was trained on; merge it first")
    config = _configuration(folder / ADAPTER_CONFIG)
    ranks, alphas = (_patterns(config.get(name)) for name in ("rank_pattern", "alpha_pattern"))
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
    _check_steps(folder, [*ranks, *alphas], factors)
    updates = {}
    for module, pair in sorted(factors.items()):
        if pair.keys() != {"lora_A", "lora_B"}:
            raise CheckpointError(f"{folder} must hold lora_A and lora_B of each layer, got {sorted(pair)} of {module}")
        own_rank = int(_of_module(ranks, module, config["r"]))
        own_alpha = float(_of_module(alphas, module, config["lora_alpha"]))
        for key in pair.values():
            _must_be_real(folder, key, held.headers[key])
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
        _must_be_real(folder, key, held.headers[key])
        _must_fit(folder, name, tuple(held.headers[key].shape), headers(base))
    own = {name: held[key].to(headers(base)[name].dtype) for name, key in whole.items()}
    return AdapterTensors(base, updates, own)


def _must_fit(folder: Location, name: str, shape: tuple[int, ...], base: Mapping[str, Tensor]) -> None:
    if name not in base:
        raise CheckpointError(f"{folder} changes {name}, which is not in the base")
    if tuple(base[name].shape) != shape or not base[name].is_floating_point():
        raise CheckpointError(
            f"{folder} must fit {name}, {tuple(base[name].shape)} {base[name].dtype} in the base, got {shape}"
        )


def _must_be_real(folder: Location, name: str, header: Tensor) -> None:
    if not header.is_floating_point():
        raise CheckpointError(f"{folder} must have {name} in floating point, got {header.dtype}")


def _configuration(path: Location) -> dict[str, Any]:
    try:
        config: dict[str, Any] = schema.parsed(read_whole(path), "it")
        _ADAPTER("it", config)
    except ValueError as error:
        raise CheckpointError(f"{path} must be a LoRA adapter's: {error}") from error
    return config


def _pattern(where: str, value: object) -> None:
    """A regular expression that is no riddle: what is repeated is no group, and nothing is looked at twice."""
    schema.text(where, value)
    assert isinstance(value, str)
    plain = re.sub(r"\\.", "", value)
    repeated_group = re.search(r"\)[*+?{]|\(\?", plain)
    schema.must(len(value) <= 1000 and not repeated_group, where, "a pattern without repeated groups", value)
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where} must be a regular expression, got {error}") from error


_NOTHING = schema.one_of(None)
_FLAG = schema.either(_NOTHING, schema.truth)
_RANK = schema.integer(1, 1 << 20)
_ADAPTER = schema.record(
    {"peft_type": schema.one_of("LORA"), "r": _RANK, "lora_alpha": schema.number},
    {
        "rank_pattern": schema.either(_NOTHING, schema.each(_RANK, _pattern)),
        "alpha_pattern": schema.either(_NOTHING, schema.each(schema.number, _pattern)),
        "use_rslora": _FLAG, "fan_in_fan_out": _FLAG,
    },
    more=True,
)  # fmt: skip
Patterns: TypeAlias = list[tuple[re.Pattern[str], float]]


def _patterns(values: Mapping[str, float] | None) -> Patterns:
    """PEFT's rule: a pattern matches a whole name, or what follows a dot in it."""
    return [(re.compile(rf"(.*\.)?({pattern})"), value) for pattern, value in (values or {}).items()]


def _check_steps(folder: Location, patterns: Patterns, modules: Iterable[str]) -> None:
    """Raise ``CheckpointError`` where looking for patterns in names could take minutes: what is repeated may begin and
    end anywhere in a name."""
    steps = 0
    for pattern, _ in patterns:
        plain = re.sub(r"\\.", "", pattern.pattern.removeprefix(r"(.*\.)?"))
        repeated, choices, groups = len(re.findall(r"[*+?{]", plain)), plain.count("|"), plain.count("(") > 1
        steps += sum(len(name) ** (1 + repeated) for name in modules) * (2**choices if groups else 1 + choices)
    if steps > MOST_STEPS:
        raise CheckpointError(f"{folder} must have rank and alpha patterns that are simpler, or fewer")


def _of_module(patterns: Patterns, module: str, default: float) -> float:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)


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
