"""Same-named layers: which are shuffled with which, and how."""

import torch

from randes.superposition.layer_families import families, shuffled


def test_layers_that_differ_in_their_first_number_alone_are_a_family_in_its_order() -> None:
    tensors = {f"layers.{n}.mlp.up.weight": torch.empty(4, 2) for n in (10, 2, 1)}
    tensors |= {f"layers.{n}.mlp.down.weight": torch.empty(2, 4) for n in (1, 0)}
    found = families(tensors, tuple(tensors))
    assert [*found.values()] == [
        ["layers.1.mlp.up.weight", "layers.2.mlp.up.weight", "layers.10.mlp.up.weight"],
        ["layers.0.mlp.down.weight", "layers.1.mlp.down.weight"],
    ]


def test_other_shapes_second_numbers_and_names_without_numbers_are_families_apart() -> None:
    names = {
        "layers.0.a.weight": (2, 2), "layers.1.a.weight": (2, 3), "layers.2.experts.0.weight": (2, 2),
        "layers.3.experts.1.weight": (2, 2), "conv1.weight": (2, 2), "conv2.weight": (2, 2), "head": (2, 2),
    }  # fmt: skip
    found = families({name: torch.empty(shape) for name, shape in names.items()}, tuple(names))
    assert sorted(found.values()) == sorted([name] for name in names)


def test_only_the_names_asked_for_are_in_a_family() -> None:
    tensors = {"0.weight": torch.empty(2, 2), "1.weight": torch.empty(2, 2), "2.weight": torch.empty(2, 2)}
    assert [*families(tensors, ("0.weight", "2.weight")).values()] == [["0.weight", "2.weight"]]


def test_a_shuffle_is_a_permutation_that_key_and_family_decide() -> None:
    members = [f"{number}.weight" for number in range(16)]
    orders = set()
    for key in range(20):
        order = shuffled(key, "family", members)
        assert [*order] == members
        assert sorted(order.values()) == sorted(members)
        assert order == shuffled(key, "family", members)
        assert order != shuffled(key, "other", members)
        orders.add(tuple(order.values()))
    assert len(orders) == 20


def test_a_family_of_one_stays_where_it_is() -> None:
    assert shuffled(3, "family", ["head.weight"]) == {"head.weight": "head.weight"}
