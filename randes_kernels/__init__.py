"""What runs: the format, its plain-torch specification, and fused kernels for superposed linear layers.

    format       what a seed and a name mean, bit for bit
    mixing       rotations, diagonals and dense matrices in place of column signs
    packing      superpositions in few bits
    lowrank      what models have of their own in a shared basis
    reference    what the kernels compute, in plain torch
    primitives   signs and permutations as Triton functions
    kernels/     one fused kernel and its launcher a file
    tiles        which tile a launch uses
    slices       superposing and retrieving on a CPU, some rows at a time
    cpu, gpu     what an operator runs on each device
    ops          the operators, registered once

Imports flow one way: format ← mixing, packing, lowrank, reference, primitives ← kernels ← gpu, cpu, slices ← ops.
Nothing here imports ``randes``.
"""

from randes_kernels.format import FORMAT_VERSION, Transform, model_key, tensor_id
from randes_kernels.lowrank import Basis
from randes_kernels.ops import prepare, retrieve, superpose_, superposed_linear
from randes_kernels.packing import Packed, pack, unpack

__all__ = [
    "FORMAT_VERSION",
    "Basis",
    "Packed",
    "Transform",
    "model_key",
    "pack",
    "prepare",
    "retrieve",
    "superpose_",
    "superposed_linear",
    "tensor_id",
    "unpack",
]
