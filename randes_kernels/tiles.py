"""Which path and which tile a launch uses: a pure function of shape, mix and device, never tuned at run time.

The numbers are data: ``tables/<device>.json``, one file a device that was measured
(``bench/speed/tune.py`` writes them), else one for its architecture, else ``default.json``.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLES = Path(__file__).parent / "tables"

PACKED = {16: "", 8: "_8", 4: "_4", 2: "_4", 1: "_4", 0.5: "_4"}
"""What follows the width of x in a table's keys, by the bits of D."""

WARPS = 8
"""What a multiprocessor should have at least, so that some of them issue where others wait."""


class Tile(NamedTuple):
    """Rows, columns and depth of a program's tile, its warps, and the stages of its load pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """What one call launches.

    ``path``: ``"activation side"`` (two products, for any mix) or ``"weight side"`` (one product with a rebuilt tile).
    ``parts``, ``turn_first``: on the activation side, how many spans K is split into, and whether rows are flipped by
    a kernel of their own instead of inside the product.
    ``grouped``, ``bulk``: on the weight side, whether rows are first brought into the order of their models, and
    whether tiles are read by the bulk copies of tensor descriptors.
    """

    path: str
    tile: Tile
    parts: int = 1
    turn_first: bool = False
    grouped: bool = False
    bulk: bool = False


@lru_cache
def table(device: str) -> dict[str, Any]:
    """The numbers for a device, by its name as ``device_name`` gives it: the most particular file that exists."""
    for name in (device, device.partition("/")[0], "default"):
        path = TABLES / f"{name.replace('/', '-')}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    raise FileNotFoundError(f"no table of tiles in {TABLES}")


@lru_cache
def device_name(index: int) -> str:
    """Of a GPU: architecture and product, ``"sm_90/nvidia-h200"``; ``"default"`` where there is none."""
    if not torch.cuda.is_available():
        return "default"
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        architecture = properties.gcnArchName.partition(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return f"{architecture}/{properties.name.lower().replace(' ', '-')}"


@lru_cache(maxsize=4096)
def linear_plan(
    m: int, n: int, k: int, dtype: torch.dtype, *, runs: int = 1, models: int = 1, turned: bool = False,
    aligned: bool = True, bits: float = 16, device: str = "default",
) -> Plan:  # fmt: skip
    """The plan of a superposed linear ``(m, k) x (n, k)``.

    ``runs``: equal runs of rows, each of one model. ``models``: how many there are. ``turned``: whether columns are
    permuted, which the weight side does not do. ``aligned``: whether tensor descriptors may describe the operands.
    ``bits``: of an element of D; with fewer than 8 a tile is as deep as a span of packed columns.
    The weight side runs one product for each model in a tile of rows,
    the activation side two whatever they are, so the most products that the mix can need decide between them.
    """
    numbers = table(device)
    width = ("fp32" if dtype.itemsize > 2 else "half") + PACKED[bits]
    weight_side = numbers["weight_side"][width]
    if weight_side is not None and weight_side["bulk"] and not aligned:
        weight_side = table("default")["weight_side"][width]
    if weight_side is not None and bits < 1:  # smaller tiles spill there with Triton 3.6
        weight_side = {name: value for name, value in weight_side.items() if name != "smaller"}
    activation_side = _activation_plan(m, n, k, width, numbers)
    if weight_side is not None and not turned and m >= weight_side["from_rows"]:
        tile = _weight_tile(m, n, weight_side, numbers["multiprocessors"])
        tiles = -(-m // tile.m)
        grouped = runs > 1 and m // runs < tile.m
        changes = min(runs - 1, models) if grouped else runs - 1
        # A chip that three quarters of would lie idle is better filled with parts of K, though they are two products.
        programs = programs_of(m, n, tile)
        idle = "smaller" in weight_side and 4 * programs < numbers["multiprocessors"]
        idle = idle and programs_of(m, n, activation_side.tile) * activation_side.parts > programs
        if tiles + changes <= weight_side["products"] * tiles and not idle:
            return Plan("weight side", tile, grouped=grouped, bulk=weight_side["bulk"])
    return activation_side


def programs_of(m: int, n: int, tile: Tile) -> int:
    """How many programs a tile makes of y. (Triton's ``cdiv`` takes 2 µs of the host a call.)"""
    return -(-m // tile.m) * -(-n // tile.n)


def _weight_tile(m: int, n: int, side: dict[str, Any], multiprocessors: int) -> Tile:
    """The tile that is done first: waves of programs, one a multiprocessor, times cycles a column of K."""

    def time(entry: dict[str, Any]) -> float:
        tile = Tile(*entry["tile"])
        cycles: float = entry["cycles"] / tile.k
        return -(-programs_of(m, n, tile) // multiprocessors) * cycles

    classes = [side, *side.get("smaller", ())]
    return Tile(*(min(classes, key=time) if len(classes) > 1 else side)["tile"])


def _activation_plan(m: int, n: int, k: int, width: str, numbers: dict[str, Any]) -> Plan:
    # One row tile covers a decode batch, so that each weight byte is read once.
    classes = numbers["activation_side"][width]
    chosen = next(entry for entry in classes if m <= entry["rows"] or entry is classes[-1])
    tile = Tile(*chosen["tile"])
    return Plan("activation side", tile, _parts(programs_of(m, n, tile), tile.warps, k, numbers), chosen["turn_first"])


def rows_of_plans(
    n: int, k: int, dtype: torch.dtype, *, models: int, turned: bool = False, bits: float = 16, device: str = "default",
    most: int = 8192,
) -> list[int]:  # fmt: skip
    """Numbers of rows up to ``most`` that meet every plan of a layer, with all rows one model's and a model each."""
    first: dict[tuple[Plan, bool], int] = {}
    for m in range(1, most + 1):
        for runs in {1, m}:
            plan = linear_plan(m, n, k, dtype, runs=runs, models=models, turned=turned, bits=bits, device=device)
            first.setdefault((plan, runs > 1), m)
    return sorted(set(first.values()))


def _parts(programs: int, warps: int, k: int, numbers: dict[str, Any]) -> int:
    """How many spans of K fill the chip, none of them so short that summing them costs more than it gains."""
    parts = 1
    while (
        parts * 2 * programs * warps <= numbers["multiprocessors"] * WARPS
        and parts < numbers["most_parts"]
        and k // (parts * 2) >= numbers["shortest_part"]
    ):
        parts *= 2
    return parts
