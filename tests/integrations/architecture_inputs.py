"""Inputs that a model of Transformers answers, made up from its signature and configuration, and found by trying."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as hf
from architecture_configs import IMAGE, VOCABULARY, WIDTH
from torch import Tensor

ROWS, LENGTH = 5, 8
FIRST_WORD = 64  # ids below are special tokens


def described(error: BaseException) -> str:
    """An error's class and first line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    text = lines[0] if len(lines) == 1 or not lines[0].startswith("Class validation") else lines[1]
    return f"{type(error).__name__}: {text[:200]}"


def call(model: Any, inputs: dict[str, Any], *, seed: int = 0, **more: Any) -> Any:
    """The model's answer; what is random in it is the same in every call with this seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**{name: copied(value) for name, value in inputs.items()}, **more)


def copied(value: Any) -> Any:
    """An input that a model may write into."""
    return value.clone() if isinstance(value, Tensor) else value


def runnable(model: Any) -> tuple[dict[str, Any] | None, str]:
    """Inputs that the model answers, and otherwise why not: the error with the first ones."""
    failures = []
    for inputs in candidates(model):
        for _ in range(3):
            try:
                call(model, inputs)
                return inputs, ""
            except MemoryError:
                raise
            except Exception as error:
                failures.append(described(error))
                if not _give_tokens(model, inputs, str(error)):
                    break
    return None, failures[0] if failures else "no inputs known"


def _give_tokens(model: Any, inputs: dict[str, Any], error: str) -> bool:
    """As many image (video, audio) tokens in each row as there are features, which the error says."""
    found = re.search(
        r"(image|video|audio) tokens? do not match.*tokens:? \D*(\d+).*features:? \D*(\d+)", error, re.I | re.S
    )
    if not found or "input_ids" not in inputs:
        return False
    kind, features = found[1].lower(), int(found[3])
    config = model.config
    token = _first(config, f"{kind}_token_id", f"{kind}_token_index")
    if features > 5000:  # some count numbers, not features
        features //= WIDTH
    if token is None or features % ROWS or features > 5000:
        return False
    words = inputs["input_ids"]
    words = words[:, -LENGTH:]
    inputs["input_ids"] = torch.cat([torch.full((ROWS, features // ROWS), token), words], 1)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            kinds = {"image": 1, "video": 2, "audio": 3}[kind] if name[0] == "m" else 1
            inputs[name] = torch.where(inputs["input_ids"] == token, kinds, 0)
    return True


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try, the fullest first."""
    parameters = inspect.signature(model.forward).parameters
    names = set(parameters)
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD}
    main = {getattr(model, "main_input_name", "input_ids")} & names
    makers = _makers(model)
    text = {"input_ids", "attention_mask"} & names
    other = {
        "pixel_values", "input_features", "input_features_mask", "input_values", "decoder_input_ids", "bbox",
        "image_grid_thw", "past_values", "mm_token_type_ids", "audio_values", "decoder_input_values", "audio_codes",
    } & names  # fmt: skip
    tried = []
    for wanted in (text | other | required | main, text | required | main, required | main, main):
        if wanted not in tried and wanted <= set(makers):
            tried.append(wanted)
    for wanted in tried:
        lists = {name: makers[name]() for name in sorted(wanted)}
        for index in range(max(len(made) for made in lists.values()) if lists else 0):
            inputs = {name: copied(made[min(index, len(made) - 1)]) for name, made in lists.items()}
            if "image_grid_thw" in inputs:
                merged = _first(model.config, "spatial_merge_size", default=2) ** 2
                _give_tokens(model, inputs, f"Image tokens do not match, tokens: 0, features: {ROWS * 16 // merged}")
            yield inputs


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these that a configuration, or one inside, has."""
    inside = [value for value in vars(config).values() if isinstance(value, hf.PreTrainedConfig)]
    for one in (config, *inside):
        for name in names:
            value = getattr(one, name, None)
            if value is not None:
                return value
    for one in inside:
        if (value := _first(one, *names)) is not None:
            return value
    return default


def _makers(model: Any) -> dict[str, Callable[[], list[Any]]]:
    """Of each input's name the tensors to try."""
    config, name = model.config, type(model).__name__
    generator = torch.Generator().manual_seed(7)

    def words(length: int = LENGTH) -> Tensor:
        shape = (ROWS, 2, length) if "MultipleChoice" in name else (ROWS, length)
        ids = torch.randint(FIRST_WORD, VOCABULARY, shape, generator=generator)
        ids[..., -1] = 2  # one end of sequence a row
        return ids

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = _first(config, "image_size", default=IMAGE)
    height, width = (
        size[:2] if isinstance(size, list | tuple) else (size, size) if isinstance(size, int) else (IMAGE,) * 2
    )
    channels = _first(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    frames = _first(config, "num_frames", default=4)
    mels = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", default=80)
    sources = _first(config, "max_source_positions", "max_length", default=64)
    hidden = _first(config, "hidden_size", "d_model", default=WIDTH)
    mels = mels if isinstance(mels, int) else 80
    sources = sources if isinstance(sources, int) else 64

    def images() -> list[Tensor]:
        cut = _patches(config, noise)
        if "image_grid_thw" in inspect.signature(model.forward).parameters and cut:
            return cut
        return [
            noise(ROWS, channels, height, width), noise(ROWS, frames, channels, height, width),
            noise(ROWS, 1, channels, height, width), noise(ROWS, 2, channels, height, width),
            noise(ROWS, channels, frames, height, width), noise(ROWS, channels, 64, 64),
            noise(ROWS, channels, 224, 224), *cut,
        ]  # fmt: skip

    def grid() -> list[Tensor]:
        return [torch.tensor([[1, 4, 4]] * ROWS)]

    def boxes() -> list[Tensor]:
        corner = torch.randint(0, 50, (ROWS, LENGTH, 2), generator=generator)
        return [torch.cat([corner, corner + torch.randint(1, 50, corner.shape, generator=generator)], -1)]

    features = [(ROWS, mels, 2 * sources), (ROWS, 2 * sources, mels), (ROWS, 1, 2 * sources, mels), (ROWS, 64, mels),
                (ROWS, mels, 64), (ROWS, 1, 1001, 64), (ROWS, 1, 64, 64), (ROWS, 2000)]  # fmt: skip
    sounds = [
        (ROWS, 2000),
        (ROWS, sources, mels),
        (ROWS, 1, 2000),
        (ROWS, 16000),
        (ROWS, LENGTH, mels),
        (ROWS, 1, 16000),
    ]
    ids = words()
    return {
        "input_ids": lambda: [ids],
        "attention_mask": lambda: [torch.ones_like(ids)],
        "decoder_input_ids": lambda: [words()],
        "bbox": boxes,
        "pixel_values": images,
        "pixel_values_videos": lambda: [noise(ROWS, frames, channels, height, width)],
        "image_grid_thw": grid,
        "grid_thw": grid,
        "mm_token_type_ids": lambda: [torch.zeros_like(ids)],
        "input_features": lambda: [noise(*shape) for shape in features],
        "input_values": lambda: [noise(*shape) for shape in sounds],
        "input_features_mask": lambda: [torch.ones(ROWS, shape[-1], dtype=torch.long) for shape in features],
        "audio_values": lambda: [noise(*shape) for shape in sounds],
        "decoder_input_values": lambda: [noise(ROWS, LENGTH, mels)],
        "audio_codes": lambda: [torch.randint(0, 32, (ROWS, 4, LENGTH), generator=generator)],
        "hidden_states": lambda: [noise(ROWS, LENGTH, hidden), *_patches(config, noise), noise(ROWS, hidden, LENGTH)],
        "inputs_embeds": lambda: [noise(ROWS, LENGTH, hidden)],
        "encoder_hidden_states": lambda: [noise(ROWS, LENGTH, hidden)],
        "query_embeds": lambda: [noise(ROWS, LENGTH, hidden)],
        "inputs": lambda: [words()],
        "task_inputs": lambda: [words()],
        "spectrogram": lambda: [noise(ROWS, LENGTH, mels)],
        "past_values": lambda: [
            noise(ROWS, _first(config, "context_length", default=32), _first(config, "num_input_channels", default=1)),
            noise(ROWS, 64),
        ],
    }


def _patches(config: Any, noise: Callable[..., Tensor]) -> list[Tensor]:
    """Images cut up already: rows of pixels, for a grid of 4 × 4 in each image."""
    patch, time = _first(config, "patch_size", default=8), _first(config, "temporal_patch_size", default=2)
    if not isinstance(patch, int) or not isinstance(time, int):
        return []
    return [noise(16 * ROWS, 3 * time * patch * patch), noise(ROWS, 16, 3 * patch * patch),
            noise(16 * ROWS, 3 * patch * patch), noise(16 * ROWS, 3, patch, patch)]  # fmt: skip
