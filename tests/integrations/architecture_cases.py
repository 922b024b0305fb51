"""Every model class that Transformers registers, built small, with inputs: what ``architecture_sweep.py`` measures.

Configurations come from ``architecture_configs.py``. Nothing is downloaded.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers as hf
from architecture_configs import configuration
from architecture_inputs import described, runnable
from torch import nn
from transformers.models.auto import modeling_auto

MOST_PARAMETERS = 30_000_000

LABELS = 40  # wide enough for a class head to be superposed

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "RwkvForCausalLM, rescaled": ("RwkvForCausalLM", {"rescale_every": 1}),
    "ReformerModelWithLMHead": ("ReformerModelWithLMHead", {"is_decoder": True}),
    "BloomForCausalLM, slow but exact": ("BloomForCausalLM", {"pretraining_tp": 2, "slow_but_exact": True}),
}
"""Classes again, configured so that other code runs."""


class Case(NamedTuple):
    """A model class, and what its configuration is given beside."""

    name: str
    class_name: str
    values: dict[str, Any]


def cases() -> list[Case]:
    """All that Transformers' auto classes know, by name."""
    names = {name for mapping in _mappings() for name in mapping}
    found = [Case(name, name, {}) for name in names if not name.startswith("Timm") and name not in VARIANTS]
    found += [Case(name, plain, values) for name, (plain, values) in VARIANTS.items()]
    return sorted(found)


def _mappings() -> Iterator[Iterator[str]]:
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("_NAMES"):
            yield (one for names in mapping.values() for one in ([names] if isinstance(names, str) else names))


class NotBuiltError(Exception):
    """A class cannot be built small, or not be run with made-up inputs: why."""


def build(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    """A small model with random weights, in eval mode, and inputs that it answers. Raises ``NotBuiltError``."""
    cls = getattr(hf, case.class_name, None)
    if cls is None or "DummyObject" in type(cls).__name__ or not getattr(cls, "config_class", None):
        raise NotBuiltError("not there without another package")
    labels = 2 if re.search("QuestionAnswering|NextSentence|MultipleChoice|XVector", case.class_name) else LABELS
    failures: list[str] = []
    for shrink in (True, False):
        try:
            config = configuration(cls.config_class, shrink, labels, case.values)
            torch.manual_seed(0)
            with torch.device("meta") if not shrink else torch.device("cpu"):
                model = cls(config)
            if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
                raise NotBuiltError("too many parameters")
            if not shrink:
                model = cls(config)
        except Exception as error:
            failures.append(f"build: {described(error)}")
            continue
        model = model.float().eval()
        randomise(model)
        inputs, why = runnable(model)
        if inputs is not None:
            return model, inputs
        raise NotBuiltError(f"run: {why}")
    raise NotBuiltError(failures[0])


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights of which each shows in the answer: outputs of about unit size, no bias zero and no norm one."""
    generator = torch.Generator().manual_seed(1)
    convolutions = {id(p) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        constant = p.numel() == 0 or bool((p == p.flatten()[0]).all())
        if p.dim() < 2 or name.endswith(("A_log", "dt_bias")):
            scale = 0.2 if constant or p.numel() == 1 else 0.1 * (p.std().item() or 1.0)
            p.copy_(torch.nan_to_num(p) + scale * noise)
        elif id(p) in embeddings:
            p.copy_(noise)
        else:
            fan_in = p[0].numel() if id(p) in convolutions else p.shape[-1]
            p.copy_(noise * fan_in**-0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))


@torch.no_grad()
def finetuned(model: nn.Module, seed: int, size: float = 0.3) -> nn.Module:
    """``model``, with every parameter and running statistic moved by noise of this size beside its own."""
    generator = torch.Generator().manual_seed(100 + seed)
    for p in model.parameters():
        if p.is_floating_point() and p.numel():
            p.add_(size * p.square().mean().sqrt() * torch.randn(p.shape, generator=generator))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(size * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.mul_(0.7 + 0.6 * torch.rand(buffer.shape, generator=generator))
    return model
