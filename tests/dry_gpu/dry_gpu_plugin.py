"""Pytest with the stand-in driver: "cuda" is the CPU, and no values are compared, as none are computed.

A failing launch raises as on a real device. Graphs, streams and what is copied to the host are not simulated: tests
that need them are left out (``SIMULATED_NOT``).
"""

from collections.abc import Callable
from typing import Any

import driver
import pytest

library = driver.activate()

import torch  # noqa: E402
import torch.testing  # noqa: E402
import triton  # noqa: E402

SIMULATED_NOT = ("waits_for_the_gpu", "captured", "a_compiled_model")
compiled: list[float] = []
"""Seconds of each kernel that no cache had."""


def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
    if not cache_hit:
        compiled.append((times.total_lowering + times.ir_initialization) / 1e6)


triton.knobs.compilation.listener = listen
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.synchronize = lambda *_: None
torch.equal = lambda *_: True
torch.testing.assert_close = lambda *_, **__: None


def on_cpu(made: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch that takes "cuda" for the CPU."""

    def make(*arguments: Any, **options: Any) -> Any:
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        return made(*arguments, **options)

    return make


for _name in ("ones", "arange", "zeros", "empty", "randn", "full", "tensor", "randint", "eye"):
    setattr(torch, _name, on_cpu(getattr(torch, _name)))
_to, _module_to = torch.Tensor.to, torch.nn.Module.to


def to(self: Any, *arguments: Any, **options: Any) -> Any:
    wanted = arguments[0] if arguments else options.get("device")
    moves = isinstance(wanted, str | torch.device) and str(wanted).startswith("cuda")
    if moves and not arguments[1:] and set(options) <= {"device"}:
        return self
    return (_module_to if isinstance(self, torch.nn.Module) else _to)(self, *arguments, **options)


torch.Tensor.to = torch.nn.Module.to = to
torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not simulated."""
    out = [item for item in items if any(name in item.name for name in SIMULATED_NOT)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Only what a launch or a compilation raises is a failure: an assertion about values is none."""
    if call.excinfo is not None and call.excinfo.errisinstance(AssertionError):
        call.excinfo = None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What a first run on a GPU will compile."""
    terminalreporter.write_line(
        f"{driver.launches(library)} launches checked; {len(compiled)} kernels compiled in {sum(compiled):.0f} s"
    )
