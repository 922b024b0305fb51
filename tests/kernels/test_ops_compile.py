"""The operators inside torch.compile, and without Triton."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from cases import linear_case, run
from torch import Tensor

from randes_kernels import reference
from randes_kernels.format import Transform


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("transform", [Transform(), Transform(granule=1)], ids=["signs", "permuted"])
def test_one_compilation_serves_any_mix_of_models_and_any_number_of_rows(transform: Transform) -> None:
    layer = linear_case(2, 5, 7, transform, models=3)
    frames = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        nonlocal frames
        frames += 1
        return graph.forward

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, rows in enumerate((12, 5, 33, 6)):
            other = linear_case(rows, 5, 7, transform, models=3, integers=True, seed=seed)
            case = layer._replace(
                x=other.x, ids=other.ids, keys=other.keys, scale=other.scale, slots=other.slots, delta=other.delta,
                weight=other.weight, bias=other.bias, biases=other.biases,
            )  # fmt: skip
            assert torch.equal(compiled(case), reference.superposed_linear(*case))
    assert frames == 1


def test_one_compilation_serves_any_number_of_models_and_slots_and_runs() -> None:
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, (models, slots, runs, length) in enumerate(((3, 2, 4, 3), (5, 3, 2, 6), (16, 2, 7, 5))):
            case = linear_case(runs * length, 5, 7, models=models, slots=slots, runs=runs, integers=True, seed=seed)
            assert torch.equal(compiled(case), reference.superposed_linear(*case))


def test_compiled_gradients_equal_eager_ones() -> None:
    case = linear_case(6, 5, 7, Transform(granule=1), integers=True)
    grads = []
    for layer in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [value.clone().requires_grad_() for value in (case.x, case.weight, case.bias) if value is not None]
        x, weight, bias = leaves
        layer(case._replace(x=x, weight=weight, bias=bias)).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*grads, strict=True):
        assert torch.equal(eager, compiled)  # type: ignore[arg-type]


WITHOUT_TRITON = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import torch
from cases import linear_case, run
from randes_kernels import reference, retrieve, superpose_

case = linear_case(6, 5, 7, integers=True)
weight, transform = case.weight, case.transform
assert torch.equal(run(case), reference.superposed_linear(*case))
held = torch.zeros(5, 7, dtype=torch.int32)
superpose_(held, weight + 1, weight, 4.0, 1, 2, transform)
assert torch.equal(retrieve(weight, held, 0.25, 1, 2, transform), weight + 1)
assert "triton" not in sys.modules
try:
    import randes_kernels.gpu
except ModuleNotFoundError as error:
    print(error)
"""


def test_a_cpu_needs_no_triton() -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TRITON]
    here = Path(__file__).parent
    found = os.environ | {"PYTHONPATH": str(here.parents[1])}
    ran = subprocess.run(command, cwd=here, env=found, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "No module named 'triton'"
