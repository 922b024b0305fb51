"""A whole model whose rows belong to different fine-tunes: each is answered as its model alone would be."""

import copy
import inspect
import itertools
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import (
    CLOSE,
    TRANSFORMS,
    Net,
    Scaled,
    alone,
    counted,
    finetune,
    linear,
    net,
    plain_names,
    superposed,
    tokens,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randes


def expected(base: nn.Module, superposition: randes.Superposition, x: Tensor, names: list[str]) -> Tensor:
    """Each row answered by a plain model of its own."""
    return torch.cat([alone(base, superposition, name)(row[None]) for name, row in zip(names, x, strict=True)])


@pytest.fixture
def served() -> tuple[randes.SuperposedModel, randes.Superposition, Net]:
    base = net()
    sup, _ = superposed(base, 3)
    return randes.SuperposedModel(copy.deepcopy(base), sup), sup, base


@pytest.mark.parametrize(
    ("transform", "others"), [(t, "keep") for t in TRANSFORMS] + [("both", "base"), ("both", "average")]
)
def test_every_row_of_a_mixed_batch_is_answered_as_its_model_alone(transform: str, others: str) -> None:
    base = net()
    config = randes.Config(**(TRANSFORMS[transform].to_dict() | {"others": others}))
    sup, _ = superposed(base, 5, config)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    names = ["m3", "__base__", "m0", "m4", "m0", "m1", "m2"]
    x = tokens(len(names))
    y = model(x, adapter_names=names)
    torch.testing.assert_close(y, expected(base, sup, x, names), **CLOSE)
    spread = torch.stack([(y[0] - alone(base, sup, other)(x[:1])[0]).abs().max() for other in names[1:]])
    assert spread.min() > 100 * CLOSE["atol"]  # no other model would have passed


@pytest.mark.parametrize("size", [1, 3])
def test_models_of_several_groups_share_a_batch(size: int) -> None:
    base = net()
    sup, tuned = superposed(base, 4, randes.Config(group_size=size))
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    names = ["m3", "m2", "m1", "__base__", "m0"]
    x = tokens(5)
    y = model(x, adapter_names=names)
    torch.testing.assert_close(y, expected(base, sup, x, names), **CLOSE)
    if size == 1:  # no neighbours, no interference: the fine-tune itself
        torch.testing.assert_close(y[:1], tuned["m3"](x[:1]), rtol=0, atol=0.01)


def test_a_model_that_left_a_layer_alone_is_answered_with_the_base_layer() -> None:
    base = net()
    sup, _ = superposed(base, 2)
    partly = base.state_dict() | {"layers.0.up.weight": finetune(base, 7).state_dict()["layers.0.up.weight"]}
    sup.add("partly", partly)
    sup.add("same", base)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    names = ["same", "m0", "partly", "m1"]
    x = tokens(4)
    torch.testing.assert_close(model(x, adapter_names=names), expected(base, sup, x, names), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_stay_near_the_fp32_answer(dtype: torch.dtype) -> None:
    base = net(dtype=dtype)
    sup, _ = superposed(base, 3)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    names = ["m2", "__base__", "m0", "m1"]
    x = tokens(4)
    exact = expected(copy.deepcopy(base).float(), sup, x, names)
    y = model(x, adapter_names=names)
    assert y.dtype == dtype
    plain = expected(base, sup, x, names).float()
    assert (y.float() - exact).norm() < 3 * (plain - exact).norm() + torch.finfo(dtype).eps * exact.norm()


def test_an_fp32_superposition_serves_a_half_model() -> None:
    base = net()
    sup, _ = superposed(base, 2)
    model = randes.SuperposedModel(copy.deepcopy(base).half(), sup)
    names = ["m1", "m0"]
    x = tokens(2)
    y = model(x, adapter_names=names)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), expected(base, sup, x, names), rtol=0.01, atol=0.02)


def test_the_base_is_answered_to_the_bit_and_keeps_its_parameters() -> None:
    base = net()
    sup, _ = superposed(base, 2)
    served = copy.deepcopy(base)
    parameters = {id(parameter) for parameter in served.parameters()}
    model = randes.SuperposedModel(served, sup)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert model.base_model is served
    assert plain_names(model) == base.state_dict().keys()
    for layer in served.layers:
        assert isinstance(layer.up, randes.SuperposedLinear)
    x = tokens(3)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x, adapter_names=["__base__"] * 3), base(x))
    model.set_adapter("__base__")
    assert torch.equal(model(x), base(x))


def test_a_chosen_model_answers_every_row_until_another_is_chosen(served: Any) -> None:
    model, sup, base = served
    x = tokens(3)
    for name in ("m1", "m0"):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), expected(base, sup, x, [name] * 3), **CLOSE)
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
            mixed = model(x, adapter_names=["m2", "m2", name])  # a call's own names count
        torch.testing.assert_close(mixed, expected(base, sup, x, ["m2", "m2", name]), **CLOSE)
        torch.testing.assert_close(model(x), expected(base, sup, x, [name] * 3), **CLOSE)


def test_a_failed_call_leaves_no_choice_behind(served: Any) -> None:
    model, _, base = served
    x = tokens(2)
    with pytest.raises(TypeError):
        model(x, 3, adapter_names=["m0", "m1"])
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="no model is chosen"):
        model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


def test_without_a_chosen_model_there_is_no_answer(served: Any) -> None:
    model, _, _ = served
    with pytest.raises(RuntimeError, match=r"no model is chosen: call set_adapter\(name\)"):
        model(tokens(2))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["m0"], ValueError, "one name a row of the batch, 3, got 1"),
        (["m0"] * 4, ValueError, "one name a row of the batch, 3, got 4"),
        ([], ValueError, "list with one name a row"),
        ("m0", ValueError, "list with one name a row"),
        ("abc", ValueError, "list with one name a row"),
        (["m0", "m9", "m1"], randes.UnknownModelError, "no model is called 'm9'; there are: m0, m1, m2"),
        (["m0", None, "m1"], randes.UnknownModelError, "no model is called None"),
        (["m0", "", "m1"], randes.UnknownModelError, "no model is called ''"),
    ],
)
def test_names_that_do_not_fit_the_batch_are_refused(served: Any, names: Any, error: Any, message: str) -> None:
    model, sup, base = served
    model.set_adapter("m1")
    with pytest.raises(error, match=message):
        model(tokens(3), adapter_names=names)
    torch.testing.assert_close(model(tokens(3)), expected(base, sup, tokens(3), ["m1"] * 3), **CLOSE)


def test_a_name_that_only_reads_like_a_model_is_unknown() -> None:
    sup = randes.Superposition.create(linear())
    sup.add("1", finetune(linear(), 1))
    model = randes.SuperposedModel(linear(), sup)
    with pytest.raises(randes.UnknownModelError):
        model(torch.ones(1, 32), adapter_names=[1])


def test_an_unknown_model_is_never_chosen(served: Any) -> None:
    model, sup, base = served
    model.set_adapter("m1")
    for name in ("m9", "", "base"):
        with pytest.raises(randes.UnknownModelError, match="there are: m0, m1, m2"):
            model.set_adapter(name)
    x = tokens(2)
    torch.testing.assert_close(model(x), expected(base, sup, x, ["m1", "m1"]), **CLOSE)


def test_threads_with_different_models_get_their_own_answers(served: Any) -> None:
    model, sup, base = served
    x = tokens(2)
    mixes = [["m0", "m1"], ["m2", "__base__"], ["m1", "m1"]]
    answers = [expected(base, sup, x, names).detach() for names in mixes]
    wrong: list[Any] = []
    barrier = threading.Barrier(len(mixes))

    def ask(names: list[str], answer: Tensor) -> None:
        barrier.wait()
        for _ in range(20):
            if not torch.allclose(model(x, adapter_names=names), answer, **CLOSE):
                wrong.append(names)

    threads = [threading.Thread(target=ask, args=job) for job in zip(mixes, answers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Encoder(nn.Module):
    """Two layers, in threads where it is told to, and a method that is not ``forward``."""

    def __init__(self, in_threads: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.in_threads = linear(48, 48), linear(48, 48), in_threads

    def encode(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_threads:
            return self.encode(x)
        with ThreadPoolExecutor(2) as threads:
            one, other = threads.map(lambda layer: layer(x), (self.a, self.b))
        return one + other


@torch.no_grad()
@pytest.mark.parametrize("way", ["call", "method", "base", "base's method in a scope"])
def test_a_call_has_one_choice_from_its_beginning_to_its_end(way: str) -> None:
    base, x = Encoder(), torch.randn(3, 48)
    sup, _ = superposed(base, 2)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "call": model, "method": model.encode, "base": model.base_model,
        "base's method in a scope": model.using(["m0"])(model.base_model.encode),
    }  # fmt: skip
    model.set_adapter("m0")
    hook = model.base_model.a.register_forward_hook(lambda *_: model.set_adapter("m1"))  # as another thread may
    y = ways[way](x)
    hook.remove()
    torch.testing.assert_close(y, expected(base, sup, x, ["m0"] * 3), **CLOSE)
    assert model.active_adapter == "m1"


@torch.no_grad()
def test_threads_that_a_call_starts_never_answer_as_what_was_chosen_for_all() -> None:
    base, x = Encoder(in_threads=True), torch.randn(3, 48)
    sup, _ = superposed(base, 2)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    model.set_adapter("m0")
    torch.testing.assert_close(model(x), expected(base, sup, x, ["m0"] * 3), **CLOSE)
    refused = "called in a thread that chose no model while another thread answers as others than 'm0'"
    for names in (["m1"] * 3, ["m0", "m1", "m0"], ["__base__"] * 3):
        with pytest.raises(RuntimeError, match=refused):
            model(x, adapter_names=names)
        with pytest.raises(RuntimeError, match=refused), model.using(names):
            model(x)
    hook = model.base_model.register_forward_pre_hook(lambda *_: model.set_adapter("m1"))
    with pytest.raises(RuntimeError, match="others than 'm1'"):
        model(x)
    hook.remove()
    with ThreadPoolExecutor(1) as other, model.using(["m0"] * 3):  # whole models are called in any thread
        torch.testing.assert_close(other.submit(model.encode, x).result(), Encoder.encode(alone(base, sup, "m1"), x))
    torch.testing.assert_close(model(x), expected(base, sup, x, ["m1"] * 3), **CLOSE)


@torch.no_grad()
def test_a_module_that_is_served_is_exported_and_asked_for_its_arguments_as_before() -> None:
    base, x = Encoder(), torch.randn(3, 48)
    sup, _ = superposed(base, 2)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    model.set_adapter("m1")
    assert inspect.signature(model.base_model.forward) == inspect.signature(base.forward)
    program = torch.export.export(model.base_model, (x,)).module()
    torch.testing.assert_close(program(x), expected(base, sup, x, ["m1"] * 3), **CLOSE)
    again = pickle.loads(pickle.dumps(model.base_model))
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_recomputed_forward_answers_as_its_context_says(in_a_thread: bool) -> None:
    # The backward pass of a GPU runs in a thread of its own, which has no choice of models.
    base, x = Encoder(), torch.randn(3, 48, requires_grad=True)
    sup, _ = superposed(base, 2)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    model.set_adapter("m0")
    (right,) = torch.autograd.grad(alone(base, sup, "m1")(x).sum(), x)

    def gradient(**settings: Any) -> Tensor:
        with model.using(["m1"]):
            y = checkpoint(model.base_model, x, use_reentrant=False, **settings).sum()
            if not in_a_thread:
                return torch.autograd.grad(y, x)[0]
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(torch.autograd.grad, y, x).result()[0]

    contexts = {"context_fn": lambda: (nullcontext(), model.using(["m1"]))}
    torch.testing.assert_close(gradient(**contexts), right, **CLOSE)
    if not in_a_thread:
        torch.testing.assert_close(gradient(), right, **CLOSE)


def test_disabling_adapters_in_one_thread_leaves_the_others_alone(served: Any) -> None:
    model, sup, base = served
    model.set_adapter("m1")
    x = tokens(2)
    answers: list[Tensor] = []
    with model.disable_adapter():
        thread = threading.Thread(target=lambda: answers.append(model(x)))
        thread.start()
        thread.join()
        assert torch.equal(model(x), base(x))
    torch.testing.assert_close(answers[0], expected(base, sup, x, ["m1", "m1"]), **CLOSE)


@pytest.fixture
def recompiled_at_most_twice() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("recompiled_at_most_twice")
def test_one_compiled_model_answers_any_number_of_mixes(served: Any) -> None:
    model, sup, base = served
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x, names = tokens(3), [*sup.names, "__base__"]
    for mix in itertools.islice(itertools.permutations(names, 3), 4):
        torch.testing.assert_close(compiled(x, adapter_names=model.batch(mix)), expected(base, sup, x, mix), **CLOSE)


def test_warming_up_runs_every_kind_of_layer_and_changes_nothing(served: Any) -> None:
    model, sup, base = served
    model.set_adapter("m1")
    seen = []
    layers = [layer for layer in model.modules() if isinstance(layer, randes.SuperposedLinear)]
    hooks = [layer.register_forward_hook(lambda layer, x, _: seen.append((layer, len(x[0])))) for layer in layers]
    model.warm_up(rows=(1, 5))
    for hook in hooks:
        hook.remove()
    assert {tuple(layer.weight.shape) for layer, _ in seen} == {tuple(layer.weight.shape) for layer in layers}
    assert {count for _, count in seen} == {1, 5}
    assert all(layer.base_weight.grad is None for layer in layers)
    x = tokens(2)
    torch.testing.assert_close(model(x), expected(base, sup, x, ["m1", "m1"]), **CLOSE)
    with pytest.raises(ValueError, match=r"rows must be numbers of at least 1, got \[4, 0\]"):
        model.warm_up(rows=(4, 0))


@pytest.mark.no_cover
def test_one_program_serves_a_hundred_batches(served: Any) -> None:
    model, sup, base = served
    compiled, programs = counted(model, dynamic=True)
    names, generator = [*sup.names, "__base__"], random.Random(0)
    for _ in range(100):
        rows = generator.randint(2, 40)
        known = generator.sample(names, generator.randint(1, len(names)))
        mix = generator.choices(known, k=rows)
        x = tokens(rows)
        torch.testing.assert_close(compiled(x, adapter_names=model.batch(mix)), expected(base, sup, x, mix), **CLOSE)
    assert len(programs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("transform", ["both", "everything"])
def test_a_compiled_model_answers_as_the_model(transform: str) -> None:
    base = net()
    sup, _ = superposed(base, 3, TRANSFORMS[transform])
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = tokens(3)
    for mix in (["m0", "m1", "__base__"], ["m2"] * 3):
        torch.testing.assert_close(compiled(x, adapter_names=mix), expected(base, sup, x, mix), **CLOSE)


@pytest.mark.usefixtures("recompiled_at_most_twice")
def test_choosing_another_model_does_not_compile_anew(served: Any) -> None:
    model, sup, base = served
    compilations = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    x = tokens(3)
    for name in sup.names:
        model.set_adapter(name)
        torch.testing.assert_close(compiled(x), expected(base, sup, x, [name] * 3), **CLOSE)
    assert len(compilations) == 1


@pytest.mark.usefixtures("recompiled_at_most_twice")
def test_a_compiled_base_model_is_compiled_once_for_all_mixes() -> None:
    base = net()
    sup, _ = superposed(base, 3, TRANSFORMS["everything"])
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model.base_model.compile(fullgraph=True, backend=count)
    x = tokens(3)
    for mix in (["m0", "m1", "__base__"], ["m2", "__base__", "m2"], ["m1", "m0", "m1"]):
        torch.testing.assert_close(model(x, adapter_names=mix), expected(base, sup, x, mix), **CLOSE)
    assert len(graphs) == 1


@pytest.mark.parametrize("change", [copy.deepcopy, lambda model: model.double(), lambda model: model.to("cpu")])
def test_a_copied_or_converted_model_answers_the_same(served: Any, change: Callable[[nn.Module], nn.Module]) -> None:
    model, sup, base = served
    x, names = tokens(3), ["m2", "__base__", "m1"]
    y = change(model)(x, adapter_names=names)
    torch.testing.assert_close(y.float(), expected(base, sup, x, names), **CLOSE)


def test_a_deep_copy_has_choices_of_its_own(served: Any) -> None:
    model, sup, base = served
    copied = copy.deepcopy(model)
    copied.set_adapter("m0")
    x = tokens(2)
    torch.testing.assert_close(copied(x), expected(base, sup, x, ["m0", "m0"]), **CLOSE)
    with pytest.raises(RuntimeError, match="no model is chosen"):
        model(x)


def unfit(kind: str) -> nn.Module:
    if kind == "one value differs":
        changed = net()
        with torch.no_grad():
            changed.head.bias[0] += 1e-3
        return changed
    return {"other weights": net(1), "other layers": linear(), "other shape": nn.Sequential(*[linear()] * 2)}[kind]


@pytest.mark.parametrize("kind", ["one value differs", "other weights", "other layers", "other shape"])
def test_the_module_must_hold_the_base_and_is_left_alone_otherwise(kind: str) -> None:
    sup, _ = superposed(net(), 1)
    module = unfit(kind)
    classes = [type(layer) for layer in module.modules()]
    with pytest.raises(randes.BaseMismatchError):
        randes.SuperposedModel(module, sup)
    assert [type(layer) for layer in module.modules()] == classes


@pytest.mark.parametrize("layer", [nn.MultiheadAttention(32, 4), nn.TransformerEncoderLayer(32, 4, 64), Scaled()])
def test_layers_that_would_silently_answer_as_the_base_are_refused(layer: nn.Module) -> None:
    if isinstance(layer, Scaled):
        layer.weight = nn.Parameter(torch.ones(32, 32))
    base = nn.Sequential(linear(32, 32), layer)
    sup, _ = superposed(base, 1)
    classes = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=type(layer).__name__):
        randes.SuperposedModel(base, sup)
    assert [type(module) for module in base.modules()] == classes


def test_a_superposed_model_is_not_superposed_again(served: Any) -> None:
    model, sup, _ = served
    with pytest.raises(ValueError, match="served by a superposition already"):
        randes.SuperposedModel(model.base_model, sup)


def test_the_active_models_are_a_scopes_or_the_chosen_one(served: Any) -> None:
    model, _, _ = served
    assert (model.active_adapters, model.active_adapter) == ([], None)
    model.set_adapter("m1")
    assert (model.active_adapters, model.active_adapter) == (["m1"], "m1")
    with model.using(["m2", "m0", "m2"]):
        assert (model.active_adapters, model.active_adapter) == (["m2", "m0"], None)
        with model.disable_adapter():
            assert model.active_adapter == "__base__"
    assert model.active_adapter == "m1"


def described(module: nn.Module) -> list[Any]:
    """Everything that a module is made of, by name, but for its weights."""
    stores = ("_buffers", "_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks")
    return [
        (name, type(layer), sorted(vars(layer)), layer.extra_repr(), [list(vars(layer)[store]) for store in stores])
        for name, layer in module.named_modules()
    ]


@pytest.mark.parametrize("config", ["both", "everything", "average", "centred"])
def test_one_model_is_merged_into_a_plain_module(config: str) -> None:
    base = net()
    more = {"average": randes.Config(others="average"), "centred": randes.Config(centre=True)}
    tuned = {f"m{number}": finetune(base, number) for number in range(3)}
    sup = randes.compress(copy.deepcopy(base), tuned, {**TRANSFORMS, **more}[config])
    module = copy.deepcopy(base)
    calls: list[Any] = []
    hook = module.layers[0].up.register_forward_hook(lambda *_: calls.append(1))
    before, weights = described(module), {name: value.clone() for name, value in module.state_dict().items()}
    mine = dict(module.named_parameters())
    model = randes.SuperposedModel(module, sup)
    model.set_adapter("m1")
    plain = model.merge_and_unload()
    assert plain is module
    assert described(plain) == before
    retrieved = sup.retrieve("m1")
    assert plain.state_dict().keys() == retrieved.keys()
    assert all(torch.equal(value, retrieved[name]) for name, value in plain.state_dict().items())
    assert all(torch.equal(mine[name], weights[name]) for name in mine)  # tensors that others may hold are left alone
    x = tokens(3)
    assert torch.equal(plain(x), alone(base, sup, "m1")(x))
    assert calls
    hook.remove()
    with pytest.raises(RuntimeError, match="was unloaded: call the module"):
        model(x)
    with pytest.raises(randes.UnknownModelError, match="there are: no models"):
        model(x, adapter_names=["m1"] * 3)
    assert model.active_adapters == []


def test_the_base_comes_back_to_the_bit_with_its_own_parameters() -> None:
    base = net()
    sup, _ = superposed(base, 2)
    module = copy.deepcopy(base)
    before, parameters = described(module), [*map(id, module.parameters())]
    again = randes.SuperposedModel(module, sup).unload()
    assert described(again) == before
    assert [*map(id, again.parameters())] == parameters
    assert torch.equal(again(tokens(2)), base(tokens(2)))
    check = randes.SuperposedModel(again, sup)  # it can be served again
    torch.testing.assert_close(
        check(tokens(2), adapter_names=["m0", "m1"]), expected(base, sup, tokens(2), ["m0", "m1"]), **CLOSE
    )


def test_a_merged_module_keeps_its_dtype_its_ties_and_what_needs_no_gradient() -> None:
    base = nn.Sequential(nn.Embedding(40, 32), linear(32, 32), nn.Linear(32, 40, bias=False))
    base[2].weight = base[0].weight
    sup = randes.Superposition.create(copy.deepcopy(base))
    sup.add("m0", finetune(base, 0))
    module = copy.deepcopy(base).half().requires_grad_(False)
    merged = randes.SuperposedModel(module, sup).merge_and_unload("m0")
    assert merged[0].weight is merged[2].weight
    assert {value.dtype for value in merged.parameters()} == {torch.float16}
    assert not any(value.requires_grad for value in merged.parameters())
    retrieved = sup.retrieve("m0")
    assert all(torch.equal(value, retrieved[name].half()) for name, value in merged.state_dict().items())


def test_which_model_is_merged_must_be_known(served: Any) -> None:
    model, _, base = served
    with pytest.raises(RuntimeError, match="no model is chosen"):
        model.merge_and_unload()
    with pytest.raises(randes.UnknownModelError, match="no model is called 'm9'"):
        model.merge_and_unload("m9")
    with model.using(["m0", "m1"]), pytest.raises(ValueError, match="name must be given where several models are act"):
        model.merge_and_unload()
    with model.disable_adapter():
        assert torch.equal(model(tokens(2)), base(tokens(2)))


def test_a_module_that_cannot_be_served_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base = net()
    sup = randes.compress(copy.deepcopy(base), {"m0": finetune(base, 0)}, randes.Config(centre=True))
    module = copy.deepcopy(base)
    before, parameters = described(module), [*map(id, module.parameters())]

    def refuse(*_: Any) -> None:
        raise ValueError("the superposition must fit")

    monkeypatch.setattr(randes.serving.layers.delta_pool.DeltaPool, "_check_finite", refuse)
    with pytest.raises(ValueError, match="the superposition must fit"):
        randes.SuperposedModel(module, sup)
    assert described(module) == before
    assert [*map(id, module.parameters())] == parameters


# ---------------------------------------------------------------- batches that are filled again


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_is_filled_with_other_models_in_place(served: Any, rows: int) -> None:
    model, sup, base = served
    x, batch = tokens(rows), model.batch(["__base__"] * rows, refillable=True)
    where = batch.ids.data_ptr()
    compiled, programs = counted(model)
    for names in (["m0", "m1", "m2"], ["__base__"] * 3, ["m2", "__base__", "m2"], ["m1"] * 3):
        batch.fill(names[:rows])
        right = expected(base, sup, x, names[:rows])
        torch.testing.assert_close(model(x, adapter_names=batch), right, **CLOSE)
        torch.testing.assert_close(compiled(x, adapter_names=batch), right, **CLOSE)
    assert batch.ids.data_ptr() == where
    assert len(programs) == 1


def test_what_a_batch_cannot_be_filled_with_is_refused(served: Any) -> None:
    model, _, _ = served
    batch = model.batch(["m0", "m1"], refillable=True)
    with pytest.raises(ValueError, match="one a row of the batch, 2, got 3"):
        batch.fill(["m0"] * 3)
    with pytest.raises(randes.UnknownModelError, match="no model is called 'm9'"):
        batch.fill(["m0", "m9"])
    with pytest.raises(ValueError, match="made with refillable=True"):
        model.batch(["m0", "m1"]).fill(["m1", "m0"])
    assert batch.ids.tolist() == [0, 1]


class Scales(nn.Module):
    """A layer of a kind that takes no row's own in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def test_a_layer_that_runs_once_for_each_model_refuses_a_batch_that_may_change() -> None:
    base = nn.Sequential(linear(32, 32), Scales())
    sup, _ = superposed(base, 2)
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x, names = torch.ones(2, 32), ["m0", "m1"]
    torch.testing.assert_close(model(x, adapter_names=names), expected(base, sup, x, names), **CLOSE)
    with pytest.raises(ValueError, match="refillable batch cannot pass a layer that runs once for each model"):
        model(x, adapter_names=model.batch(names, refillable=True))


def test_a_filled_batch_keeps_what_its_models_need_and_gives_back_what_they_do_not() -> None:
    base = net()
    sup, _ = superposed(base, 2, randes.Config(group_size=2))
    model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=2)
    x, tuned = tokens(2), finetune(base, 9)
    batch = model.batch(["m0", "m1"], refillable=True)
    before = model(x, adapter_names=batch)
    model.delete_adapter("m1", finetune(base, 1))  # m0's group changes: the batch has the one from before
    assert torch.equal(model(x, adapter_names=batch), before)
    with pytest.raises(randes.CapacityError):
        model.add_adapter("m9", tuned, group=0)  # no room beside what the batch keeps
    batch.fill(["m0", "__base__"])
    model.add_adapter("m9", tuned, group=0)
    batch.fill(["m9", "m0"])
    torch.testing.assert_close(model(x, adapter_names=batch), expected(base, sup, x, ["m9", "m0"]), **CLOSE)
