"""Whole stores, checkpoints and configurations, to be damaged."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import content, finetune, net
from torch import Tensor, nn

import randes
from randes.checkpoints.lora import ADAPTER_CONFIG, WEIGHTS
from randes.checkpoints.safetensors import write_file
from randes.config import LARGE_TABLE

GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 2,
    "n_positions": 16, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    "num_labels": 2, "attn_pdrop": 0.1, "task_specific_params": {"text-generation": {"max_length": 50}},
}  # fmt: skip
STORES: dict[str, tuple[randes.Config, dict[str, Any] | None]] = {
    "integers": (randes.Config(group_size=2), None),
    "basis, centred": (randes.Config(rank=4, centre=True), None),
    "averages, shuffled": (randes.Config(others="average", shuffle_layers=-1), None),
    "4 bits, basis": (randes.Config(rank=4), {"bits": 4}),
    "1 bit": (randes.Config(permute=8), {"bits": 1}),
    "half a bit, basis in 8 bits": (randes.Config(rank=4), {"bits": 0.5, "coordinates": 8}),
    "table": (randes.Config(), None),
    "table in half a bit": (randes.Config(), {"bits": 0.5}),
    "table in 2 bits": (randes.Config(permute=8), {"bits": 1, "embeddings": 2}),
    "table of directions alone": (randes.Config(), {"bits": 2, "embeddings": 0}),
    "basis, in shards": (randes.Config(rank=4), None),
    "4 bits, in shards": (randes.Config(rank=4, group_size=2), {"bits": 4}),
}
"""How each is made, and packed; some lie in several files a group.

A table is one of embeddings that models have deltas of their own of."""
SHARD_SIZE = 8000
ROWS = LARGE_TABLE // 32 + 1
Files = dict[str, bytes]


@dataclass
class Corpus:
    """Whole stores and checkpoints as bytes, what the stores answer, and a folder that each damage has to itself."""

    scratch: Path
    stores: dict[str, Files] = field(default_factory=dict)
    answers: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    checkpoint: Files = field(default_factory=dict)
    shards: Files = field(default_factory=dict)
    adapter: Files = field(default_factory=dict)
    transformers: Files = field(default_factory=dict)
    served: randes.Superposition | None = None
    logits: Tensor = field(default_factory=lambda: torch.zeros(0))
    base: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def made(cls, folder: Path) -> "Corpus":
        found, base, tabled = cls(folder / "scratch"), net(), net()
        tabled.embed = nn.Embedding(ROWS, 32)
        for kind, (config, packing) in STORES.items():
            own = tabled if kind.startswith("table") else base
            sup = randes.compress(own, {f"m{seed}": finetune(own, seed) for seed in range(3)}, config)
            sup.model_files = {"config.json": json.dumps(GPT2).encode(), "tokenizer.json": b'{"a": 1}'}
            sup = sup if packing is None else sup.pack(**packing)
            sup.save(folder / kind, shard_size=SHARD_SIZE if kind.endswith("in shards") else 0)
            found.stores[kind] = content(folder / kind)
            found.answers[kind] = {name: sup.retrieve(name) for name in sup.names}
        found.base = {name: value.detach() for name, value in base.state_dict().items()}
        _make(folder / "whole")
        write_file(folder / "whole" / "model.safetensors", found.base)
        found.checkpoint = content(folder / "whole")
        _make(folder / "shards")
        names = sorted(found.base)
        parts = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
        for file, own in parts.items():
            write_file(folder / "shards" / file, {name: found.base[name] for name in own})
        index = {"metadata": {"total_size": 1}, "weight_map": {name: f for f, own in parts.items() for name in own}}
        (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
        found.shards = content(folder / "shards")
        found.adapter = _adapter(folder / "adapter", found.base)
        found.transformers = _transformers(folder / "gpt2")
        found.served = randes.Superposition.create(folder / "gpt2")
        found.served.add("m", folder / "gpt2")
        found.logits = logits(randes.from_pretrained(folder / "gpt2", found.served))
        return found

    def put(self, files: Files) -> Path:
        """The files in a folder of their own, which was emptied."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        folder = self.scratch / "files"
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder


@torch.no_grad()
def logits(model: randes.SuperposedModel) -> Tensor:
    """What a model over ``served`` answers."""
    with model.using(["m"]):
        found: Tensor = model(input_ids=torch.tensor([[1, 2]])).logits
        return found


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def _adapter(folder: Path, base: dict[str, Tensor]) -> Files:
    _make(folder)
    tensors = {}
    for module in ("layers.0.up", "layers.1.down"):
        rows, columns = base[f"{module}.weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(4, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(rows, 4)
    write_file(folder / WEIGHTS, tensors)
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"up": 4, r"layers\.\d\.down": 4},
        "alpha_pattern": {"layers.0.up": 2.5}, "use_rslora": False, "fan_in_fan_out": False, "bias": "none",
        "target_modules": ["up", "down"], "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return content(folder)


def _transformers(folder: Path) -> Files:
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    _make(folder)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    write_file(folder / "model.safetensors", dict(model.state_dict()))
    (folder / "config.json").write_text(json.dumps(GPT2))
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 5, "eos_token_id": 2}))
    return content(folder)
