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


def llama(tied: bool = False) -> nn.Module:
    """Of 2 layers, of widths that are no multiples of 128, with biases."""
    return model("llama", attention_bias=True, tie_word_embeddings=tied)


def model(kind: str, **options: Any) -> nn.Module:
    """A small random model of one of Transformers' kinds."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": 520, "hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256, "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.1,
    }  # fmt: skip
    if kind == "opt":
        sizes |= {"ffn_dim": 352, "word_embed_proj_dim": 160, "num_attention_heads": 5, "init_std": 0.1}
    else:
        sizes |= {"intermediate_size": 352, "num_key_value_heads": 2, "head_dim": 32}
    config = transformers.AutoConfig.for_model(kind, **sizes, **options)
    made: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return made.eval()


def finetune(base: nn.Module, seed: int, size: float = 0.05, vectors: float = 0.3) -> nn.Module:
    """Every parameter moved, norms and biases by more."""
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            scale = size if parameter.dim() > 1 else vectors
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return tuned


def store(
    folder: Path, base: nn.Module, config: randes.Config | None = None, bits: float | None = None, vectors: float = 0.3
) -> Path:
    """A store of fine-tunes of ``base``, packed where bits are given."""
    tuned = {name: finetune(base, number, vectors=vectors) for number, name in enumerate(NAMES)}
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
