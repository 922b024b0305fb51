"""Models join and leave while others are answered: nobody gets another's answer, and nothing is left over."""

import copy
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TRANSFORMS, alone, counted, finetune, net, stored, superposed
from torch import Tensor, nn

import randes
from randes.serving.layers.delta_pool import DeltaPool
from randes.serving.table_rows import Rows, put

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
CONFIGS = {name: TRANSFORMS[name] for name in ("both", "everything")} | {
    "small groups": randes.Config(group_size=2),
    "average": randes.Config(others="average"),
    "base": randes.Config(others="base"),
    "embedding": randes.Config(include=("*weight",), exclude=("*norm*",), embeddings="shared", min_width=5),
    "basis": randes.Config(rank=3),
    "centred": randes.Config(centre=True),
}


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(0, 11, (rows, 4), generator=torch.Generator().manual_seed(rows))


def expected(base: nn.Module, superposition: randes.Superposition, x: Tensor, names: list[str]) -> Tensor:
    """Each row answered by a plain model of its own."""
    return torch.cat([alone(base, superposition, name)(row[None]) for name, row in zip(names, x, strict=True)])


def made(config: randes.Config | None = None, capacity: int | None = 4, models: int = 3) -> tuple[Any, ...]:
    """A model that serves m0, m1, ..., its base, and these fine-tunes and more."""
    base = net()
    tuned = {f"m{number}": finetune(base, number) for number in range(6)}
    first = dict(list(tuned.items())[:models])
    if config is not None and (config.rank or config.centre):
        sup = randes.compress(copy.deepcopy(base), first, config)
    else:
        sup, _ = superposed(base, models, config)
    return randes.SuperposedModel(copy.deepcopy(base), sup, capacity=capacity), sup, base, tuned


def check(model: randes.SuperposedModel, sup: randes.Superposition, base: nn.Module, names: list[str]) -> None:
    """Rows of all these models, and one model at a time: as plain models answer, and as a new SuperposedModel does."""
    assert model.names == sorted(names)
    anew = randes.SuperposedModel(copy.deepcopy(base), sup)
    mix = [*names, "__base__", *names[:1]]
    x = tokens(len(mix))
    torch.testing.assert_close(model(x, adapter_names=mix), anew(x, adapter_names=mix), rtol=1e-6, atol=1e-6)
    plain = [name for name in mix if name != "__base__" or not sup.config.centre]
    torch.testing.assert_close(
        model(x[: len(plain)], adapter_names=plain), expected(base, sup, x[: len(plain)], plain), **CLOSE
    )
    for name in names:
        assert torch.equal(model(x, adapter_names=[name] * len(x)), anew(x, adapter_names=[name] * len(x)))


@pytest.mark.parametrize("config", CONFIGS)
def test_models_that_come_and_go_leave_what_a_new_model_would_serve(config: str) -> None:
    model, sup, base, tuned = made(CONFIGS[config])
    check(model, sup, base, ["m0", "m1", "m2"])
    model.add_adapter("m3", tuned["m3"], alpha=0.9)
    check(model, sup, base, ["m0", "m1", "m2", "m3"])
    model.delete_adapter("m1", tuned["m1"])
    assert sup.names == ["m0", "m2", "m3"]
    check(model, sup, base, ["m0", "m2", "m3"])
    model.add_adapter("m4", tuned["m4"].state_dict())
    check(model, sup, base, ["m0", "m2", "m3", "m4"])
    for name in ("m0", "m2", "m3", "m4"):
        model.delete_adapter(name, tuned[name])
    assert model.names == sup.names == []
    model.add_adapter("m1", tuned["m1"])
    check(model, sup, base, ["m1"])


def test_a_model_that_began_with_nobody_serves_who_comes() -> None:
    base = net()
    sup = randes.Superposition.create(copy.deepcopy(base))
    model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=3)
    for number in range(3):
        model.add_adapter(f"m{number}", finetune(base, number))
        check(model, sup, base, [f"m{other}" for other in range(number + 1)])


class Deep(nn.Module):
    """A wide table, and tensors that are routed only once somebody has an own one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3000, 32)
        self.scale = Scale()
        self.linear = nn.Linear(32, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.scale(self.embed(tokens)).mean(1))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(32))
        self.register_buffer("shift", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by + self.shift


def test_tensors_that_nobody_had_an_own_of_come_to_be_kept() -> None:
    torch.manual_seed(0)
    base = Deep()
    only_linear = base.state_dict() | {"linear.weight": finetune(base, 0).linear.weight}
    sup = randes.Superposition.create(copy.deepcopy(base))
    sup.add("m0", only_linear)
    model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=4)
    assert type(model.base_model.scale) is Scale  # it runs once for each model when it is routed
    x, mix = torch.randint(0, 3000, (3, 5)), ["m0", "__base__", "m0"]
    before = model(x, adapter_names=mix)
    torch.testing.assert_close(before, expected(base, sup, x, mix), **CLOSE)
    tuned = finetune(base, 1)
    tuned.scale.shift += 0.5
    model.add_adapter("m1", tuned)
    mix = ["m0", "m1", "__base__"]
    torch.testing.assert_close(model(x, adapter_names=mix), expected(base, sup, x, mix), **CLOSE)
    plain = model.merge_and_unload("m1")
    assert [type(layer) for layer in plain.modules()] == [type(layer) for layer in base.modules()]
    assert torch.equal(plain(x), alone(base, sup, "m1")(x))


def during(model: randes.SuperposedModel, change: Callable[[], None]) -> Callable[..., None]:
    """A hook that runs ``change`` once, in the middle of a call, in another thread, and waits for it."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            change()
        except BaseException as error:
            errors.append(error)

    def hook(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]

    handle = model.base_model.layers[1].register_forward_hook(hook)
    return hook


@pytest.mark.parametrize("how", ["names", "one name", "chosen", "scope", "batch"])
def test_a_call_under_way_sees_one_version_of_everything(how: str) -> None:
    model, sup, base, tuned = made()
    x, mix = tokens(), ["m0"] * 3 if how in ("one name", "chosen") else ["m0", "m1", "m0"]
    old, batch = model(x, adapter_names=mix), model.batch(mix)
    if how == "chosen":
        model.set_adapter("m0")

    def ask() -> Tensor:
        y: Tensor = model(x) if how == "chosen" else model(x, adapter_names=batch if how == "batch" else mix)
        return y

    def change() -> None:
        model.delete_adapter("m1", tuned["m1"])
        assert model.names == ["m0", "m2"]

    during(model, change)
    if how == "scope":
        with model.using(mix):
            assert torch.equal(model(x), old)
            assert torch.equal(model(x), old)  # the whole scope
    else:
        assert torch.equal(ask(), old)
    now = model(x, adapter_names=["m0"] * 3)
    torch.testing.assert_close(now, expected(base, sup, x, ["m0"] * 3), **CLOSE)
    assert not torch.allclose(now[:1], old[:1], atol=1e-3)  # its neighbour's noise has gone


def test_a_batch_means_the_same_models_for_as_long_as_it_lives() -> None:
    model, sup, base, tuned = made(randes.Config(group_size=1), capacity=3)
    x = tokens()
    batch = model.batch(["m1", "m0", "m1"])
    old = model(x, adapter_names=batch)
    model.delete_adapter("m1", tuned["m1"])
    model.add_adapter("m3", tuned["m3"])
    with pytest.raises(randes.UnknownModelError, match="no model is called 'm1'; there are: m0, m2, m3"):
        model(x, adapter_names=["m1"] * 3)
    assert torch.equal(model(x, adapter_names=batch), old)
    # What the batch needs is in use, and given to nobody: the next change has to wait for its end.
    with pytest.raises(randes.CapacityError, match="no free superposition for group 1 among 4"):
        model.delete_adapter("m3", tuned["m3"])
    assert model.names == sup.names == ["m0", "m2", "m3"]
    assert torch.equal(model(x, adapter_names=batch), old)
    del batch
    model.delete_adapter("m3", tuned["m3"])
    model.add_adapter("m4", tuned["m4"])
    check(model, sup, base, ["m0", "m2", "m4"])


def test_an_error_that_is_kept_holds_no_model() -> None:
    model, _, _, tuned = made()
    kept: list[Exception] = []
    for _ in range(3):
        for change in (model.delete_adapter, model.add_adapter):
            change("m0", tuned["m0"])
            try:
                model(tokens(), adapter_names=["m9"] * 3)
            except randes.UnknownModelError as error:
                kept.append(error)
    assert len(kept) == 6
    assert len(model._served._groups.taken) == 1


def test_a_backward_pass_after_a_change_is_that_of_its_forward() -> None:
    model, _, _, tuned = made()
    x, mix = tokens(), ["m0", "m1", "__base__"]
    model(x, adapter_names=mix).square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    batch = model.batch(mix)
    loss = model(x, adapter_names=batch).square().sum()
    model.add_adapter("m3", tuned["m3"])
    loss.backward()
    assert any(grad is not None and grad.any() for grad in grads)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None and grad is None) or torch.equal(parameter.grad, grad)


def test_threads_get_their_own_models_answers_while_others_come_and_go() -> None:
    model, sup, base, tuned = made(randes.Config(group_size=2), capacity=4, models=2)
    x, mixes = tokens(), [["m0", "m1", "__base__"], ["m1"] * 3, ["m0"] * 3]
    changes = [("m2", True), ("m3", True), ("m2", False), ("m3", False)]
    # What each mix may be answered: with any state of the superposition, and nothing between them.
    right: list[list[Tensor]] = [[] for _ in mixes]
    other = copy.deepcopy(base)
    states = randes.Superposition.create(other, sup.config)
    for name in ("m0", "m1"):
        states.add(name, tuned[name], group=1 if name == "m1" else 0)
    model.delete_adapter("m1", tuned["m1"])
    model.add_adapter("m1", tuned["m1"], group=1)  # both groups have room for a neighbour
    for name, comes in [("", False), *changes]:
        if name:
            states.add(name, tuned[name]) if comes else states.remove(name, tuned[name])
        answers = randes.SuperposedModel(copy.deepcopy(base), states)
        for mix, found in zip(mixes, right, strict=True):
            found.append(answers(x, adapter_names=mix).detach())
    assert min((a - b).abs().max() for a in right[1] for b in right[2]) > 0.01  # no other's would pass
    wrong: list[Any] = []
    seen = [0] * len(mixes)
    start, done = threading.Barrier(len(mixes) + 1), threading.Event()

    def ask(number: int) -> None:
        start.wait()
        while not done.is_set() or not seen[number]:
            y = model(x, adapter_names=mixes[number]).detach()
            if not any(torch.equal(y, answer) for answer in right[number]):
                wrong.append((number, y))
            seen[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(mixes))]
    for thread in threads:
        thread.start()
    start.wait()
    made_changes = 0
    try:
        while made_changes < 8:
            name, comes = changes[made_changes % len(changes)]
            try:
                (model.add_adapter if comes else model.delete_adapter)(name, tuned[name])
                made_changes += 1
            except randes.CapacityError:
                time.sleep(0.001)  # a call that began before the last change has not ended
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert min(seen) > 0
    check(model, sup, base, ["m0", "m1"])


def test_nothing_is_compiled_anew_when_models_come_and_go() -> None:
    model, sup, base, tuned = made(randes.Config(group_size=2), capacity=5)
    compiled, programs = counted(model, dynamic=True)
    steps = [("m3", True), ("m4", True), ("m0", False), ("m2", False), ("m5", True)]
    for rows, (name, comes) in enumerate(steps, 3):
        (model.add_adapter if comes else model.delete_adapter)(name, tuned[name])
        mix = [*model.names, "__base__"] * 3
        x = tokens(rows)
        answer = expected(base, sup, x, mix[:rows])
        torch.testing.assert_close(compiled(x, adapter_names=model.batch(mix[:rows])), answer, **CLOSE)
    assert len(programs) == 1
    torch._dynamo.reset()


def test_other_groups_answer_as_before_to_the_bit() -> None:
    model, _, _, tuned = made(randes.Config(group_size=2), models=3)
    x, mix = tokens(), ["m1", "__base__", "m0"]
    before, neighbour = model(x, adapter_names=mix), model(x, adapter_names=["m2"] * 3)
    model.add_adapter("m3", tuned["m3"])  # beside m2
    assert torch.equal(model(x, adapter_names=mix), before)
    assert not torch.allclose(model(x, adapter_names=["m2"] * 3), neighbour, atol=1e-3)
    model.delete_adapter("m3", tuned["m3"])
    assert torch.equal(model(x, adapter_names=["m2"] * 3), neighbour)


def test_no_buffer_moves_or_grows() -> None:
    model, _, _, tuned = made()
    places = {name: (value.data_ptr(), value.shape) for name, value in model.named_buffers()}
    model.add_adapter("m3", tuned["m3"])
    model.delete_adapter("m0", tuned["m0"])
    assert {name: (value.data_ptr(), value.shape) for name, value in model.named_buffers()} == places


def tensors_alive() -> int:
    gc.collect()
    return sum(value.nbytes for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter))


@pytest.mark.no_cover
def test_a_thousand_cycles_leave_nothing_behind() -> None:
    base = nn.Linear(32, 32)
    sup, _ = superposed(base, 2)
    extra = [finetune(base, 7).state_dict(), finetune(base, 8).state_dict()]
    model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=3)
    x = torch.ones(2, 32)
    start = model(x, adapter_names=["m0", "m1"])

    def cycle(number: int) -> None:
        name = f"extra {number % 2}"
        model.add_adapter(name, extra[number % 2])
        model(x, adapter_names=[name, "m0"])
        model.delete_adapter(name, extra[number % 2])

    for number in range(2):
        cycle(number)
    before, nbytes = tensors_alive(), sup.nbytes
    for number in range(1000):
        cycle(number)
    assert tensors_alive() < 1.01 * before
    assert sup.nbytes == nbytes
    assert torch.equal(model(x, adapter_names=["m0", "m1"]), start)


def test_without_its_checkpoint_a_model_is_served_no_more_and_stays_superposed() -> None:
    model, sup, base, tuned = made(capacity=None)
    x = tokens()
    old = model(x, adapter_names=["m0", "m1", "m2"])
    model.delete_adapter("m1")
    assert model.names == ["m0", "m2"]
    assert sup.names == ["m0", "m1", "m2"]
    with pytest.raises(randes.UnknownModelError, match="no model is called 'm1'; there are: m0, m2"):
        model(x, adapter_names=["m0", "m1", "m2"])
    assert torch.equal(model(x, adapter_names=["m0", "m0", "m2"])[::2], old[::2])
    with pytest.raises(randes.UnknownModelError, match="no model is called 'm1'"):
        model.delete_adapter("m1")
    with pytest.raises(ValueError, match="a model called 'm1' is there already"):
        model.add_adapter("m1", tuned["m1"])
    model.add_adapter("m1")
    assert torch.equal(model(x, adapter_names=["m0", "m1", "m2"]), old)
    check(model, sup, base, ["m0", "m1", "m2"])


@pytest.mark.parametrize("others", ["average", "sum"])
@pytest.mark.parametrize("capacity", [None, 3])
def test_what_models_share_stays_when_one_is_served_no_more(others: Any, capacity: int | None) -> None:
    model, sup, base, _ = made(randes.Config(others=others), capacity)
    model = copy.deepcopy(model)  # which knows what its rows were made of, too
    addresses = [value.data_ptr() for value in model.buffers()]
    for name in ("m1", "m0"):
        model.delete_adapter(name)
        check(model, sup, base, [n for n in ("m0", "m1", "m2") if n != name])
        model.add_adapter(name)
        check(model, sup, base, ["m0", "m1", "m2"])
    assert [value.data_ptr() for value in model.buffers()] == addresses


@pytest.mark.parametrize("config", ["both", "average", "embedding"])
def test_no_row_is_written_before_its_last_holder_s_work_is_done(config: str, monkeypatch: Any) -> None:
    """On a GPU work may be under way when a call has ended: a row that came free is waited for before it is filled."""
    model, _, _, tuned = made(CONFIGS[config])
    unsettled, written = [False], []
    take = Rows.take

    def taking(rows: Rows, what: str) -> Any:
        unsettled[0] = True
        return take(rows, what)

    def waiting(_: nn.Module) -> None:
        unsettled[0] = False

    def writing(table: Tensor, rows: Any, values: Tensor) -> None:
        assert not unsettled[0]
        written.append(table)
        put(table, rows, values)

    monkeypatch.setattr(Rows, "take", taking)
    monkeypatch.setattr("randes.serving.served_models._wait", waiting)
    for module in ("per_model", "linear", "superposed", "other_layers", "delta_pool"):
        monkeypatch.setattr(f"randes.serving.layers.{module}.put", writing)
    model.add_adapter("m3", tuned["m3"])
    model.delete_adapter("m0", tuned["m0"])
    assert written


def test_with_room_an_unserved_model_can_be_removed_and_its_group_taken_up_again() -> None:
    model, sup, base, tuned = made(randes.Config(group_size=1), capacity=3)
    for name in ("m0", "m1", "m2"):
        model.delete_adapter(name)
    assert model.names == []
    model.add_adapter("m2")
    model.add_adapter("m1")
    check(model, sup, base, ["m1", "m2"])
    model.delete_adapter("m0", tuned["m0"])
    assert sup.names == ["m1", "m2"]
    check(model, sup, base, ["m1", "m2"])


def test_what_was_superposed_beside_the_model_is_found_by_its_next_change() -> None:
    model, sup, base, tuned = made()
    sup.add("m3", tuned["m3"])
    assert model.names == ["m0", "m1", "m2"]
    model.add_adapter("m3")
    check(model, sup, base, ["m0", "m1", "m2", "m3"])
    fixed, sup, _, tuned = made(capacity=None)
    sup.add("m3", tuned["m3"])
    with pytest.raises(ValueError, match="must be made with room to change what it serves"):
        fixed.add_adapter("m3")


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    model, sup, base, tuned = made(capacity=3)
    x, mix = tokens(), ["m0", "m1", "m2"]
    before, answer = sup.members, model(x, adapter_names=mix)
    model.set_adapter("m1")
    refused: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: model.add_adapter("m3", tuned["m3"]), randes.CapacityError, "capacity is 3 models"),
        (lambda: model.add_adapter("m2", tuned["m3"]), ValueError, "a model called 'm2' is there already"),
        (lambda: model.add_adapter("m2"), ValueError, "a model called 'm2' is served already"),
        (lambda: model.add_adapter("m9"), randes.UnknownModelError, "no model is called 'm9'"),
        (lambda: model.add_adapter("__base__", tuned["m3"]), ValueError, "name must be a non-empty string other"),
        (lambda: model.delete_adapter("m9"), randes.UnknownModelError, "no model is called 'm9'"),
        (lambda: model.delete_adapter("m9", tuned["m0"]), randes.UnknownModelError, "no model is called 'm9'"),
        (lambda: model.delete_adapter("m1"), ValueError, "must not be the model that set_adapter chose, 'm1'"),
        (lambda: model.delete_adapter("__base__"), ValueError, "name must be a fine-tune's"),
        (lambda: model.delete_adapter("m0", tuned["m3"]), randes.CheckpointError, "not the checkpoint that was added"),
    ]
    for call, error, message in refused:
        with pytest.raises(error, match=message):
            call()
    assert sup.members == before
    assert model.active_adapter == "m1"
    assert torch.equal(model(x, adapter_names=mix), answer)
    for capacity in (2, 0, 3.0, "4"):
        with pytest.raises(ValueError, match="capacity must be an integer of at least the 3 models"):
            randes.SuperposedModel(copy.deepcopy(base), sup, capacity=capacity)  # type: ignore[arg-type]
    fixed = randes.SuperposedModel(copy.deepcopy(base), sup)
    with pytest.raises(ValueError, match=r"must be made with room .* capacity=16"):
        fixed.add_adapter("m3", tuned["m3"])
    with pytest.raises(ValueError, match="must be made with room"):
        fixed.delete_adapter("m0", tuned["m0"])


def test_packed_models_are_served_or_not_but_never_changed() -> None:
    _, sup, base, tuned = made(models=2)
    packed = sup.pack(4)
    with pytest.raises(ValueError, match="a packed superposition is for serving"):
        randes.SuperposedModel(copy.deepcopy(base), packed, capacity=4)
    model = randes.SuperposedModel(copy.deepcopy(base), packed)
    with pytest.raises(ValueError, match="a packed superposition is for serving"):
        model.add_adapter("m3", tuned["m3"])
    with pytest.raises(ValueError, match="a packed superposition is for serving"):
        model.delete_adapter("m0", tuned["m0"])
    x = tokens()
    old = model(x, adapter_names=["m1", "m0", "m1"])
    model.delete_adapter("m0")
    model.delete_adapter("m1")
    model.add_adapter("m1")
    model.add_adapter("m0")
    assert torch.equal(model(x, adapter_names=["m1", "m0", "m1"]), old)


def test_what_cannot_be_served_in_the_end_was_never_added_or_removed(monkeypatch: Any, tmp_path: Path) -> None:
    model, sup, base, tuned = made()
    before = stored(sup, tmp_path / "before")
    with monkeypatch.context() as patch:

        def refuse(self: DeltaPool, *_: Any) -> None:
            raise ValueError("the superposition must fit torch.float16, got infinity")

        patch.setattr(DeltaPool, "_check_finite", refuse)
        with pytest.raises(ValueError, match="got infinity"):
            model.add_adapter("m3", tuned["m3"])
        with pytest.raises(ValueError, match="got infinity"):
            model.delete_adapter("m1", tuned["m1"])
    assert stored(sup, tmp_path / "after") == before
    check(model, sup, base, ["m0", "m1", "m2"])
    model.add_adapter("m3", tuned["m3"])
    check(model, sup, base, ["m0", "m1", "m2", "m3"])


@pytest.mark.parametrize("config", ["small groups", "average", "basis"])
def test_a_last_model_that_cannot_go_comes_back_to_its_group(config: str, monkeypatch: Any, tmp_path: Path) -> None:
    model, sup, base, tuned = made(CONFIGS[config])
    for name in ("m0", "m1"):
        model.delete_adapter(name, tuned[name])
    before, refused = stored(sup, tmp_path / "before"), MemoryError("no memory for it")

    def refuse(*_: Any) -> None:
        raise refused

    with monkeypatch.context() as patch:
        patch.setattr(model.router, "serve", refuse)
        with pytest.raises(MemoryError, match="no memory for it"):
            model.delete_adapter("m2", tuned["m2"])
    assert stored(sup, tmp_path / "after") == before
    check(model, sup, base, ["m2"])


@pytest.mark.parametrize("copied", [False, True])
def test_a_copy_has_models_of_its_own(copied: bool) -> None:
    model, sup, base, tuned = made()
    model.set_adapter("m2")
    other = copy.deepcopy(model)
    changed, same = (other, model) if copied else (model, other)
    x = tokens()
    old = same(x, adapter_names=["m0", "m1", "m2"])
    changed.add_adapter("m3", tuned["m3"])
    assert torch.equal(same(x, adapter_names=["m0", "m1", "m2"]), old)
    assert same.names == ["m0", "m1", "m2"]
    assert same.active_adapters == changed.active_adapters == ["m2"]
    check(changed, sup, base, ["m0", "m1", "m2", "m3"])
    assert changed.superposition is same.superposition
    same.add_adapter("m3")
    check(same, sup, base, ["m0", "m1", "m2", "m3"])


def test_rows_are_taken_as_long_as_somebody_refers_to_them() -> None:
    rows = Rows(2)
    first, second = rows.take("row"), rows.take("row")
    assert (first.index, second.index, rows.taken) == (0, 1, [0, 1])
    with pytest.raises(randes.CapacityError, match="no free row among 2: they are in use"):
        rows.take("row")
    copied = copy.deepcopy({"rows": rows, "row": second})
    del first
    assert rows.taken == [1]
    assert rows.take("row").index == 0
    assert copied["rows"].taken == [1]  # a copy's rows are its own
    del copied["row"]
    assert copied["rows"].taken == []
