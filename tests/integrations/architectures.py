"""Small random Transformers models, one for each architecture that is tested, and inputs of four rows for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH, ROWS = 64, 32, 5, 4

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "moe_intermediate_size": 40, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
BART = {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
IMAGES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 16, "patch_size": 8}  # fmt: skip


def tokens() -> dict[str, Tensor]:
    """Four rows of tokens, one of them padded on the left."""
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def both() -> dict[str, Tensor]:
    """What an encoder reads and a decoder has written."""
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    return {**tokens(), "decoder_input_ids": ids}


def images() -> dict[str, Tensor]:
    """Four small images."""
    return {"pixel_values": torch.randn(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


class Case(NamedTuple):
    """How an architecture is built, and what it is asked."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    generates: bool = False


def _causal(model: str, **values: Any) -> Case:
    config = getattr(hf, f"{model}Config")
    return Case(lambda: getattr(hf, f"{model}ForCausalLM")(config(**values)), tokens, True)


CASES = {
    "Llama": _causal("Llama", **GROUPED),
    "Llama, tied": _causal("Llama", **GROUPED, tie_word_embeddings=True),
    "Mistral": _causal("Mistral", **GROUPED),
    "Qwen2": _causal("Qwen2", **GROUPED),
    "Qwen3": _causal("Qwen3", **GROUPED, head_dim=8),
    "Gemma": _causal("Gemma", **GROUPED, head_dim=8),
    "GPT-NeoX": _causal("GPTNeoX", **SIZES),
    "OPT": _causal("OPT", **{**SIZES, "ffn_dim": 64, "word_embed_proj_dim": WIDTH}),
    "GPT-2": Case(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), tokens, True),
    "Mixtral": _causal("Mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "Qwen3-MoE": _causal("Qwen3Moe", **EXPERTS, num_experts=4, head_dim=8),
    "GPT-OSS": _causal("GptOss", **{**GROUPED, "head_dim": 8}, num_local_experts=4, num_experts_per_tok=2),
    "BERT": Case(lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), tokens),
    "BERT, classifier": Case(lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)), tokens),
    "RoBERTa": Case(lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES)), tokens),
    "DistilBERT": Case(
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=64, n_layers=2, n_heads=4)
        ),
        tokens,
    ),
    "T5": Case(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), both, True),
    "BART": Case(lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), both, True),
    "ViT": Case(lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGES, num_labels=5)), images),
    "CLIP, images": Case(
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**IMAGES, projection_dim=32)), images
    ),
    "CLIP, text": Case(lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**SIZES, projection_dim=32)), tokens),
}
"""By the name that the documentation's table has."""


def build(name: str) -> nn.Module:
    """A random model, the same at every call, ready to answer."""
    torch.manual_seed(0)
    return CASES[name].build().eval()
