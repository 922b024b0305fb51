"""Eight fine-tuned CLIP ViT-B/32 image encoders in one store: the setting of the RanDeS paper (arXiv 2505.11204).

    python -m pip install -c constraints.txt -e '.[demo,transformers]'
    python examples/clip_vit.py --out clip                          downloads the checkpoints, about 3.4 GB
    python examples/clip_vit.py --out clip --checkpoints FOLDER     reads FOLDER/base, FOLDER/sun397, ...: no network

The fine-tunes are FusionBench's on the Hugging Face hub. Only safetensors are read. For every fine-tune it prints how
far its outputs on sixteen real pictures are from the original's, served in one mixed batch, beside how far the base's
are. It has been tested on small random encoders only: neither the accuracy on the eight data sets nor the speed on
these checkpoints has been measured here. FusionBench has the zero-shot evaluation; ``Superposition.retrieve`` gives it
plain weights.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import randes

BASE = "openai/clip-vit-base-patch32"
TASKS = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
PAPER = randes.Config(signs="columns", shuffle_layers=-1)
MEAN, DEVIATION = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)  # of the pictures that CLIP was trained on
PICTURES = 16


class Row(NamedTuple):
    """Distances of pooled outputs, as shares of the size of the fine-tune's own: of the base and the served model
    from that, and of retrieved weights from the served model."""

    model: str
    base: float
    served: float
    retrieved: float


def sources(folder: Path | None) -> tuple[str, dict[str, str]]:
    """Where the base and the fine-tunes are: on the hub, or the folder's subfolders.

    Raises ``ValueError`` for a folder without ``base`` or without fine-tunes.
    """
    if folder is None:
        return BASE, {task: f"tanganke/clip-vit-base-patch32_{task}" for task in TASKS}
    found = {path.parent.name: str(path.parent) for path in sorted(folder.glob("*/config.json"))}
    base = found.pop("base", None)
    if base is None or not found:
        raise ValueError(f"checkpoints must hold a folder 'base' and one for each fine-tune, got {folder}: {[*found]}")
    return base, found


def load(source: str) -> nn.Module:
    """An image encoder. Raises ``ConnectionError`` where it is on the hub, and that cannot be reached."""
    try:
        encoder: nn.Module = transformers.CLIPVisionModel.from_pretrained(source, use_safetensors=True)
    except OSError as error:
        if Path(source).is_dir():
            raise
        raise ConnectionError(
            f"{source} could not be downloaded ({error}).\nWhere there is a network, for the base and each fine-tune:"
            f" hf download {source} --local-dir FOLDER/base\nthen give that here: --checkpoints FOLDER"
        ) from error
    return encoder.eval()


def pictures(size: int) -> Tensor:
    """Crops of two photographs that scikit-learn brings: (PICTURES, 3, size, size), normalised as CLIP's inputs."""
    crops = []
    generator = torch.Generator().manual_seed(0)
    for photograph in load_sample_images().images:
        pixels = torch.tensor(photograph).permute(2, 0, 1) / 255
        for _ in range(PICTURES // 2):
            top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in pixels.shape[1:])
            crops.append(pixels[:, top : top + size, left : left + size])
    return (torch.stack(crops) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


@torch.no_grad()
def outputs(encoder: nn.Module, images: Tensor, **names: Any) -> Tensor:
    """Pooled outputs, (count, width)."""
    pooled: Tensor = encoder(pixel_values=images, **names).pooler_output
    return pooled


def superpose(
    base: nn.Module, finetuned: Mapping[str, str], config: randes.Config, images: Tensor, step: Callable[[], None]
) -> tuple[randes.Superposition, dict[str, Tensor]]:
    """All fine-tunes superposed, one in memory at a time, and what each answers on its own."""
    superposition = randes.Superposition.create(base, config)
    own = {}
    for name, source in finetuned.items():
        encoder = load(source)
        own[name] = outputs(encoder, images)
        superposition.add(name, encoder)
        step()
    return superposition, own


def check(store: Path, base: nn.Module, own: Mapping[str, Tensor], images: Tensor) -> list[Row]:
    """The store's fine-tunes on all images: one mixed batch of every model and image, and retrieved one by one."""
    names = list(own)
    served = randes.from_pretrained(store)
    # Image after image, so that neighbouring rows belong to different models.
    together = images.repeat_interleave(len(names), 0)
    mixed = outputs(served, together, adapter_names=names * len(images)).unflatten(0, (len(images), len(names)))
    plain, superposition = copy.deepcopy(base), randes.Superposition.load(store)
    before = outputs(base, images)
    rows = []
    for place, name in enumerate(names):
        plain.load_state_dict(superposition.retrieve(name))
        size = own[name].norm()
        base_away, served_away = (float((y - own[name]).norm() / size) for y in (before, mixed[:, place]))
        rows.append(Row(name, base_away, served_away, float((outputs(plain, images) - mixed[:, place]).norm() / size)))
    return rows


def run(folder: Path | None, out: Path, config: randes.Config) -> tuple[list[Row], randes.Superposition]:
    """Load, superpose, save the store to ``out``, and serve from it."""
    where, finetuned = sources(folder)
    with Progress() as bars:
        bar = bars.add_task("loading and superposing", total=1 + len(finetuned))
        base: Any = load(where)
        bars.advance(bar)
        images = pictures(base.config.image_size)
        superposition, own = superpose(base, finetuned, config, images, lambda: bars.advance(bar))
    superposition.save(out)
    return check(out, base, own, images), superposition


def print_table(rows: list[Row], sizes: Any, console: Console) -> None:
    """Distances in %, and bytes."""
    shown = Table(title="Distance from the fine-tune's own outputs, in % of their size")
    for column in ("model", "base", "served in one mixed batch", "retrieved, from served"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        shown.add_row(row.model, f"{100 * row.base:.1f}", f"{100 * row.served:.1f}", f"{100 * row.retrieved:.4f}")
    console.print(shown)
    console.print(f"{len(rows)} models {sizes.separate_models / 1e6:.0f} MB; store {sizes.total / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a new folder for the store; a temporary one by default")
    parser.add_argument("--checkpoints", type=Path, help="a folder with the checkpoints, instead of the hub")
    parser.add_argument("--paper", action="store_true", help="layer shuffle and column signs, as in the paper")
    given = parser.parse_args()
    if given.out is not None and given.out.exists():
        parser.error(f"--out must be a new folder, got {given.out}, which exists")
    transformers.logging.disable_progress_bar()  # its bars for every file break ours
    with tempfile.TemporaryDirectory() as scratch:
        try:
            out = given.out or Path(scratch) / "store"
            rows, superposition = run(given.checkpoints, out, PAPER if given.paper else randes.Config())
        except (ConnectionError, ValueError) as error:
            parser.exit(1, f"{error}\n")
    print_table(rows, superposition.sizes, Console())


if __name__ == "__main__":
    main()
