"""One of two processes that serve a model together: ``python parallel_rank.py FOLDER RANK`` writes what each check
found. ``test_parallel.py`` starts both.

Every process holds the whole model first, whose answers are what the parts must make together.
"""

import copy
import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from architectures import VOCABULARY, build
from models import finetune, superposed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import randes
import randes.transformers
from randes.parallel import ColumnParallel, RowParallel, parallelize
from randes.serving.layers.linear import SuperposedLinear

MIX = ["m1", "__base__", "m0", "m1"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CONFIG = randes.Config(min_width=16, rank=0)


def llama(**options: Any) -> Any:
    """Odd sizes: 37 columns of each half of an MLP, 51 and 50 rows of a head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 74, "num_hidden_layers": 2, "vocab_size": 101}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **options})).eval()


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(1))


def served(config: randes.Config, bits: float = 16, **options: Any) -> randes.SuperposedModel:
    base = llama(**options)
    tuned = {f"m{number}": finetune(base, number, 0.1) for number in range(2)}
    sup = randes.compress(copy.deepcopy(base), tuned, config)
    return randes.SuperposedModel(base, sup if bits == 16 else sup.pack(bits))


def shares(model: nn.Module) -> list[tuple[int, int]]:
    return [(part.out_features, part.in_features) for part in model.modules() if isinstance(part, SuperposedLinear)]


@torch.no_grad()
def same_answers(model: Any, mesh: DeviceMesh, plan: Any = None) -> None:
    """Logits and greedy tokens before and after, and as wrong as they can be without origins."""
    x, whole = tokens(), shares(model)
    before, said = model(x, adapter_names=MIX).logits, model.generate(x, adapter_names=MIX, max_new_tokens=4)
    assert parallelize(model, mesh, plan) is model
    after = model(x, adapter_names=MIX).logits
    torch.testing.assert_close(after, before, **CLOSE)
    assert torch.equal(model.generate(x, adapter_names=MIX, max_new_tokens=4), said)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, adapter_names=MIX).logits, before, **CLOSE)
    with torch.enable_grad():
        torch.testing.assert_close(model(x, adapter_names=MIX).logits, before, **CLOSE)
    assert all(n * k < 0.52 * n0 * k0 for (n, k), (n0, k0) in zip(shares(model), whole, strict=True))
    for part in model.modules():
        if isinstance(part, SuperposedLinear):
            part.transform = part.transform._replace(first_row=0, first_column=0)
    wrong = model(x, adapter_names=MIX).logits
    torch.testing.assert_close(wrong[1], before[1], **CLOSE)  # the base's row
    for row in (0, 2, 3):
        assert not torch.allclose(wrong[row], before[row], rtol=1e-2, atol=1e-2)


def a_llama(mesh: DeviceMesh, _: Path) -> None:
    same_answers(served(CONFIG), mesh)


def with_biases_and_a_basis(mesh: DeviceMesh, _: Path) -> None:
    same_answers(served(randes.Config(min_width=16, rank=3), attention_bias=True, mlp_bias=True), mesh)


def fused_attention_and_experts(mesh: DeviceMesh, _: Path) -> None:
    """GPT-NeoX's q, k and v in one matrix, head by head; experts that stay whole."""
    for name in ("GPT-NeoX", "Qwen3-MoE"):
        base = build(name)
        sup, _tuned = superposed(base, 2, CONFIG, size=0.1)
        same_answers(randes.SuperposedModel(base, sup), mesh)


def packed(mesh: DeviceMesh, _: Path) -> None:
    same_answers(served(CONFIG, bits=2), mesh)


def permuted_in_segments(mesh: DeviceMesh, _: Path) -> None:
    same_answers(served(randes.Config(min_width=16, rank=0, permute=1, segments=2)), mesh)


def tied_heads_and_embeddings(mesh: DeviceMesh, _: Path) -> None:
    same_answers(served(CONFIG, tie_word_embeddings=True), mesh)


def loaded_by_transformers(mesh: DeviceMesh, folder: Path) -> None:
    same_answers(hf.AutoModelForCausalLM.from_pretrained(folder / "store"), mesh)


@torch.no_grad()
def models_come_and_go(mesh: DeviceMesh, _: Path) -> None:
    options = {"attention_bias": True, "mlp_bias": True}
    base = llama(**options)
    sup, tuned = superposed(base, 2, CONFIG, size=0.1)
    whole = randes.SuperposedModel(copy.deepcopy(base), copy.deepcopy(sup), capacity=4)
    parts = randes.SuperposedModel(base, sup, capacity=4)
    parallelize(parts, mesh)
    for model in (whole, parts):
        model.add_adapter("m2", finetune(llama(**options), 2, 0.1))
        model.delete_adapter("m0", tuned["m0"])
    mix = ["m2", "m1", "__base__", "m2"]
    torch.testing.assert_close(
        parts(tokens(), adapter_names=mix).logits, whole(tokens(), adapter_names=mix).logits, **CLOSE
    )
    parts.warm_up(rows=(1, 3))


def styles_of_torch(mesh: DeviceMesh, _: Path) -> None:
    """``parallelize_module`` with our styles, gradients, and layers that are the same in all models."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 74), nn.ReLU(), nn.Linear(74, 40), nn.Linear(40, 33), nn.Linear(33, 40))
    sup, _ = superposed(base, 2, randes.Config(min_width=16, rank=0, exclude=("4.*",), others="base"), size=0.1)
    whole = randes.SuperposedModel(copy.deepcopy(base), copy.deepcopy(sup))
    parts = randes.SuperposedModel(base, sup)
    plan = {"0": ColumnParallel(), "2": RowParallel(), "3": ColumnParallel(whole=True), "4": RowParallel(whole=True)}
    parallelize_module(parts.base_model, mesh, plan)
    assert type(parts.base_model[4]) is nn.Linear
    results = []
    for model in (whole, parts):
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = model(x, adapter_names=MIX)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    rank = mesh.get_local_rank()
    own = whole.base_model[2].base_weight.grad[:, 37 * rank : 37 * rank + 37]
    torch.testing.assert_close(parts.base_model[2].base_weight.grad, own, **CLOSE)


@torch.no_grad()
def the_program_of_the_page(_: DeviceMesh, folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "several-devices.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```text\n(import os.*?)```", page, re.DOTALL)
    for said, own in (("store", str(folder / "store")), ("german", "m1"), ("legal", "m0")):
        assert f'"{said}"' in program
        program = program.replace(f'"{said}"', repr(own))
    names: dict[str, Any] = {"tokens": tokens()}
    exec(compile(program, "several-devices.md", "exec"), names)
    mix = ["m1", "m0", "__base__", "m1"]
    whole = randes.from_pretrained(folder / "store")(tokens(), adapter_names=mix)
    torch.testing.assert_close(names["y"].logits, whole.logits, **CLOSE)


def refused(call: Callable[[], object], why: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=re.escape(why)):
        call()


def refusals(mesh: DeviceMesh, _: Path) -> None:
    model = served(CONFIG)
    parallelize(model, mesh)
    refused(lambda: model.merge_and_unload("m0"), "cut into shards cannot become a plain one")
    refused(lambda: parallelize(model, mesh), "must be whole to be cut")
    rotated = served(randes.Config(min_width=16, matrix="rotation", rank=0))
    before = shares(rotated)
    refused(lambda: parallelize(rotated, mesh), "model.layers.0.self_attn.o_proj: ")
    refused(lambda: parallelize(rotated, mesh), "a rotation cannot be cut")
    assert shares(rotated) == before  # nothing, though other layers came first
    kept = served(randes.Config(min_width=16, rank=0, exclude=("*q_proj*",)))
    refused(lambda: parallelize(kept, mesh), "q_proj: a RoutedLinear cannot be cut")
    three = served(CONFIG, num_attention_heads=3, num_key_value_heads=1)
    refused(lambda: parallelize(three, mesh), "must divide the model's num_attention_heads, 3, got 2 processes")
    packed = served(CONFIG, bits=4)  # in groups of 64 columns, of which this process could keep its own, or the other
    refused(lambda: parallelize(packed, mesh), "cannot be cut as asked: D in 4 bits can be cut at multiples of 64")
    whole = served(CONFIG)
    odd = {"model.layers.*.mlp.up_proj": "sequence_parallel"}
    refused(lambda: parallelize(whole, mesh, odd), "got 'sequence_parallel': model.layers.0.mlp.up_proj")
    refused(lambda: parallelize(whole, mesh, {"nothing": ColumnParallel()}), "name layers of the model, got 'nothing'")
    refused(lambda: parallelize(whole, mesh, {"model.norm": "colwise"}), "a RoutedLlamaRMSNorm cannot be cut")
    refused(lambda: parallelize(llama(), mesh), "must be one that serves a superposition, got a LlamaForCausalLM")
    net = nn.Sequential(nn.Linear(40, 40))
    sup, _ = superposed(net, 1, CONFIG)
    refused(lambda: parallelize(randes.SuperposedModel(net, sup), mesh), "plan must be given for a Sequential")
    assert shares(whole) == before


def cut_by_transformers(_: DeviceMesh, folder: Path) -> None:
    """By its own ``tp_plan``, whose layers know nothing of what serves: refused, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        load = hf.AutoModelForCausalLM.from_pretrained
        refused(lambda: load(folder / "store", tp_plan="auto"), "must be left out: several devices share it once")


CHECKS = (
    a_llama, with_biases_and_a_basis, fused_attention_and_experts, packed, permuted_in_segments,
    tied_heads_and_embeddings, loaded_by_transformers, models_come_and_go, styles_of_torch, the_program_of_the_page,
    refusals, cut_by_transformers,
)  # fmt: skip


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for check in CHECKS:
        try:
            check(mesh, folder)
            found[check.__name__] = ""
        except Exception:  # said by the test of its name
            found[check.__name__] = traceback.format_exc()
            break  # the other process may wait for this one
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
