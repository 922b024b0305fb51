"""Tiny random models, stores of their fine-tunes, and what Transformers answers with them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import randes

NAMES = ("german", "french")
PROMPTS = ([1, 17, 5, 90, 33], [4, 8, 15, 16, 23, 42, 7], [2, 3])
STEPS = 12


def llama(tied: bool = False, **options: Any) -> nn.Module:
    """Of 2 layers, of widths that are no multiples of 128, with biases."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=520, hidden_size=160, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=tied,
        attention_bias=True, eos_token_id=None, bos_token_id=None, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def finetune(base: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """Every parameter moved, norms and biases by more."""
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            scale = size if parameter.dim() > 1 else 0.3
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return tuned


def store(folder: Path, base: nn.Module, config: randes.Config | None = None, bits: float | None = None) -> Path:
    """A store of fine-tunes of ``base``, packed where bits are given."""
    tuned = {name: finetune(base, number) for number, name in enumerate(NAMES)}
    superposition = randes.compress(copy.deepcopy(base), tuned, config)
    (superposition if bits is None else superposition.pack(bits)).save(folder)
    return folder


def generated(base: nn.Module, folder: Path, rows: Sequence[tuple[Sequence[int], str]]) -> list[list[int]]:
    """What ``SuperposedModel.generate`` answers of a store, greedily: tokens of each prompt as the model named."""
    return of_superposition(base, randes.Superposition.load(folder), rows)


def of_superposition(
    base: nn.Module, superposition: randes.Superposition, rows: Sequence[tuple[Sequence[int], str]], steps: int = STEPS
) -> list[list[int]]:
    """The same of a superposition."""
    model = randes.SuperposedModel(copy.deepcopy(base), superposition)
    found = []
    for prompt, name in rows:
        how: Any = {"adapter_names": [name], "max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
        tokens = model.generate(torch.tensor([prompt]), **how)
        found.append(tokens[0, len(prompt) :].tolist())
    return found
