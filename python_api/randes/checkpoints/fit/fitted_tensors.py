"""A checkpoint's tensors under a base's names and in its dtypes, each from where it is, when it is asked for."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from randes.checkpoints.lazy_tensors import LazyTensors, chunks, headers, rows
from randes.errors import CheckpointError


class FittedTensors(LazyTensors):
    """Tensors of other mappings, cast to other dtypes.

    where: of each name, the mapping that has the tensor and its name there. dtypes: by name, of those that are cast.
    Raises ``CheckpointError`` while a tensor is read that float16 does not hold.
    """

    def __init__(
        self, where: Mapping[str, tuple[Mapping[str, Tensor], str]], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        found = {name: headers(source)[own] for name, (source, own) in where.items()}
        cast = {name: torch.empty(found[name].shape, dtype=dtype, device="meta") for name, dtype in dtypes.items()}
        super().__init__(found | cast)
        self._where = dict(where)
        sources = {id(source): source for source, _ in where.values()}
        self.below = [source for source in sources.values() if isinstance(source, LazyTensors)]

    def chunks(self, name: str) -> Iterator[Tensor]:
        source, own = self._where[name]
        return (self._cast(name, part) for part in chunks(source, own))

    def rows(self, name: str, start: int, end: int) -> Tensor:
        source, own = self._where[name]
        return self._cast(name, rows(source, own, start, end))

    def _cast(self, name: str, part: Tensor) -> Tensor:
        dtype = self.headers[name].dtype
        if part.dtype == dtype:
            return part
        cast = part.to(dtype)
        if dtype == torch.float16 and torch.isinf(cast).any() and torch.isfinite(part).all():
            largest = f"{part.abs().max():.3g}"
            raise CheckpointError(f"{name} must be within ±65504, as the base has it in float16, got {largest}")
        return cast
