"""The algebra: adding, taking away, retrieving, and what each of them costs in accuracy and bytes."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from models import TRANSFORMS, finetune, linear, net, stored, superposed
from safetensors.torch import save_file

import randes
from randes.superposition.integers import STEP

ROUNDING = STEP / math.sqrt(12)
"""Root mean square of the error of rounding to STEP, in units of a delta's own: 0.056 %."""


def relative_error(retrieved: torch.Tensor, tuned: torch.Tensor, base: torch.Tensor) -> float:
    """Of a weight, in units of its delta."""
    retrieved, tuned, base = (value.detach().double() for value in (retrieved, tuned, base))
    return float((retrieved - tuned).norm() / (tuned - base).norm())


@pytest.mark.parametrize(
    ("transform", "others"),
    [("both", "keep"), ("both", "base"), ("both", "average"), ("granules", "keep"), ("shuffled", "keep")],
)
def test_models_added_in_any_order_give_the_same_bytes(transform: str, others: str, tmp_path: Path) -> None:
    config = randes.Config(**(TRANSFORMS[transform].to_dict() | {"others": others}))
    base = net()
    tuned = {f"m{number}": finetune(base, number, 0.02 * 3**number) for number in range(3)}
    stores = []
    for order in itertools.permutations(tuned):
        sup = randes.Superposition.create(base, config)
        for name in order:
            sup.add(name, tuned[name])
        assert sup.names == ["m0", "m1", "m2"]
        stores.append(stored(sup, tmp_path / "-".join(order)))
    assert all(store == stores[0] for store in stores)


@pytest.mark.parametrize(
    ("transform", "dtype"),
    [(transform, torch.float32) for transform in TRANSFORMS] + [("both", torch.float16), ("both", torch.bfloat16)],
)
def test_removing_a_model_gives_back_the_bytes_from_before(transform: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = net(dtype=dtype)
    sup, _ = superposed(base, 3, TRANSFORMS[transform])
    before = stored(sup, tmp_path / "before")
    late = finetune(base, 9)
    sup.add("late", late)
    assert stored(sup, tmp_path / "with") != before
    sup.remove("late", late)
    assert stored(sup, tmp_path / "after") == before


@pytest.mark.parametrize("others", ["keep", "base", "average"])
def test_removing_any_model_leaves_what_the_rest_alone_would_be(others: str, tmp_path: Path) -> None:
    base = net()
    sup, tuned = superposed(base, 3, randes.Config(others=others))
    sup.remove("m1", tuned.pop("m1"))
    rest = randes.Superposition.create(base, sup.config)
    for name, model in tuned.items():
        rest.add(name, model)
    assert stored(sup, tmp_path / "sup") == stored(rest, tmp_path / "rest")


def test_removing_every_model_leaves_an_empty_superposition(tmp_path: Path) -> None:
    base, config = net(), randes.Config(group_size=2, others="average")
    empty = stored(randes.Superposition.create(base, config), tmp_path / "empty")
    sup, tuned = superposed(base, 3, config)
    for name, model in tuned.items():
        sup.remove(name, model)
    assert sup.names == []
    assert sup.deltas == {}
    assert stored(sup, tmp_path / "emptied") == empty


def test_integers_widen_exactly_where_they_do_not_fit_and_narrow_again(tmp_path: Path) -> None:
    base = torch.nn.Sequential(linear(), linear())
    sup = randes.Superposition.create(base, randes.Config(signs="none"))
    spikes = []
    for size in (1.0, 2.0):
        spiked = finetune(base, 0)
        with torch.no_grad():  # one entry holds the whole delta: √(48·32) = 39.2 gains, 20066 steps
            spiked[0].weight.copy_(base[0].weight)
            spiked[0].weight[3, 4] += size
        spikes.append(spiked)
    sup.add("one", spikes[0])
    before = stored(sup, tmp_path / "before")
    assert {delta.dtype for delta in sup.deltas[0].values()} == {torch.int16}

    sup.add("two", spikes[1])
    assert sup.deltas[0]["0.weight"].dtype == torch.int32
    assert sup.deltas[0]["0.weight"][3, 4] == 2 * 20066
    assert sup.deltas[0]["1.weight"].dtype == torch.int16

    sup.remove("two", spikes[1])
    assert sup.deltas[0]["0.weight"].dtype == torch.int16
    assert stored(sup, tmp_path / "after") == before


@pytest.mark.parametrize("size", [0.1, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_adds_the_same_relative_error_whatever_the_size_of_a_delta(dtype: torch.dtype, size: float) -> None:
    base = linear(96, 64)
    with torch.no_grad():
        base.weight.mul_(100 * size)  # weights that a delta of this size survives in 8 bits
    base = base.to(dtype)
    tuned = finetune(base, 1, size)
    sup = randes.Superposition.create(base, randes.Config(signs="none"))
    sup.add("m", tuned)
    restored = base.weight.double() + sup.deltas[0]["weight"] * (STEP * sup.members["m"].gains["weight"])
    assert relative_error(restored, tuned.weight, base.weight) == pytest.approx(ROUNDING, rel=0.1)


@pytest.mark.parametrize("transform", ["both", "columns", "permuted", "shuffled"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_weight_error_is_the_root_of_the_number_of_neighbours(transform: str, count: int) -> None:
    base = net()
    sup, tuned = superposed(base, count, TRANSFORMS[transform])
    for name, model in tuned.items():
        retrieved, own = sup.retrieve(name), model.state_dict()
        for tensor in sup.superposed:
            error = relative_error(retrieved[tensor], own[tensor], base.state_dict()[tensor])
            assert error == pytest.approx(math.sqrt(count - 1) or ROUNDING, rel=0.15)


@pytest.mark.parametrize("loudness", [1, 30])
def test_a_loud_neighbour_does_not_drown_a_quiet_model(loudness: float) -> None:
    base = linear(96, 64)
    quiet = finetune(base, 0, 0.01)
    sup = randes.Superposition.create(base)
    sup.add("quiet", quiet)
    for number in (1, 2, 3):
        sup.add(f"neighbour{number}", finetune(base, number, 0.01 * loudness))
    error = relative_error(sup.retrieve("quiet")["weight"], quiet.weight, base.weight)
    assert error == pytest.approx(math.sqrt(3), rel=0.05)


def test_tensors_that_are_not_superposed_are_retrieved_exactly() -> None:
    sup, tuned = superposed(net(), 3)
    for name, model in tuned.items():
        retrieved = sup.retrieve(name)
        assert retrieved.keys() == model.state_dict().keys()
        for tensor, value in model.state_dict().items():
            assert torch.equal(retrieved[tensor], value) == (tensor not in sup.superposed)


def test_what_a_model_did_not_change_is_the_base_and_costs_nothing() -> None:
    base = net()
    sup = randes.Superposition.create(base)
    nbytes = sup.nbytes
    sup.add("same", base)
    assert sup.nbytes == nbytes
    tuned = finetune(base, 1)
    partly = base.state_dict() | {"layers.0.up.weight": tuned.state_dict()["layers.0.up.weight"]}
    sup.add("partly", partly)
    assert list(sup.members["partly"].gains) == ["layers.0.up.weight"]
    assert sup.nbytes == nbytes + 48 * 32 * 2
    for tensor, value in sup.retrieve("same").items():
        assert torch.equal(value, base.state_dict()[tensor])


def test_alpha_scales_what_is_retrieved() -> None:
    base, tuned = linear(), finetune(linear(), 1)
    sup = randes.Superposition.create(base)
    sup.add("half", tuned, alpha=0.5)
    expected = base.weight + 0.5 * (tuned.weight - base.weight)
    torch.testing.assert_close(sup.retrieve("half")["weight"], expected, rtol=0, atol=1e-4)


def test_average_is_the_mean_over_the_models() -> None:
    sup, tuned = superposed(net(), 3, randes.Config(others="average"))
    for tensor in ("embed.weight", "norm.weight", "head.weight", "layers.1.up.bias"):
        mean = torch.stack([model.state_dict()[tensor].double() for model in tuned.values()]).mean(0)
        for name in tuned:
            torch.testing.assert_close(sup.retrieve(name)[tensor], mean.float(), rtol=0, atol=1e-7)


def test_what_was_retrieved_is_the_callers_to_change(tmp_path: Path) -> None:
    sup, _ = superposed(net(), 2)
    before = stored(sup, tmp_path / "before")
    for tensor in sup.retrieve("m0").values():
        tensor.zero_()
    assert stored(sup, tmp_path / "after") == before


def test_others_base_retrieves_the_base_for_what_is_not_superposed() -> None:
    base = net()
    sup, _ = superposed(base, 2, randes.Config(others="base"))
    retrieved = sup.retrieve("m0")
    for tensor, value in base.state_dict().items():
        assert torch.equal(retrieved[tensor], value) == (tensor not in sup.superposed)


def test_a_module_a_state_dict_and_a_path_are_the_same_checkpoint(tmp_path: Path) -> None:
    base, tuned = net(), finetune(net(), 1)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    (tmp_path / "shards").mkdir()
    for number, (tensor, value) in enumerate(tuned.state_dict().items()):
        save_file({tensor: value}, tmp_path / "shards" / f"model-{number:05}.safetensors")
    stores = []
    for number, (own_base, own_tuned) in enumerate(
        [
            (base, tuned),
            (base.state_dict(), tuned.state_dict()),
            (str(tmp_path / "base.safetensors"), tmp_path / "shards"),
        ]
    ):
        sup = randes.Superposition.create(own_base)
        sup.add("m", own_tuned)
        stores.append(stored(sup, tmp_path / f"store{number}"))
    assert stores[0] == stores[1] == stores[2]


def test_nbytes_counts_every_tensor_once() -> None:
    base = net()
    sup, _ = superposed(base, 3, randes.Config(group_size=2))
    base_bytes = sum(value.nbytes for value in base.state_dict().values())
    matrices = sum(base.state_dict()[tensor].numel() for tensor in sup.superposed)
    kept = sum(p.nbytes for name, p in base.named_parameters() if name not in sup.superposed)
    assert sup.nbytes == base_bytes + 2 * (2 * matrices) + 3 * kept
    assert sup.sizes.separate_models == 3 * base_bytes
    assert len(sup.superposed) == 6


def test_shuffled_layers_stay_in_their_family_and_differ_between_models() -> None:
    sup, tuned = superposed(net(), 8, TRANSFORMS["shuffled"])
    orders = set()
    for name in tuned:
        order = tuple(sup.place(name, f"layers.{layer}.up.weight") for layer in range(3))
        assert sorted(order) == [f"layers.{layer}.up.weight" for layer in range(3)]
        orders.add(order)
    assert len(orders) > 1


def test_seed_and_name_decide_the_bytes() -> None:
    base, tuned = linear(), finetune(linear(), 1)

    def integers(seed: int, name: str) -> torch.Tensor:
        sup = randes.Superposition.create(base, randes.Config(seed=seed))
        sup.add(name, tuned)
        return sup.deltas[0]["weight"]

    assert torch.equal(integers(0, "a"), integers(0, "a"))
    for other in (integers(1, "a"), integers(0, "b")):
        assert not torch.equal(integers(0, "a"), other)
        assert torch.equal(integers(0, "a").abs(), other.abs())


def test_a_model_joins_the_first_group_with_room_or_the_one_chosen_by_hand() -> None:
    base = linear(32, 32)
    sup, tuned = superposed(base, 5, randes.Config(group_size=2))
    assert [sup.members[name].group for name in sup.names] == [0, 0, 1, 1, 2]
    sup.remove("m1", tuned["m1"])
    sup.add("by hand", tuned["m1"], group=2)
    sup.add("next", tuned["m1"])
    assert (sup.members["by hand"].group, sup.members["next"].group) == (2, 0)
    for group in (1, 4, -1, 1.0, "1"):  # full, beyond the next new one, and no groups at all
        with pytest.raises(ValueError, match="group"):
            sup.add("late", tuned["m1"], group=group)  # type: ignore[arg-type]
    sup.add("alone", tuned["m1"], group=3)
    assert relative_error(sup.retrieve("alone")["weight"], tuned["m1"].weight, base.weight) < 2 * ROUNDING


def test_names_are_checked_and_nothing_changes(tmp_path: Path) -> None:
    sup, tuned = superposed(net(), 1)
    before = stored(sup, tmp_path / "before")
    for name in ("", "__base__", None, 3):
        with pytest.raises(ValueError, match="name must be"):
            sup.add(name, tuned["m0"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'m0' is there already"):
        sup.add("m0", finetune(net(), 3))
    for call in (sup.retrieve, sup.member, lambda name: sup.remove(name, tuned["m0"])):
        with pytest.raises(randes.UnknownModelError, match=r"^no model is called 'm9'; there are: m0$"):
            call("m9")
    for alpha in (math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha"):
            sup.add("m1", tuned["m0"], alpha=alpha)
    assert stored(sup, tmp_path / "after") == before


def test_a_base_without_a_matrix_to_superpose_is_refused() -> None:
    with pytest.raises(randes.CheckpointError, match=r"weight is torch\.int8: weights in few bits"):
        randes.Superposition.create({"weight": torch.ones(64, 64, dtype=torch.int8)})
    for base in (linear(16, 64), torch.nn.Conv2d(64, 64, 3, groups=64)):
        with pytest.raises(randes.CheckpointError, match="must have a matrix to superpose"):
            randes.Superposition.create(base)
    with pytest.raises(randes.CheckpointError, match="weight must be finite"):
        randes.Superposition.create({"weight": torch.full((64, 64), math.nan)})


@pytest.mark.parametrize("permute", [0, 1])
def test_segments_that_do_not_divide_the_columns_never_fail_later_than_at_creation(permute: int) -> None:
    try:
        sup = randes.Superposition.create(linear(), randes.Config(segments=3, permute=permute))
    except randes.CheckpointError:
        return
    sup.add("m", finetune(linear(), 1))


def test_a_base_that_was_trained_after_creation_is_noticed() -> None:
    base = linear()
    sup = randes.Superposition.create(base)
    with torch.no_grad():
        base.weight.add_(0.1)  # a fine-tune in place: its delta would be zero, its answer the base's
    with pytest.raises(randes.RandesError):
        sup.add("m", base)


def test_a_delta_too_small_for_an_fp32_gain_is_refused() -> None:
    base = linear()
    tiny = {name: torch.zeros_like(value) for name, value in base.state_dict().items()}
    sup = randes.Superposition.create(tiny)
    with pytest.raises(randes.CheckpointError, match="within the range of fp32"):
        sup.add("m", tiny | {"weight": torch.full((48, 32), 1e-44)})
    assert sup.names == []


def test_it_says_what_it_is(tmp_path: Path) -> None:
    base = net()
    sup = randes.Superposition.create(base)
    assert (len(sup), list(sup), bool(sup)) == (0, [], True)
    assert str(sup).startswith("Superposition of 0 fine-tunes")
    models = {f"m{number}": finetune(base, number) for number in range(10)}
    for name, model in models.items():
        sup.add(name, model)
    assert len(sup) == 10
    assert [*sup] == sup.names
    assert "m3" in sup
    assert "__base__" not in sup
    said = str(sup).splitlines()
    assert said[0] == "Superposition of 10 fine-tunes: m0, m1, m2, m3, m4, m5, m6, m7 and 2 more"
    assert said[1] == (
        f"  {sup.nbytes / 1e6:.1f} MB, {sup.nbytes / sup.sizes.base:.2f} times one model"
        f" (10 whole models: {10 * sup.sizes.base / 1e6:.1f} MB)"
    )
    assert said[2] == "  6 matrices superposed as integers, in groups of 8"
    assert "in 2 bits, in groups of 8" in str(sup.pack(2))
    assert sup.info()["models"].keys() == models.keys()
    found = sup.verify("m3", models["m3"])
    assert found.kept_exact
    assert found.relative_error == pytest.approx(found.predicted_error, rel=0.2)
    with pytest.raises(randes.CheckpointError, match="this is not the checkpoint that was added as 'm3'"):
        sup.verify("m3", models["m4"])


def test_the_base_comes_back_by_its_name(tmp_path: Path) -> None:
    base = net()
    randes.compress(base, {"a": finetune(base, 1)}).save(tmp_path / "store")
    for sup in (randes.compress(base, {"a": finetune(base, 1)}), randes.Superposition.load(tmp_path / "store")):
        for found in (sup.retrieve("__base__"), dict(sup.retrieved("__base__"))):
            assert found.keys() == base.state_dict().keys()
            assert all(torch.equal(value, found[name]) for name, value in base.state_dict().items())
        copied = sup.retrieve("__base__")["norm.weight"]
        copied.zero_()
        assert torch.equal(sup.retrieve("__base__")["norm.weight"], base.norm.weight)
    soup = randes.compress(base, {"a": finetune(base, 1)}, origin="zero")
    with pytest.raises(randes.UnknownModelError, match="no model is called '__base__'; there are: a"):
        soup.retrieve("__base__")


def test_a_model_is_removed_with_its_checkpoint_alone() -> None:
    base = net()
    sup = randes.compress(base, {"a": finetune(base, 1)})
    with pytest.raises(ValueError, match=r"finetuned must be the checkpoint that was added as 'a'.*delete_adapter"):
        sup.remove("a")
    with pytest.raises(randes.UnknownModelError):
        sup.remove("b")
    assert sup.names == ["a"]
