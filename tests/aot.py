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
from randes_kernels.kernels.superpose import superpose_kernel
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
DIVISIBLE = [["tt.divisibility", 16]]


def source(kernel: Any, types: dict[str, str], constants: dict[str, Any], unspecialized: tuple[str, ...]) -> ASTSource:
    """The kernel as a launch at N = K = 4096 with contiguous tensors specialises it."""
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(place,)] = "constexpr", constants[name]
        elif name.startswith("stride_") and name.endswith("k"):
            signature[name], constexprs[(place,)] = "constexpr", 1
        else:
            signature[name] = types.get(name, "i32")
            if name not in unspecialized and signature[name] != "fp32":
                attributes[(place,)] = DIVISIBLE
    return ASTSource(kernel, signature, constexprs, attributes)


def cases() -> Iterator[tuple[str, ASTSource, dict[str, Any]]]:
    """Every kernel in every mode and tile that a launch can choose: name, source, options."""
    for dtype, short in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        pointers = dict.fromkeys(
            ("x_ptr", "turned_ptr", "weight_ptr", "delta_ptr", "bias_ptr", "biases_ptr", "y_ptr"), f"*{short}"
        )
        models = {"ids_ptr": "*i32", "keys_ptr": "*i64", "scale_ptr": "*fp32", "slots_ptr": "*i32"}
        plain = ("M", "models", "rows_per_id", "tensor_lo", "tensor_hi", *models)
        for m in (16, 32, 64, 2048):
            tile = linear_tile(m, N, K, dtype)
            for flips in (True, False):
                constants = {
                    "IN_STREAM": int(Stream.COLUMN_SIGNS), "OUT_STREAM": int(Stream.ROW_SIGNS),
                    "FLIP_IN": flips, "FLIP_OUT": True, "HAS_BASE": True, "HAS_BIAS": True, "HAS_BIASES": flips,
                    "PRECISION": "ieee", "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
                }  # fmt: skip
                name = f"linear {short} m={m} {'signs' if flips else 'permuted'}"
                built = source(superposed_linear_kernel, pointers | models, constants, plain)
                yield name, built, {"num_warps": tile.warps, "num_stages": tile.stages}
        for transform in (Transform(), Transform(granule=1)):
            constants = transform_arguments(transform, K).constants
            tiles = {"BLOCK_N": 32, "BLOCK_K": 128}
            mode = "permuted" if constants["PERMUTED"] else "signs"
            keys = ("key_lo", "key_hi", "tensor_lo", "tensor_hi", "granule", "bits")
            types = {"accumulator_ptr": "*i32", "finetuned_ptr": f"*{short}", "base_ptr": f"*{short}", "rate": "fp32"}
            built = source(superpose_kernel, types, constants | tiles | {"SUBTRACT": False}, keys)
            yield f"superpose {short} {mode}", built, {"num_warps": 4, "enable_fp_fusion": False}
            types = {"out_ptr": f"*{short}", "base_ptr": f"*{short}", "delta_ptr": "*i16", "scale": "fp32"}
            yield f"retrieve {short} {mode}", source(retrieve_kernel, types, constants | tiles, keys), {"num_warps": 4}
        types = {"x_ptr": f"*{short}", "turned_ptr": f"*{short}", **models}
        for back in (False, True):
            constants = transform_arguments(Transform(granule=1), K).constants
            built = source(route_kernel, types, constants | {"BACK": back, "BLOCK_K": 128}, (*plain, "granule", "bits"))
            yield f"route {short}{' back' if back else ''}", built, {"num_warps": 1}


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


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
            usage = subprocess.check_output([tool("cuobjdump"), "-res-usage", file.name], text=True)
            assembly = subprocess.check_output([tool("cuobjdump"), "-sass", file.name], text=True)
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
            print(json.dumps({"kernel": name, "target": target, "triton": triton.__version__, **report(target, binary)}))


if __name__ == "__main__":
    main()
