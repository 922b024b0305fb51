"""Compiles every kernel for GPUs that are not here and reports what came out, one JSON row a kernel and target.

    python tests/aot.py            (with the Triton on the path; no GPU, no interpreter)

Registers, stack and spills are read from the binary, instructions from its disassembly.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from randes_kernels.format import Stream, Transform
from randes_kernels.kernels.linear import superposed_linear_kernel
from randes_kernels.kernels.retrieve import retrieve_kernel
from randes_kernels.kernels.route import route_kernel
from randes_kernels.kernels.superpose import TILE_COLUMNS, TILE_ROWS, superpose_kernel
from randes_kernels.kernels.transform import transform_arguments
from randes_kernels.tiles import linear_tile

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
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MODELS = {"ids_ptr": "*i32", "keys_ptr": "*i64", "scale_ptr": "*fp32", "slots_ptr": "*i32"}


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


def linear_case(short: str, m: int, *, permuted: bool = False, transposed: bool = False) -> tuple[str, Any, Any]:
    """The superposed linear as it is launched for m rows."""
    tile = linear_tile(m, N, K, DTYPES[short])
    contiguous = "stride_wn", "stride_dn"
    strided = "stride_wk", "stride_dk"
    constants = {
        "IN_STREAM": int(Stream.COLUMN_SIGNS), "OUT_STREAM": int(Stream.ROW_SIGNS),
        "FLIP_IN": not permuted, "FLIP_OUT": not (permuted and transposed), "HAS_BASE": not (permuted and transposed),
        "HAS_BIAS": not transposed, "HAS_BIASES": not transposed,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "stride_xk": 1, "stride_tk": 1,
        **dict.fromkeys(contiguous if transposed else strided, 1),
    }  # fmt: skip
    pointers = ("x_ptr", "turned_ptr", "weight_ptr", "delta_ptr", "bias_ptr", "biases_ptr", "y_ptr")
    types = dict.fromkeys(pointers, f"*{short}") | MODELS
    plain = ("M", "models", "rows_per_id", "tensor_lo", "tensor_hi", *MODELS)
    name = f"linear {short} m={m}{' permuted' if permuted else ''}{' transposed' if transposed else ''}"
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return name, source(superposed_linear_kernel, types, constants, plain), options


def transform_cases(short: str, transform: Transform) -> Iterator[tuple[str, Any, Any]]:
    """Superpose and retrieve under one transform."""
    constants = transform_arguments(transform, K).constants | {"BLOCK_N": TILE_ROWS, "BLOCK_K": TILE_COLUMNS}
    mode = " permuted" if transform.granule else ""
    plain = ("key_lo", "key_hi", "tensor_lo", "tensor_hi", "bits")
    granule = {"granule": 1} if transform.granule else {"granule": 1, "width": 1, "bits": 1}
    types = {"accumulator_ptr": "*i32", "finetuned_ptr": f"*{short}", "base_ptr": f"*{short}", "rate": "fp32"}
    built = source(superpose_kernel, types, constants | granule | {"SUBTRACT": False}, plain)
    yield f"superpose {short}{mode}", built, {"enable_fp_fusion": False}
    types = {"out_ptr": f"*{short}", "base_ptr": f"*{short}", "delta_ptr": "*i16", "scale": "fp32"}
    yield f"retrieve {short}{mode}", source(retrieve_kernel, types, constants | granule, plain), FUSED


def route_case(short: str, *, back: bool) -> tuple[str, Any, Any]:
    """Permuting activations, there or back."""
    constants = {
        "BACK": back,
        "FLIP_COLUMNS": True,
        "SEGMENTS": 1,
        "BLOCK_K": TILE_COLUMNS,
        "granule": 1,
        "stride_xk": 1,
    }
    types = {"x_ptr": f"*{short}", "turned_ptr": f"*{short}", **MODELS}
    plain = ("models", "rows_per_id", "tensor_lo", "tensor_hi", "bits", *MODELS)
    name = f"route {short}{' back' if back else ''}"
    return name, source(route_kernel, types, constants, plain), {"num_warps": 1} | FUSED


def cases() -> Iterator[tuple[str, Any, Any]]:
    """Every kernel in every mode and tile that a launch chooses, as (name, source, options)."""
    for m in (16, 32, 64, 2048):
        yield linear_case("fp16", m)
        yield linear_case("fp16", m, permuted=True)
        yield linear_case("fp16", m, transposed=True)
    yield linear_case("bf16", 16)
    yield linear_case("bf16", 2048)
    yield linear_case("fp16", 64, permuted=True, transposed=True)
    yield linear_case("fp32", 16)
    yield linear_case("fp32", 64)
    yield linear_case("fp32", 64, transposed=True)
    for short in ("fp16", "fp32"):
        for transform in (Transform(), Transform(granule=1)):
            yield from transform_cases(short, transform)
    yield route_case("fp16", back=False)
    yield route_case("fp16", back=True)


def dump(what: str, file: str) -> str:
    """The binary, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, what, file], check=True, capture_output=True, text=True).stdout


def report(target: str, binary: Any) -> dict[str, Any]:
    """Registers, local memory and instructions of one compiled kernel."""
    if target == "gfx942":
        assembly = binary.asm["amdgcn"]
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
        spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
        registers, local = numbers["vgpr_count"], numbers["private_segment_fixed_size"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage = dump("-res-usage", file.name)
            assembly = dump("-sass", file.name)
        registers, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
        spills = len(re.findall(r"\b(LDL|STL)\b", assembly))
    return {
        "registers": registers,
        "local_bytes": local,
        "spills": spills,
        "shared_bytes": binary.metadata.shared,
        "matrix_instructions": len(re.findall(MATRIX_INSTRUCTION[target], assembly)),
        "wide_loads": len(re.findall(WIDE_LOAD[target], assembly)),
        "fused_multiply_adds": len(re.findall(r"\bFFMA\b|v_fma_f32|v_fmac_f32|v_pk_fma_f32", assembly)),
    }


def main() -> None:
    for name, built, options in cases():
        for target, gpu in TARGETS.items():
            binary = triton.compile(built, target=gpu, options=dict(options))
            print(
                json.dumps({"kernel": name, "target": target, "triton": triton.__version__, **report(target, binary)})
            )


if __name__ == "__main__":
    main()
