"""The choice of path and tile: pure, few, data, and of sizes that the primitives can make signs for."""

import json
import math
from collections.abc import Iterable
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from randes_kernels import tiles
from randes_kernels.tiles import Plan, Tile, linear_plan, rows_of_plans

LAYERS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (48, 40), (1, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["default", "sm_80/nvidia-a100", "sm_90/nvidia-h200", "gfx942/instinct", "sm_999/of-the-future"]
HALF = torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_arguments_always_give_the_same_plan(dtype: torch.dtype) -> None:
    first = {(m, layer): linear_plan(m, *layer, dtype) for m in (1, 17, 64, 4096) for layer in LAYERS}
    linear_plan.cache_clear()
    again = {(m, layer): linear_plan(m, *layer, dtype) for m in (4096, 64, 17, 1) for layer in reversed(LAYERS)}
    assert first == again
    assert all(isinstance(plan, Plan) for plan in first.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", range(1, 65))
def test_a_decode_batch_is_one_row_tile_of_the_activation_side(m: int, device: str) -> None:
    for layer in LAYERS:
        plan = linear_plan(m, *layer, HALF, runs=m, models=64, device=device)
        assert plan.path == "activation side"
        assert plan.tile.m >= m
        assert not plan.turn_first  # a copy of x would be one launch more


@pytest.mark.parametrize("path", sorted(tiles.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_sizes_are_what_matrix_instructions_and_sign_blocks_allow(path: Path) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    classes = [entry for width in table["activation_side"].values() for entry in width]
    for rows in table["activation_side"].values():
        assert all(one["rows"] < other["rows"] for one, other in pairwise(rows))
        assert all(Tile(*one["tile"]).m <= Tile(*other["tile"]).m for one, other in pairwise(rows))
    for side in filter(None, table["weight_side"].values()):
        sizes = [math.prod(entry["tile"][:2]) for entry in (side, *side["smaller"])]
        assert sizes == sorted(sizes, reverse=True)
        classes += [side, *side["smaller"]]
    for entry in classes:
        tile = Tile(*entry["tile"])
        assert tile.m in (16, 32, 64, 128, 256)
        assert tile.n in (32, 64, 128)  # tile_signs: one Philox block a key
        assert tile.k in (32, 64, 128)
        assert tile.warps in (1, 2, 4, 8)
        assert tile.stages >= 1


@pytest.mark.parametrize("device", DEVICES)
def test_few_classes_cover_every_batch_and_change_path_once(device: str) -> None:
    for layer in LAYERS:
        plans = [linear_plan(m, *layer, HALF, device=device) for m in range(1, 8193)]
        assert len({(plan.path, plan.tile) for plan in plans}) <= 7
        assert sum(one.path != other.path for one, other in pairwise(plans)) == 1
        assert plans[-1].path == "weight side"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_warming_up_meets_every_plan(device: str, dtype: torch.dtype) -> None:
    for n, k in ((4096, 4096), (1024, 4096), (512, 18944)):

        def met(rows: Iterable[int], n: int = n, k: int = k) -> set[tuple[Plan, bool]]:
            mixes = [(m, runs) for m in rows for runs in {1, m}]
            return {(linear_plan(m, n, k, dtype, runs=runs, models=8, device=device), runs > 1) for m, runs in mixes}

        rows = rows_of_plans(n, k, dtype, models=8, device=device, most=4096)
        assert len(rows) <= 16
        assert met(rows) == met(range(1, 4097))


PREFILLED = [(1024, 4096), *LAYERS[:4], (768, 768), (3072, 768), (768, 3072)]
"""Of an 8B Llama, and of a ViT-B."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_prefill_leaves_no_more_of_the_chip_idle_than_its_smallest_tile_would(device: str, bits: int) -> None:
    chip, side = tiles.table(device)["multiprocessors"], tiles.table(device)["weight_side"]["half" + tiles.PACKED[bits]]
    smallest = Tile(*side["smaller"][-1]["tile"])
    for (n, k), m in product(PREFILLED, [64 * i for i in range(2, 33)] + [197, 394, 3152, 4096, 8192]):
        plan = linear_plan(m, n, k, HALF, bits=bits, device=device)
        programs = math.ceil(m / plan.tile.m) * math.ceil(n / plan.tile.n) * plan.parts
        possible = math.ceil(m / smallest.m) * math.ceil(n / smallest.n)
        assert programs >= min(chip / 4, possible), (m, n, k, plan)


def test_a_prefill_takes_the_tile_that_is_done_first() -> None:
    # Waves of 132 programs times cycles a column: 2 × 21 against 4 × 14, 1 × 21 against 1 × 14, 1 × 14 against 1 × 10.
    rows = {2048: (256, 128), 512: (128, 128), 128: (64, 64)}
    for m, size in rows.items():
        assert linear_plan(m, 4096, 4096, HALF, device="sm_90/nvidia-h200").tile[:2] == size


def test_few_columns_are_filled_with_parts_of_the_depth() -> None:
    plan = linear_plan(128, 1024, 4096, HALF, device="sm_90/nvidia-h200")
    assert (plan.path, plan.parts) == ("activation side", 4)
    assert linear_plan(256, 1024, 4096, HALF, device="sm_90/nvidia-h200").path == "weight side"


def test_fp16_and_bf16_share_their_plans() -> None:
    for m in range(1, 300):
        assert linear_plan(m, 4096, 4096, torch.float16) == linear_plan(m, 4096, 4096, torch.bfloat16)


def test_a_permutation_and_fp32_stay_on_the_activation_side() -> None:
    assert linear_plan(4096, 4096, 4096, HALF, turned=True).path == "activation side"
    assert linear_plan(4096, 4096, 4096, torch.float32).path == "activation side"


def test_a_mix_that_needs_more_products_than_two_a_tile_stays_on_the_activation_side() -> None:
    for runs, models, path in ((1, 64, "weight"), (8, 64, "weight"), (2048, 4, "weight"), (2048, 64, "activation")):
        assert linear_plan(2048, 4096, 4096, HALF, runs=runs, models=models).path == f"{path} side"


def test_rows_are_grouped_where_a_tile_holds_several_runs() -> None:
    tile = linear_plan(8192, 4096, 4096, HALF).tile
    assert tile == linear_plan(8192, 4096, 4096, HALF, runs=8192, models=4).tile
    assert not linear_plan(8192, 4096, 4096, HALF).grouped
    assert not linear_plan(8192, 4096, 4096, HALF, runs=8192 // tile.m, models=4).grouped
    assert linear_plan(8192, 4096, 4096, HALF, runs=8192, models=4).grouped


def test_operands_that_no_descriptor_describes_take_the_default_tile() -> None:
    bulk = linear_plan(4096, 4096, 4096, HALF, device="sm_90/nvidia-h200")
    plain = linear_plan(4096, 4096, 4095, HALF, device="sm_90/nvidia-h200", aligned=False)
    assert bulk.bulk
    assert not plain.bulk
    assert plain == linear_plan(4096, 4096, 4095, HALF)


@pytest.mark.parametrize("device", DEVICES)
def test_the_depth_is_split_only_where_columns_leave_the_chip_empty(device: str) -> None:
    chip = tiles.table(device)["multiprocessors"]
    for n in (32, 256, 1024, 4096, 28672):
        for k in (64, 1024, 4096, 18944):
            plan = linear_plan(8, n, k, HALF, device=device)
            programs = math.ceil(n / plan.tile.n)
            wanted = chip * tiles.WARPS // plan.tile.warps
            if plan.parts > 1:
                assert programs * plan.parts <= wanted
                assert k // plan.parts >= 1024
            else:
                assert 2 * programs > wanted or k < 2048
    assert linear_plan(8, 256, 18944, HALF, device=device).parts > 1


def test_a_measured_device_has_a_table_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, chip in (("default", 1), ("sm_90", 2), ("sm_90-nvidia-h200", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"multiprocessors": chip}))
    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    tiles.table.cache_clear()
    try:
        for device, chip in (("sm_90/nvidia-h200", 3), ("sm_90/nvidia-h100", 2), ("gfx942/instinct", 1)):
            assert tiles.table(device)["multiprocessors"] == chip
    finally:
        tiles.table.cache_clear()


def test_where_there_is_no_gpu_the_default_is_planned_for() -> None:
    if not torch.cuda.is_available():
        assert tiles.device_name(0) == "default"


def test_half_a_bit_takes_the_largest_tile_however_few_rows_there_are() -> None:
    for device in ("default", "sm_90", "gfx942"):
        plans = {
            linear_plan(m, 640, 640, torch.bfloat16, bits=0.5, aligned=False, device=device) for m in (128, 512, 4096)
        }
        tiles = {plan.tile for plan in plans if plan.path == "weight side"}
        assert len(tiles) == 1
