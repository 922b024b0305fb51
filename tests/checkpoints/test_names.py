"""Tensors that are others' elements in another order: found out without values, read by runs of rows, and back."""

from collections.abc import Callable, Iterator, Mapping
from math import prod

import pytest
import torch
from torch import Tensor

from randes.checkpoints import lazy_tensors
from randes.checkpoints.lazy_tensors import LazyTensors, chunk_bounds
from randes.checkpoints.names.conversion import RECORD, Conversion
from randes.checkpoints.names.pieces import Piece, Rearranged
from randes.checkpoints.names.traced import UntraceableError, pieces_of, traced
from randes.errors import CheckpointError

Operation = Callable[[list[Tensor]], Tensor]


def interleaved(x: list[Tensor]) -> Tensor:
    """Every second row, then the others."""
    rows, columns = x[0].shape
    return x[0].reshape(rows // 2, 2, columns).transpose(0, 1).reshape(x[0].shape).contiguous()


def heads(x: list[Tensor]) -> Tensor:
    """Within each head, as ``PermuteForRope`` has it."""
    rows, columns = x[0].shape
    return x[0].view(2, rows // 4, 2, columns).transpose(1, 2).reshape(rows, columns)


OPERATIONS: dict[str, tuple[list[tuple[int, ...]], Operation]] = {
    "itself": ([(6, 4)], lambda x: x[0][...]),
    "stacked": ([(6, 4)] * 3, lambda x: torch.stack(x)),
    "stacked and joined": (
        [(6, 4)] * 4, lambda x: torch.cat([torch.stack(x[:2], dim=0), torch.stack(x[2:], dim=0)], dim=1),
    ),
    "joined across": ([(6, 4), (6, 2)], lambda x: torch.cat(x, dim=-1)),
    "a third": ([(9, 4)], lambda x: torch.chunk(x[0], 3, dim=0)[1].contiguous()),
    "cut unevenly": ([(9, 4)], lambda x: torch.split(x[0], [4, 3, 2], dim=0)[2]),
    "cut across": ([(6, 8)], lambda x: x[0].chunk(2, dim=1)[1].contiguous()),
    "turned": ([(6, 4)], lambda x: x[0].transpose(0, 1).contiguous()),
    "turned within": ([(3, 6, 4)], lambda x: torch.transpose(x[0], 1, 2).contiguous()),
    "turned, cut, joined": ([(6, 4)], lambda x: torch.cat(tuple(x[0].permute(1, 0).chunk(2, 0))[::-1])),
    "interleaved": ([(6, 4)], interleaved),
    "interleaved and cut": ([(8, 4)], lambda x: interleaved(x).chunk(2, dim=0)[1]),
    "heads": ([(8, 6)], heads),
    "heads of a vector": ([(8,)], lambda x: x[0].view(2, 2, 2).transpose(1, 2).reshape(8)),
    "a kernel, flat": ([(6, 3, 2, 2, 2)], lambda x: x[0].reshape(6, -1)),
    "one of a stack": ([(3, 6, 4)], lambda x: x[0].unbind(0)[2]),
    "one of a stack's rows": ([(3, 6, 4)], lambda x: torch.unbind(x[0][1:], 0)[0][0]),
    "squeezed": ([(1, 6, 4)], lambda x: x[0].squeeze(0)),
    "a scalar": ([()], lambda x: x[0].clone()),
    "scalars, stacked": ([(), ()], lambda x: torch.stack(x)),
    "nothing": ([(0, 4)], lambda x: x[0].contiguous()),
}  # fmt: skip


def converted(shapes: list[tuple[int, ...]], operation: Operation) -> tuple[dict[str, Tensor], Tensor, Conversion]:
    generator = torch.Generator().manual_seed(1)
    files = {f"file.{number}": torch.randn(shape, generator=generator) for number, shape in enumerate(shapes)}
    right = operation(list(files.values()))
    made = operation([traced(name, value) for name, value in files.items()])
    assert made.shape == right.shape
    return files, right, Conversion({}, {"model": pieces_of(made)}, {"model": tuple(right.shape)})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_an_operation_does_is_found_out_without_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for elements in (1 << 19, 1):  # whole, and a row at a time
        monkeypatch.setattr(lazy_tensors, "CHUNK_ELEMENTS", elements)
        files, right, conversion = converted(*OPERATIONS[name])
        pieces = conversion.pieces["model"]
        found = Rearranged(files, {"model": tuple(right.shape)}, {"model": pieces}, {})
        assert torch.equal(found["model"], right)
        parts = list(found.chunks("model"))
        assert len(parts) == len(chunk_bounds(right))
        assert torch.equal(torch.cat(parts) if right.dim() else parts[0], right)
        for start in range(len(right) if right.dim() else 0):
            assert torch.equal(found.rows("model", start, start + 1), right[start : start + 1])


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "cut" not in name and name not in (
    "a third", "one of a stack", "one of a stack's rows", "nothing"
)])  # fmt: skip
def test_the_way_back_is_exact_and_so_is_what_a_manifest_says_of_it(name: str) -> None:
    files, right, conversion = converted(*OPERATIONS[name])
    back = conversion.back(files)
    record = back.to_dict()
    RECORD("names", record)
    assert Conversion.from_dict(record) == back
    found = back.apply({"model": right, "other": torch.ones(1)})
    assert found.keys() == {*files, "other"}
    for own, value in files.items():
        assert torch.equal(found[own], value)
        assert found[own].shape == value.shape


def test_what_does_more_than_move_elements_is_refused() -> None:
    value = traced("file", torch.empty(4, 4))
    for operation in (lambda: value * 2, lambda: torch.flip(value, [0]), lambda: value[::2], lambda: value.float()):
        with pytest.raises(UntraceableError):
            operation()
    with pytest.raises(UntraceableError):
        torch.cat([value, value]).reshape(-1, 2)


class Spied(LazyTensors):
    """Tensors whose rows are counted as they are read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({name: value.to("meta") for name, value in tensors.items()})
        self.tensors, self.read_rows = dict(tensors), 0

    def rows(self, name: str, start: int, end: int) -> Tensor:
        self.read_rows += end - start
        return self.tensors[name][start:end]

    def chunks(self, name: str) -> Iterator[Tensor]:
        for start, end in chunk_bounds(self.headers[name]):
            yield self.rows(name, start, end)


def test_one_expert_is_made_of_its_own_files_and_a_run_of_rows_of_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"file.{n}": torch.full((6, 4), float(n)) for n in range(8)}
    made = OPERATIONS["stacked and joined"][1]
    pieces = pieces_of(made([traced(name, value) for name, value in list(files.items())[:4]]))  # type: ignore[arg-type]
    spied = Spied(files)
    found = Rearranged(spied, {"model": (2, 12, 4)}, {"model": pieces}, {})
    assert torch.equal(found.rows("model", 1, 2)[0], torch.cat([files["file.1"], files["file.3"]]))
    assert spied.read_rows == 12
    monkeypatch.setattr(lazy_tensors, "CHUNK_ELEMENTS", 4)
    across = pieces_of(torch.cat([traced("file.0", files["file.0"]), traced("file.1", files["file.1"])], dim=1))  # type: ignore[arg-type]
    spied.read_rows = 0
    for _ in Rearranged(spied, {"model": (6, 8)}, {"model": across}, {}).chunks("model"):
        pass
    assert spied.read_rows == 12


def test_a_turned_tensor_is_read_once_however_many_runs_it_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_tensors, "CHUNK_ELEMENTS", 1)
    spied = Spied({"file": torch.randn(60, 40)})
    pieces = pieces_of(traced("file", spied.tensors["file"]).transpose(0, 1))  # type: ignore[arg-type]
    found = Rearranged(spied, {"model": (40, 60)}, {"model": pieces}, {})
    assert torch.equal(torch.cat(list(found.chunks("model"))), spied.tensors["file"].T)
    assert spied.read_rows == 60


@pytest.mark.parametrize("change", [
    {"shape": (3, 4)}, {"from_offset": 1}, {"to_offset": 1}, {"from_stride": (400, 1)}, {"to_stride": (4, 1, 1)},
    {"source": "nowhere"},
])  # fmt: skip
def test_pieces_that_are_not_all_elements_are_refused(change: dict[str, object]) -> None:
    piece = Piece("file", (6, 4), (4, 1), 0, (4, 1), 0)._replace(**change)  # type: ignore[arg-type]
    conversion = Conversion({}, {"model": (piece,)}, {"model": (6, 4)})
    tensors = {"file": torch.zeros(6, 4), "nowhere": torch.zeros(2)}
    with pytest.raises(CheckpointError):
        conversion.apply(tensors)


def test_tensors_of_two_dtypes_are_not_one() -> None:
    pieces = pieces_of(torch.stack([traced("a", torch.empty(4)), traced("b", torch.empty(4))]))  # type: ignore[arg-type]
    conversion = Conversion({}, {"model": pieces}, {"model": (2, 4)})
    with pytest.raises(CheckpointError, match="one dtype"):
        conversion.apply({"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.float16)})
    with pytest.raises(CheckpointError, match="made of b too"):
        conversion.apply({"a": torch.zeros(4)})
    assert prod((2, 4)) == sum(prod(piece.shape) for piece in pieces)
