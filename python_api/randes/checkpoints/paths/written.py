"""A model's tensors written as Transformers reads them: a folder with configuration and tokenizer, or one file."""

import json
from collections.abc import Callable, Mapping

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
    step: Callable[[int], None] = lambda _: None,
) -> Location:
    """Write a model to the folder ``out``, or to the file where it ends in .safetensors; missing folders are made.

    beside: files that go with the model by name; only a folder has them. step: called with the bytes of each part.
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
        write_whole(out / name, [memoryview(_plain(text, tensors) if name == CONFIG else text)])
    return out / FILE


def _plain(text: bytes, tensors: Mapping[str, Tensor]) -> bytes:
    """A configuration of the base's as one of these tensors: not a store's, and of their vocabulary."""
    values = configuration(text, "the base")
    if (values.get("quantization_config") or {}).get("quant_method") == METHOD:
        del values["quantization_config"]
    sizes = {len(value) for name, value in headers(tensors).items() if is_embedding(name) and value.dim() == 2}
    if isinstance(before := values.get("vocab_size"), int) and before not in sizes:
        longer = {size for size in sizes if size > before} or sizes  # positions may have a table, too
        if len(longer) == 1:
            values["vocab_size"] = longer.pop()  # a fine-tune's, which has more tokens than the base
    return (json.dumps(values, indent=2) + "\n").encode()
