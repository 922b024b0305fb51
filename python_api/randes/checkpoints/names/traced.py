"""What Transformers does to tensors when it reads a file, found out without any of their values.

Its operations (stack, cut, transpose, ...) are run on ``Traced`` tensors, which have a shape and know of which elements
of which tensor they are. Nothing is known here of the operations' classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randes.checkpoints.names.pieces import Piece, contiguous


class UntraceableError(Exception):
    """An operation does more than put elements in another order."""


class Box(NamedTuple):
    """A block of a traced tensor: where it starts, and the view of the tensor in a file that it is."""

    start: tuple[int, ...]
    source: str
    view: Tensor


class Traced(Tensor):
    """A tensor on "meta" that is made of views of others."""

    boxes: list[Box]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (known := _FUNCTIONS.get(func.__name__)) is not None:
            with torch._C.DisableTorchFunctionSubclass():
                return known(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        parts = found if isinstance(found, list | tuple) else (found,)
        if any(isinstance(part, Tensor) for part in parts):
            raise UntraceableError(f"{func.__name__} of a tensor in a file")
        return found


def traced(name: str, header: Tensor) -> Traced:
    """A tensor in a file. header: its shape and dtype."""
    view = torch.empty(header.shape, dtype=header.dtype, device="meta")
    return _made(tuple(header.shape), header.dtype, [Box((0,) * header.dim(), name, view)])


def pieces_of(value: Traced) -> tuple[Piece, ...]:
    """What a traced tensor is made of."""
    strides = contiguous(tuple(value.shape))
    return tuple(
        Piece(
            box.source, tuple(box.view.shape), strides,
            sum(at * stride for at, stride in zip(box.start, strides, strict=True)),
            tuple(box.view.stride()), int(box.view.storage_offset()),
        )
        for box in value.boxes
    )  # fmt: skip


def _made(shape: Sequence[int], dtype: torch.dtype, boxes: list[Box]) -> Traced:
    with torch._C.DisableTorchFunctionSubclass():
        made = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(Traced)
    made.boxes = boxes
    return made


def _narrow(value: Traced, dim: int, start: int, length: int) -> Traced:
    dim %= value.dim()
    boxes = []
    for box in value.boxes:
        low = max(start, box.start[dim])
        high = min(start + length, box.start[dim] + box.view.shape[dim])
        if low < high:
            first = (*box.start[:dim], low - start, *box.start[dim + 1 :])
            boxes.append(Box(first, box.source, box.view.narrow(dim, low - box.start[dim], high - low)))
    shape = (*value.shape[:dim], length, *value.shape[dim + 1 :])
    return _made(shape, value.dtype, boxes)


def _permuted(value: Traced, dims: Sequence[int]) -> Traced:
    boxes = [Box(tuple(box.start[dim] for dim in dims), box.source, box.view.permute(*dims)) for box in value.boxes]
    return _made([value.shape[dim] for dim in dims], value.dtype, boxes)


def _transpose(value: Traced, dim0: int, dim1: int) -> Traced:
    dims = list(range(value.dim()))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permuted(value, dims)


def _permute(value: Traced, *dims: Any) -> Traced:
    return _permuted(value, [dim % value.dim() for dim in _sizes(dims)])


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    dim %= tensors[0].dim()
    shape = torch.cat([torch.empty(value.shape, device="meta") for value in tensors], dim).shape  # or what that raises
    boxes, at = [], 0
    for value in tensors:
        for box in value.boxes:
            first = (*box.start[:dim], box.start[dim] + at, *box.start[dim + 1 :])
            boxes.append(Box(first, box.source, box.view))
        at += value.shape[dim]
    return _made(shape, tensors[0].dtype, boxes)


def _unsqueeze(value: Traced, dim: int) -> Traced:
    dim %= value.dim() + 1
    boxes = [Box((*box.start[:dim], 0, *box.start[dim:]), box.source, box.view.unsqueeze(dim)) for box in value.boxes]
    return _made((*value.shape[:dim], 1, *value.shape[dim:]), value.dtype, boxes)


def _squeeze(value: Traced, dim: int) -> Traced:
    dim %= value.dim()
    if value.shape[dim] != 1:
        return value
    boxes = [Box((*box.start[:dim], *box.start[dim + 1 :]), box.source, box.view.squeeze(dim)) for box in value.boxes]
    return _made((*value.shape[:dim], *value.shape[dim + 1 :]), value.dtype, boxes)


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    return _cat([_unsqueeze(value, dim) for value in tensors], dim)


def _split(value: Traced, sizes: int | Sequence[int], dim: int = 0) -> tuple[Traced, ...]:
    count = value.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, count - start) for start in range(0, count, sizes)]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return tuple(_narrow(value, dim, start, size) for start, size in zip(starts, sizes, strict=True))


def _chunk(value: Traced, chunks: int, dim: int = 0) -> tuple[Traced, ...]:
    return _split(value, -(-value.shape[dim] // chunks), dim)


def _unbind(value: Traced, dim: int = 0) -> tuple[Traced, ...]:
    return tuple(_squeeze(part, dim) for part in _split(value, 1, dim))


def _item(value: Traced, index: Any) -> Traced:
    if index is Ellipsis or index == slice(None):
        return value
    if isinstance(index, int):
        return _squeeze(_narrow(value, 0, index % len(value), 1), 0)
    if isinstance(index, slice) and index.step in (None, 1):
        start, end, _ = index.indices(len(value))
        return _narrow(value, 0, start, max(end - start, 0))
    raise UntraceableError(f"an element of a tensor in a file, at {index}")


def _reshape(value: Traced, *sizes: Any) -> Traced:
    shape = torch.empty(value.shape, device="meta").reshape(*_sizes(sizes)).shape
    if tuple(shape) == tuple(value.shape):
        return value
    if len(value.boxes) != 1:
        raise UntraceableError("another shape of what is made of several tensors")
    boxes = [Box(start, value.boxes[0].source, view) for start, view in _folded(value.boxes[0].view, tuple(shape))]
    return _made(shape, value.dtype, boxes)


def _folded(view: Tensor, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], Tensor]]:
    """A view in another shape, as one view or as many as it takes, each with its start in that shape."""
    try:
        return [((0,) * len(shape), view.view(shape))]
    except RuntimeError:  # its strides are not those of such a view
        pass
    found = []
    for number, part in enumerate(view.unbind(0)):
        start, inner = _block(number * part.numel(), part.numel(), shape)
        found += [(tuple(map(sum, zip(start, at, strict=True))), some) for at, some in _folded(part, inner)]
    return found


def _block(first: int, count: int, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and shape of the block that a run of a tensor's elements is."""
    start, sizes = [], []
    for most, row in zip(shape, contiguous(shape), strict=True):
        start.append(first // row)
        sizes.append(max(count // row, 1))
        if start[-1] + sizes[-1] > most or (count >= row and (first % row or count % row)):
            raise UntraceableError("another shape of a tensor in a file")
        first, count = first % row, min(count, row)
    return tuple(start), tuple(sizes)


def _flatten(value: Traced, start_dim: int = 0, end_dim: int = -1) -> Traced:
    start, end = start_dim % value.dim(), end_dim % value.dim()
    return _reshape(value, (*value.shape[:start], -1, *value.shape[end + 1 :]))


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


def _same(value: Traced, *_: Any, **__: Any) -> Traced:
    return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "narrow": _narrow, "transpose": _transpose, "swapaxes": _transpose, "permute": _permute, "cat": _cat,
    "concat": _cat, "stack": _stack, "split": _split, "chunk": _chunk, "unbind": _unbind, "unsqueeze": _unsqueeze,
    "squeeze": _squeeze, "__getitem__": _item, "reshape": _reshape, "view": _reshape, "flatten": _flatten,
    "contiguous": _same, "clone": _same, "detach": _same, "cpu": _same,
}  # fmt: skip
