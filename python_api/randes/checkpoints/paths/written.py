"""A model's tensors written as Transformers reads them: a folder with configuration and tokenizer, or one file."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from randes.checkpoints.files import make_folder, write_whole
from randes.checkpoints.huggingface import CONFIG, METHOD, configuration
from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.remote.locations import Location
from randes.checkpoints.safetensors import write_file
from randes.config import is_embedding
from randes.errors import CheckpointError

FILE = "model.safetensors"


def write_checkpoint(
    out: Location,
    tensors: Mapping[str, Tensor],
    beside: Mapping[str, bytes],
    *,
    base: Mapping[str, Tensor] | None = None,
    step: Callable[[int], None] = lambda _: None,
) -> Location:
    """Write a model to the folder ``out``, or to the file where it ends in .safetensors; missing folders are made.

    beside: files that go with the model by name; only a folder has them. base: the tensors that these are of, where
    the model's may have other shapes. step: called with the bytes of each part.
    Returns the file of the tensors. Raises ``CheckpointError`` for a folder that holds something else already, before
    anything is written, and ``OSError`` where the disk does not take it.
    """
    if out.suffix == ".safetensors":
        make_folder(out.parent)
        write_file(out, tensors, step=step)
        return out
    if out.is_file():
        raise CheckpointError(f"{out} must be a folder, or end in .safetensors, got another file")
    if out.is_dir() and (strangers := {file.name for file in out.iterdir()} - {FILE, *beside}):
        raise CheckpointError(f"{out} must be empty, or hold a model that was retrieved before, got {min(strangers)}")
    make_folder(out)
    write_file(out / FILE, tensors, step=step)
    for name, text in beside.items():
        write_whole(out / name, [memoryview(_plain(text, tensors, base or tensors) if name == CONFIG else text)])
    return out / FILE


def _plain(text: bytes, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> bytes:
    """A configuration of the base's as one of these tensors: not a store's, and of their vocabulary and classes."""
    values = configuration(text, "the base")
    if (values.get("quantization_config") or {}).get("quant_method") == METHOD:
        del values["quantization_config"]
    own, known = headers(tensors), headers(base)
    sizes = {len(value) for name, value in own.items() if is_embedding(name) and value.dim() == 2}
    if isinstance(before := values.get("vocab_size"), int) and before not in sizes:
        longer = {size for size in sizes if size > before} or sizes  # positions may have a table, too
        if len(longer) == 1:
            values["vocab_size"] = longer.pop()  # a fine-tune's, which has more tokens than the base
    shared = [(known[name], value) for name, value in own.items() if name in known and value.dim() == 2]
    classes = {len(head) for before, head in shared if len(before) == _classes(values) != len(head)}
    if len(classes) == 1:  # a fine-tune's head, for others than the base's, whose names are not known
        values = {key: value for key, value in values.items() if key not in ("id2label", "label2id")}
        values["num_labels"] = classes.pop()
    return (json.dumps(values, indent=2) + "\n").encode()


def _classes(values: Mapping[str, Any]) -> int:
    """How many a classifier of this configuration has; Transformers leaves two of them out of a file."""
    count = len(labels) if isinstance(labels := values.get("id2label"), dict) else values.get("num_labels", 2)
    return count if isinstance(count, int) else 2
