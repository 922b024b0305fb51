"""Compiles every kernel for GPUs that are not here and reports what came out, one JSON row a kernel and target.

    python tests/kernels/aot.py [sm_90] [--whole] [--half]    (with the Triton on the path; no GPU, no interpreter)

Registers, stack and spills are read from the binary, instructions from its disassembly.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from randes_kernels.format import Stream, Transform
from randes_kernels.kernels.activation_side import activation_side_kernel
from randes_kernels.kernels.group import TILE_COLUMNS as GROUP_COLUMNS
from randes_kernels.kernels.group import TILE_ROWS as GROUP_ROWS
from randes_kernels.kernels.group import TILE_RUNS, group_kernel
from randes_kernels.kernels.retrieve import retrieve_kernel
from randes_kernels.kernels.route import route_kernel
from randes_kernels.kernels.superpose import TILE_COLUMNS, TILE_ROWS, superpose_kernel
from randes_kernels.kernels.transform import transform_arguments
from randes_kernels.kernels.weight_side import weight_side_kernel
from randes_kernels.packing import BITS, WHOLE_ROW, group_for
from randes_kernels.tiles import PACKED, TABLES, Tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HMMA|HGMMA", "gfx942": "v_mfma"}
WIDE_LOAD = {
    "sm_80": r"LDG\.E\.\S*128|LDGSTS\.E\.\S*128",
    "sm_90": r"LDG\.E\.\S*128|LDGSTS\.E\.\S*128|UTMALDG",
    "gfx942": r"(global|buffer)_load_(dwordx4|b128)",
}
N, K = 4096, 4096
FUSED = {"enable_fp_fusion": True}
DIVISIBLE = [["tt.divisibility", 16]]
MODELS = {"ids_ptr": "*i32", "keys_ptr": "*i64", "scale_ptr": "*fp32", "slots_ptr": "*i32", "order_ptr": "*i32"}
PLAIN = ("M", "models", "rows_per_id", "tensor_lo", "tensor_hi", "stride_ss", "rank", "first_in", "first_out", *MODELS)
"""What a launch does not specialise."""


def source(kernel: Any, types: dict[str, str], constants: dict[str, Any], plain: tuple[str, ...]) -> ASTSource:
    """The kernel as a launch at N = K = 4096 with contiguous tensors specialises it.

    ``plain``: arguments that are not multiples of 16, or that the kernel asks not to specialise.
    """
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(place,)] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, "i32")
            if name not in plain and signature[name] != "fp32":
                attributes[(place,)] = DIVISIBLE
    return ASTSource(kernel, signature, constexprs, attributes)


def options_of(tile: Tile) -> dict[str, Any]:
    """How a tile is compiled."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def activation_case(
    short: str, tile: Tile, *, turned: bool = False, transposed: bool = False, parts: int = 1, delta_only: bool = False,
    bits: float = 16, basis: bool = False, slots: bool = False, ragged: bool = False, origin: int = 0,
) -> tuple[str, Any, Any]:  # fmt: skip
    """The superposed linear on the activation side, as it is launched. origin: the kind of a shard's, on both sides."""
    constants = {
        "IN_STREAM": int(Stream.COLUMN_SIGNS), "OUT_STREAM": int(Stream.ROW_SIGNS),
        "FLIP_IN": not turned, "FLIP_OUT": not delta_only, "HAS_BASE": not delta_only, "TURNED": turned or delta_only,
        "HAS_BIAS": not transposed, "HAS_BIASES": not transposed, "HAS_BASIS": basis,
        "IN_ORIGIN": origin, "OUT_ORIGIN": origin, "ONE_SLOT": not slots, "WHOLE": not ragged,
        "BITS": bits, "GROUP": group_for(bits) or WHOLE_ROW, "PARTS": parts,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        **dict.fromkeys(("stride_wn", "stride_dn") if transposed else ("stride_wk", "stride_dk"), 1),
    }  # fmt: skip
    pointers = ("x_ptr", "turned_ptr", "weight_ptr", "delta_ptr", "steps_ptr", "inner_ptr", "own_ptr", "bias_ptr",
                "biases_ptr", "y_ptr")  # fmt: skip
    types = dict.fromkeys(pointers, f"*{short}") | MODELS | packed_types(bits)
    types |= {"parts_ptr": "*fp32" if parts > 1 else f"*{short}"}
    named = {"turned": turned, "transposed": transposed, "parts": parts > 1, "delta only": delta_only, "basis": basis,
             "slots": slots, "ragged": ragged, f"origin {origin}": origin > 0}  # fmt: skip
    modes = [f"{bits} bits"] * (bits < 16) + [name for name, on in named.items() if on]
    name = " ".join(["activation side", short, str(tuple(tile)), *modes])
    return name, source(activation_side_kernel, types, constants, PLAIN), options_of(tile)


def packed_types(bits: float) -> dict[str, str]:
    """Of a packed D and its steps; none of one that is not packed."""
    return {} if bits == 16 else {"delta_ptr": "*i8" if bits == 8 else "*u8", "steps_ptr": "*fp16"}


def weight_case(
    short: str, tile: Tile, *, bulk: bool, transposed: bool = False, grouped: bool = False, bits: float = 16,
    origin: int = 0,
) -> Any:  # fmt: skip
    """The superposed linear on the weight side, as it is launched."""
    constants = {
        "IN_STREAM": int(Stream.COLUMN_SIGNS), "OUT_STREAM": int(Stream.ROW_SIGNS), "FLIP_IN": True, "FLIP_OUT": True,
        "IN_ORIGIN": origin, "OUT_ORIGIN": origin, "TRANSPOSED": transposed, "BULK": bulk, "GROUPED": grouped,
        "HAS_BIAS": not transposed, "HAS_BIASES": not transposed, "BITS": bits, "GROUP": group_for(bits) or WHOLE_ROW,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "stride_xk": 1,
        **dict.fromkeys(("stride_wn", "stride_dn") if transposed else ("stride_wk", "stride_dk"), 1),
    }  # fmt: skip
    packed = packed_types(bits)
    words = packed.pop("delta_ptr", f"*{short}")
    pointers = ("x", "weight", "steps_ptr", "bias_ptr", "biases_ptr", "y_ptr")
    masks = dict.fromkeys(("in_masks_ptr", "out_masks_ptr"), "*i16")
    types = dict.fromkeys(pointers, f"*{short}") | MODELS | packed | masks | {"delta": words}
    plain = PLAIN
    if bulk:
        width = tile.k if bits >= 8 else tile.k * bits // 8
        blocks = {"x": (tile.m, width)}
        blocks |= dict.fromkeys(("weight", "delta"), (width, tile.n) if transposed else (tile.n, width))
        types |= {name: f"tensordesc<{types[name][1:]}[{rows}, {columns}]>" for name, (rows, columns) in blocks.items()}
        plain = (*PLAIN, *blocks)
    modes = [f"{bits} bits"] * (bits < 16)
    named = ("bulk", bulk), ("transposed", transposed), ("grouped", grouped), (f"origin {origin}", origin > 0)
    modes += [name for name, on in named if on]
    name = " ".join(["weight side", short, str(tuple(tile)), *modes])
    return name, source(weight_side_kernel, types, constants, plain), options_of(tile)


def transform_cases(short: str, transform: Transform) -> Iterator[tuple[str, Any, Any]]:
    """Superpose and retrieve under one transform."""
    constants = transform_arguments(transform, K).constants | {"BLOCK_N": TILE_ROWS, "BLOCK_K": TILE_COLUMNS}
    mode = " permuted" if transform.granule else " origin" if transform.first_row else ""
    plain = ("key_lo", "key_hi", "tensor_lo", "tensor_hi", "bits", "segment", "origin_row", "origin_column")
    granule = {"granule": 1} if transform.granule else {"granule": 1, "width": 1, "bits": 1}
    types = {"accumulator_ptr": "*i32", "finetuned_ptr": f"*{short}", "base_ptr": f"*{short}", "rate": "fp32"}
    built = source(superpose_kernel, types, constants | granule | {"SUBTRACT": False}, plain)
    yield f"superpose {short}{mode}", built, {"enable_fp_fusion": False}
    types = {"out_ptr": f"*{short}", "base_ptr": f"*{short}", "delta_ptr": "*i16", "scale": "fp32"}
    yield f"retrieve {short}{mode}", source(retrieve_kernel, types, constants | granule, plain), FUSED


def route_case(
    short: str, *, back: bool = False, permuted: bool = True, scaled: bool = False, origin: int = 0
) -> tuple[str, Any, Any]:
    """Turning activations, there or back."""
    constants = {
        "STREAM": int(Stream.DIAGONAL if scaled else Stream.COLUMN_SIGNS),
        "PERMUTATION": int(Stream.COLUMN_PERMUTATION),
        "BACK": back,
        "FLIP": not scaled,
        "SCALED": scaled,
        "PERMUTED": permuted,
        "SEGMENTS": 1,
        "ORIGIN": origin,
        "BLOCK_K": TILE_COLUMNS,
        "stride_xk": 1,
        "granule": 1,
        **({} if permuted else {"width": 1, "bits": 1}),
    }
    types = {"x_ptr": f"*{short}", "turned_ptr": f"*{short}", "reciprocals_ptr": "*fp32", **MODELS}
    plain = ("models", "rows_per_id", "tensor_lo", "tensor_hi", "bits", "segment", "origin", *MODELS)
    named = ("back", back), ("permuted", permuted), ("scaled", scaled), (f"origin {origin}", origin > 0)
    modes = [name for name, on in named if on]
    name = " ".join(["route", short, *modes])
    return name, source(route_kernel, types, constants, plain), {"num_warps": 1} | FUSED


def finishing_cases() -> Iterator[tuple[str, Any, Any]]:
    """The kernel before the products: rows put in order."""
    types = {"x_ptr": "*fp16", "grouped_ptr": "*fp16", "grouped_ids_ptr": "*i32", **MODELS}
    constants = {"BLOCK_M": GROUP_ROWS, "BLOCK_RUNS": TILE_RUNS, "BLOCK_K": GROUP_COLUMNS, "stride_xk": 1}
    yield "group fp16", source(group_kernel, types, constants, ("M", "runs", "rows_per_id", *MODELS)), FUSED


def activation_cases(table: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The activation side in every tile of a table and every mode that may meet it."""
    for width, dtypes in (("half", ("fp16", "bf16")), ("fp32", ("fp32",))):
        for entry in table["activation_side"][width]:
            tile = Tile(*entry["tile"])
            turned = entry["turn_first"]
            yield activation_case(dtypes[0], tile, transposed=True, delta_only=True)  # a permuted backward pass
            yield activation_case(dtypes[0], tile, turned=True)  # what a permutation turns is turned with any tile
            yield activation_case(dtypes[0], tile, turned=turned, transposed=True)
            yield activation_case(dtypes[0], tile, turned=turned, slots=True, ragged=True)
            yield activation_case(dtypes[-1], tile, turned=turned, parts=4)
            yield activation_case(dtypes[-1], tile, turned=turned, parts=4, origin=2)
            if tile.m == 16 and width == "half":  # fp32 adds a shared basis afterwards
                yield activation_case(dtypes[-1], tile, turned=turned, basis=True, slots=True)


def weight_tiles(numbers: dict[str, Any]) -> list[Tile]:
    """The tiles of the weight side, the largest first."""
    return [Tile(*entry["tile"]) for entry in (numbers, *numbers["smaller"])]


def weight_cases(table: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The weight side in the tiles of a table and every mode that may meet them."""
    numbers = table["weight_side"]["half"]
    for tile, transposed in product(weight_tiles(numbers), (False, True)):
        yield weight_case("bf16", tile, bulk=numbers["bulk"], transposed=transposed)
        yield weight_case("fp16", tile, bulk=numbers["bulk"], transposed=transposed, grouped=True)
        if not transposed:
            yield weight_case("bf16", tile, bulk=numbers["bulk"], origin=2)


def packed_cases(table: dict[str, Any], default: dict[str, Any], *, whole: bool) -> Iterator[tuple[str, Any, Any]]:
    """Both sides with D in few bits. 4, 2 and 1 differ in their planes alone: of 2 and less only the ends of a table.

    Of half a bit no descriptor describes tiles, and the weight side takes those of the ``default`` table.
    ``whole``: every mode, which minutes of tests have room for on one target; else every tile.
    """
    for bits in BITS if whole else (8, 4):
        kind = PACKED[bits]
        entries = table["activation_side"]["half" + kind]
        for entry in entries if bits > 2 else (entries[0], entries[-1]):
            tile, turned = Tile(*entry["tile"]), entry["turn_first"]
            yield activation_case("bf16", tile, turned=turned, bits=bits, parts=4)
            if whole and bits == 4:
                yield activation_case("bf16", tile, turned=turned, bits=bits, parts=4, origin=2)
            yield activation_case("bf16", tile, turned=turned, bits=bits, slots=True, ragged=True)
        if bits > 2:
            for tile in {Tile(*entry["tile"]) for entry in table["activation_side"]["fp32" + kind]}:
                yield activation_case("fp32", tile, bits=bits)
        numbers = table["weight_side"]["half" + kind]
        if bits < 1 and numbers["bulk"]:
            numbers = default["weight_side"]["half" + kind]
        for tile in weight_tiles(numbers)[: 1 if bits < 1 else None]:
            yield weight_case("bf16", tile, bulk=numbers["bulk"], bits=bits)
        if not whole:
            continue
        tile = Tile(*entries[0]["tile"])
        yield activation_case("fp16", tile, turned=True, bits=bits)  # as a permutation does
        yield weight_case("fp16", Tile(*numbers["tile"]), bulk=numbers["bulk"], bits=bits, grouped=True)
        if bits == 4:
            yield activation_case("bf16", tile, bits=bits, basis=True)


def cases(target: str, *, whole: bool = False) -> dict[str, tuple[Any, Any]]:
    """Every kernel in every mode and tile that a launch on ``target`` may choose: name to source and options."""
    found: list[tuple[str, Any, Any]] = [*finishing_cases()]
    tables = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(TABLES.glob("*.json"))}
    own = [table for name, table in tables.items() if name.startswith(target)]
    for table in own or [tables["default"]]:
        found += [
            *activation_cases(table),
            *weight_cases(table),
            *packed_cases(table, tables["default"], whole=whole or target == "sm_90"),
        ]
    found += weight_cases(tables["default"])  # for operands that no descriptor describes
    for short in ("fp16", "fp32"):
        for transform in (Transform(), Transform(granule=1), Transform(first_row=37, first_column=37)):
            found += transform_cases(short, transform)
    found += [route_case("fp16"), route_case("fp16", back=True), route_case("fp16", permuted=False)]
    found += [route_case("fp16", permuted=False, origin=2)]
    found += [route_case("bf16", permuted=False, scaled=True)]
    return {name: (built, options) for name, built, options in found}


def dump(what: str, file: str) -> str:
    """The binary, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, what, file], check=True, capture_output=True, text=True).stdout


def inner_loop(assembly: str) -> list[str]:
    """What a warp issues for one step along K: the instructions of the innermost loop with a product in it.

    Empty where the disassembly is not NVIDIA's, or no loop multiplies.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;/]+);", assembly)
    found = []
    for place, (at, text) in enumerate(lines):
        back = re.match(r"BRA\S*\s+(?:U?P\d+,\s*)?0x([0-9a-f]+)", text.strip())
        if back is None or int(back[1], 16) >= int(at, 16):
            continue
        start = next(i for i, (address, _) in enumerate(lines) if int(address, 16) >= int(back[1], 16))
        body = [inside.strip() for _, inside in lines[start : place + 1]]
        if any(re.match(r"(HGMMA|HMMA|FFMA)", inside) for inside in body):
            found.append(body)
    return min(found, key=len, default=[])


def machine_code(target: str, binary: Any) -> tuple[str, str]:
    """The disassembly of a compiled kernel, and what the tool says of its registers, which AMD's says in the former."""
    if target == "gfx942":
        return binary.asm["amdgcn"], ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return dump("-sass", file.name), dump("-res-usage", file.name)


def report(target: str, binary: Any, code: tuple[str, str] | None = None) -> dict[str, Any]:
    """Registers, local memory and instructions of one compiled kernel. ``code``: its ``machine_code``, where known."""
    assembly, usage = code or machine_code(target, binary)
    if target == "gfx942":
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
        # Scalar registers spill into lanes of vector registers: those are counted with the rest, and not memory.
        spills = numbers["vgpr_spill_count"]
        registers, local = numbers["vgpr_count"], numbers["private_segment_fixed_size"]
    else:
        registers, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
        spills = len(re.findall(r"\b(LDL|STL)\b", assembly))
    loop = inner_loop(assembly)
    return {
        "registers": registers,
        "local_bytes": local,
        "spills": spills,
        "shared_bytes": binary.metadata.shared,
        "loop_instructions": len(loop),
        "loop_barriers": sum(text.startswith("BAR") for text in loop),
        "loop_stores": sum(text.startswith("STS") for text in loop),
        "matrix_instructions": len(re.findall(MATRIX_INSTRUCTION[target], assembly)),
        # HGMMA whose left operand is a register and not a descriptor of shared memory.
        "register_operands": len(re.findall(r"HGMMA\.\S+ R\d+, R\d+, gdesc", assembly)),
        "bulk_copies": len(re.findall("UTMALDG", assembly)),
        "wide_loads": len(re.findall(WIDE_LOAD[target], assembly)),
        "fused_multiply_adds": len(re.findall(r"\bFFMA\b|v_fma_f32|v_fmac_f32|v_pk_fma_f32", assembly)),
    }


def main() -> None:
    whole, half = "--whole" in sys.argv, "--half" in sys.argv
    for target in [name for name in sys.argv[1:] if name in TARGETS] or TARGETS:
        for place, (name, (built, options)) in enumerate(cases(target, whole=whole).items()):
            if half and place % 2 and name.startswith(("activation", "weight")) and "1 bits bulk grouped" not in name:
                continue
            binary = triton.compile(built, target=TARGETS[target], options=dict(options))
            row = {"kernel": name, "target": target, "triton": triton.__version__, **report(target, binary)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
