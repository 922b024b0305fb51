"""Tensors as JSON, in both directions.

[[0.5, 1.0], [2.0, 3.0]]                                             numbers: int64, float32 or bool
{"dtype": "float16", "data": [[0.5, 1.0], [2.0, 3.0]]}               with a dtype
{"dtype": "float32", "shape": [2, 2], "data": "AAAAPwAAgD8AAABA..."}  bytes in base64, little-endian, row by row
"""

import base64
import binascii
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = {
    name: np.dtype(code)
    for name, code in {
        "float32": "<f4", "float16": "<f2", "float64": "<f8", "int64": "<i8", "int32": "<i4", "int16": "<i2",
        "int8": "i1", "uint8": "u1", "bool": "?",
    }.items()
}  # fmt: skip
"""What a tensor's numbers may be, by the names of JSON and of torch."""
PLAIN = {"f": DTYPES["float32"], "i": DTYPES["int64"], "b": DTYPES["bool"]}
FIELDS = {"dtype", "shape", "data"}


def array_of(value: object) -> NDArray[Any]:
    """The array that a JSON value stands for. Raises ``ValueError`` for one that stands for none."""
    if not isinstance(value, Mapping):
        found = _nested(value)
        return _cast(found, PLAIN[found.dtype.kind])
    if unknown := value.keys() - FIELDS:
        raise ValueError(f"a tensor must have no fields but dtype, shape and data, got {sorted(unknown)}")
    name, data, shape = value.get("dtype"), value.get("data"), value.get("shape")
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"a tensor's dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    if shape is not None and not (isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)):
        raise ValueError(f"a tensor's shape must be a list of sizes, got {shape!r}")
    if isinstance(data, str):
        return _packed(data, DTYPES[name], shape)
    found = _nested(data)
    if shape is not None and list(found.shape) != shape:
        raise ValueError(f"a tensor's data must have the shape {shape}, got {list(found.shape)}")
    return _cast(found, DTYPES[name])


def _cast(found: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Raises ``ValueError`` for numbers that the dtype cannot hold; floats are rounded."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast: NDArray[Any] = found.astype(dtype)
    held = np.array_equal(cast, found) if dtype.kind != "f" else np.array_equal(np.isfinite(cast), np.isfinite(found))
    if not held:
        raise ValueError(f"a tensor's data must be {dtype.name}, got numbers that it cannot hold")
    return cast


def _nested(value: object) -> NDArray[Any]:
    try:
        found = np.array(value)
    except ValueError as error:  # ragged, or too deep
        raise ValueError(f"a tensor's lists must all have the same lengths: {error}") from None
    if found.dtype.kind not in PLAIN:
        raise ValueError(f"a tensor must hold numbers, or base64 with a dtype, got {found.dtype} values")
    return found


def _packed(data: str, dtype: np.dtype[Any], shape: list[int] | None) -> NDArray[Any]:
    try:
        text = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"a tensor's data must be base64: {error}") from None
    if shape is None or len(text) != prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor's shape must be that of its {len(text)} bytes of {dtype.name}, got {shape}")
    found: NDArray[Any] = np.frombuffer(text, dtype).reshape(shape)
    return found


def json_of(tensor: Tensor, as_base64: bool = False) -> Any:
    """A tensor's numbers in lists, or its bytes. Floats that are not finite are "NaN", "Infinity" and "-Infinity":
    JSON has no such numbers."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float16, torch.float64):
        tensor = tensor.float()  # bfloat16: NumPy has none
    if as_base64:
        array = tensor.contiguous().numpy()
        dtype = DTYPES[array.dtype.name]
        data = base64.b64encode(array.astype(dtype).tobytes()).decode("ascii")
        return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}
    numbers = tensor.tolist()
    return numbers if not tensor.is_floating_point() or torch.isfinite(tensor).all() else _in_words(numbers)


def _in_words(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_in_words(number) for number in numbers]
    if numbers != numbers:
        return "NaN"
    return {float("inf"): "Infinity", float("-inf"): "-Infinity"}.get(numbers, numbers)
