"""Small configurations of Transformers' classes: the default one with its numbers made small, by what their names say.

``OVERRIDES`` has what that rule cannot know. Widths stay at 32 or more, so that matrices are superposed.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import transformers as hf

VOCABULARY, WIDTH, IMAGE = 128, 64, 64

SMALL: list[tuple[str, Any]] = [
    (r"num_feat_extract_layers|num_conv_layers|.*loss.*|.*_coefficient|num_mel_bins|.*token_size", None),
    (r"vocab_size|.*_vocab_size|vocab_size_.*|vocabulary_size|head_out_channels", VOCABULARY),
    (r"(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|model_max_length)", 128),
    (r"max_source_positions|max_target_positions|max_speech_positions|max_text_positions", 64),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"rotary_dim", 16),
    (r"upsample_groups", WIDTH),
    (r"(num_)?(key_value|kv)_?(heads|groups)|n_kv_heads|.*num_key_value_heads|num_kv_heads|multi_query_group_num", 2),
    (r".*(conv_kernel|kernel_size|_kernel|stride|strides|padding|dilation|groups)s?", None),
    (r"image_size|input_size|img_size|pretrain_image_size", IMAGE),
    (r"patch_size", 8),
    (r"type_vocab_size|num_channels|num_labels|temporal_patch_size|spatial_merge_size|audio_channels", None),
    (r"time_step_rank|dt_rank|.*lora_rank|.*_rank", 32),
    (r"(n_|num_)?(experts_per_tok|experts_per_token|topk|top_k)|moe_top_?k|num_selected_experts|moe_k", 2),
    (r"(n_|num_)?(group|groups|expert_group|expert_groups)|topk_group|n_expert_groups|n_limited_groups", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|moe_layer_interval|(n_|num_)?shared_experts", 1),
    (r"(attn|expert)_layer_period|full_attention_interval|.*_frequency|decoder_sparse_step|.*sparse_step", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r".*experts", 4),
    (r".*(num_attention_heads|n_heads?|num_heads|_heads|attention_heads)|num_head", 4),
    (r".*(num_.*layers|n_layers?|_layers|num_blocks|n_blocks|depth)|num_.*blocks|layers|depth|num_encoder_blocks", 2),
    (r"head_dim|.*_head_dim|d_kv|attention_head_size|head_size|dim_head|mamba_d_head|mamba_head_dim", 16),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|d_inner|mlp_dim|dim_ff|filter_size)", 96),
    (r"num_image_tokens|image_seq_length|num_query_tokens|num_queries|mm_tokens_per_image|num_latents", 16),
    (r"window_size|window", 2),
    (r"sliding_window|attention_window", 16),
    (r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|embedding_size|projection_dim|embedding_dim)", WIDTH),
    (r".*(_dim|_size|_channels|_width|_features|_filters|hidden|dim|width|dims|channels|hidden_sizes)", WIDTH),
]  # fmt: skip
"""By name, how large a number may be at most; None: as it is. The first that matches counts."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 128},
    "autoformer": {"prediction_length": 4, "context_length": 16},
    "bit": {"num_groups": 4, "hidden_sizes": [32, 32, 64, 64], "embedding_size": 32},
    "cvt": {"depth": [1, 2, 3], "embed_dim": [32, 32, 64], "num_heads": [1, 2, 4]},
    "bamba": {"attn_layer_indices": [1]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 16],
        "attention_head_size": 32,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 8,
        "is_decoder": False,
    },
    "blip-2": {"image_token_id": 20},
    "chameleon": {
        "vocabulary_map": {
            "<image>": 20,
            **{f"IMGIMGA{letter}Z": 30 + place for place, letter in enumerate("ABCDEFGHI")},
        }
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "detr": {"d_model": 128, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"vocab_size": VOCABULARY},
    "mamba2": {"num_heads": 8},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_experts_per_tok": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
}
"""By model type, what a configuration is given beside, or in place of, what the rule gives."""

RESNET = {"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1],
          "layer_type": "basic"}  # fmt: skip
"""In place of backbones that need another package."""


def configuration(config_class: Any, shrink: bool, labels: int, values: dict[str, Any]) -> Any:
    """The class's default configuration, made small, for this number of classes."""
    default = config_class()
    special: dict[str, int] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    given = _small(default, special) if shrink else {}
    if hasattr(default, "pad_token_id"):
        given.setdefault("pad_token_id", 0)
    given["num_labels"] = labels
    return config_class(**{**given, **OVERRIDES.get(default.model_type, {}), **values})


def _small(config: Any, special: dict[str, int]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    own = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    layers = own.get("num_hidden_layers")
    keep = _layers(own, layers)
    count = len(keep) or 2
    for key, value in own.items():
        if key.endswith("out_indices") and _ints(value) and isinstance(layers, int):
            count = max(count, len(value))
            given[key] = list(range(count - len(value), count))
    if isinstance(layers, int) and (stages := len(getattr(config, "_out_indices", None) or ())) > 1:
        count = max(count, stages)  # a backbone whose layers are its stages
        given["out_indices"] = list(range(1, stages + 1))
    elif stages := getattr(config, "_out_indices", None):
        given["out_indices"] = [count] if isinstance(layers, int) else list(stages)
    for key, value in own.items():
        if isinstance(value, hf.PreTrainedConfig) and value.model_type == "timm_backbone":
            given[key] = {**RESNET, "out_indices": [min(4, index % 5) for index in value.out_indices or [4]]}
        elif isinstance(value, hf.PreTrainedConfig):
            given[key] = {**_plain(value), "model_type": value.model_type, **_small(value, special)}
            given[key].update(OVERRIDES.get(value.model_type, {}))
        elif re.fullmatch(r".*(token_id|token_index|_tok_id)", key) and isinstance(value, int) and value >= 0:
            given[key] = special.setdefault(key, 3 + len(special))
        elif re.fullmatch(r"eos_token_id|suppress_tokens|begin_suppress_tokens|forced_decoder_ids", key):
            given[key] = 2 if key == "eos_token_id" and value else None if key != "eos_token_id" else value
        elif key == "num_hidden_layers" and isinstance(layers, int):
            given[key] = min(layers, count)
        elif re.fullmatch(r".*(key_value|kv)_heads", key) and _multi_head(own, value):
            given[key] = min(4, value)
        elif key in given:
            continue
        elif re.fullmatch(r".*(indices|indexes)", key) and _ints(value) and isinstance(layers, int):
            given[key] = type(value)(min(one, count - 1) for one in value)
        elif key in ("hidden_sizes", "depths") and isinstance(value, tuple):
            given[key] = [min(one, WIDTH if key[0] == "h" else 1) for one in value]
        elif keep and isinstance(value, list | tuple) and len(value) == layers:
            given[key] = type(value)(value[index] for index in keep)
        elif isinstance(value, dict):
            given[key] = _small_dict(value, own)
        elif key == "rope_parameters" and _sections(config):
            given[key] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": _thirds(own)}
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int) and (most := _most(key)) is not None and value > most:
            given[key] = most
        elif key == "depths" or (re.fullmatch(r".*(_depths|num_blocks|layer_depths)|layers", key) and _ints(value)):
            given[key] = type(value)(min(one, 2 if place == 0 else 1) for place, one in enumerate(value))
        elif _ints(value) and key.endswith("heads"):
            given[key] = type(value)(one if one in (1, 2) else 4 for one in value)
        elif _ints(value) and (most := _most(key)) is not None:
            given[key] = type(value)(min(one, most) for one in value)
    given = {key: value for key, value in given.items() if not (key in own and _same(own[key], value))}
    if "id2label" in own:
        given.pop("id2label", None)
        given.pop("label2id", None)
    return given


def _plain(config: Any) -> dict[str, Any]:
    """All that a configuration inside another says: it may differ from its class's defaults."""
    return {
        key: value
        for key, value in vars(config).items()
        if not key.startswith("_") and key not in ("id2label", "label2id", "transformers_version", "dtype")
    }


def _multi_head(own: dict[str, Any], heads: Any) -> bool:
    """Whether each head has keys and values of its own, by default or because they are made of latents."""
    return isinstance(heads, int) and ("kv_lora_rank" in own or heads == own.get("num_attention_heads"))


def _same(old: Any, new: Any) -> bool:
    return type(old) is type(new) and bool(old == new)


def _ints(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(one) is int for one in value)


def _most(key: str) -> Any:
    return next((most for pattern, most in SMALL if re.fullmatch(pattern, key)), None)


def _layers(own: dict[str, Any], layers: Any) -> list[int]:
    """Which layers stay, so that each kind does."""
    if not isinstance(layers, int) or layers < 3:
        return []
    lists = [v for v in own.values() if isinstance(v, list | tuple) and len(v) == layers]
    kinds: dict[str, int] = {}
    for index in range(layers):
        kinds.setdefault(repr([one[index] for one in lists]), index)
    keep = sorted(kinds.values())[:6]
    return sorted({*keep, 0, 1, *keep}) if len(keep) == 1 else keep


def _small_dict(value: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters, for heads of 16."""
    small = {key: _small_dict(one, own) if isinstance(one, dict) else one for key, one in value.items()}
    if "mrope_section" in small or "rope_theta" in small:
        small["mrope_section"] = _thirds({**own, **small})
    for name in ("short_factor", "long_factor"):
        if name in small:
            small[name] = small[name][:8]
    if "original_max_position_embeddings" in small:
        small["original_max_position_embeddings"] = 64
    return small


def _thirds(own: dict[str, Any]) -> list[int]:
    """How the frequencies of a head are shared between time, height and width."""
    count = int(16 * (own.get("partial_rotary_factor") or 1)) // 2
    return [count - 2 * (3 * count // 8), 3 * count // 8, 3 * count // 8]


def _sections(config: Any) -> bool:
    folder = Path(inspect.getfile(type(config))).parent
    return any("mrope_section" in file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py"))
