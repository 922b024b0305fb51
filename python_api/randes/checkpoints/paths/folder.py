"""Which of a folder's files are its checkpoint."""

import warnings
from collections.abc import Iterable

from randes.checkpoints.remote.locations import Location
from randes.errors import CheckpointError

INDEX = ".safetensors.index.json"
"""What the name of an index ends with: ``model…`` from Transformers, ``diffusion_pytorch_model…`` from Diffusers."""
WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""What a checkpoint of one file is called."""
AGAIN = "consolidated"
"""What the names begin with of files that hold the same tensors again, as Mistral and Meta name them."""


def index_of(folder: Location) -> Location | None:
    """The index that says which files are a folder's checkpoint, None where none does.

    Raises ``CheckpointError`` for several.
    """
    if (folder / WHOLE[0]).is_file():
        return None  # which Transformers reads, whatever an index beside it says
    indexes = _without_again(folder.glob(f"*{INDEX}"))
    if len(indexes) > 1:
        names = ", ".join(index.name for index in indexes)
        raise CheckpointError(f"{folder} must hold one index, got {names}; give the path of the one that is meant")
    return indexes[0] if indexes else None


def files_of(folder: Location) -> list[Location]:
    """The files of a folder without an index: the one that Transformers or Diffusers would read, or all.

    Warns of files that are left out. Raises ``CheckpointError`` where there are none.
    """
    files = _without_again(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors file{_hint(folder)}")
    whole = next((folder / name for name in WHOLE if folder / name in files), None)
    if whole is None:
        return files
    if left := [file.name for file in files if file != whole]:
        warnings.warn(f"of {folder} {whole.name} alone is read, and not {', '.join(left)}", stacklevel=4)
    return [whole]


def _without_again(files: Iterable[Location]) -> list[Location]:
    """In order of their names; those that hold the same tensors again only where there are no others."""
    found = sorted(files)
    return [file for file in found if not file.name.startswith(AGAIN)] or found


def _hint(folder: Location) -> str:
    inside = sorted(part.name for part in folder.iterdir() if part.is_dir() and any(part.glob("*.safetensors")))
    return f"; there are some in {', '.join(inside)}: give one of these" if inside else ""
