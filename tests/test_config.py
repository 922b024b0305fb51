"""Which choices there are, and that each is checked where it is made."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import randes
from randes_kernels import Transform
from randes_kernels.format import Matrix

PATTERNS = st.lists(st.sampled_from(["*", "*weight", "layers.?.*", "ü", ""]), max_size=3)


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        randes.Config,
        signs=st.sampled_from(["both", "columns", "none"]),
        permute=st.integers(0, 64),
        shuffle_layers=st.integers(-1, 5),
        group_size=st.integers(1, 100),
        seed=st.integers(0, 2**64 - 1),
        others=st.sampled_from(["keep", "base", "average", "sum"]),
        segments=st.integers(1, 8),
        include=PATTERNS,
        exclude=PATTERNS,
        min_width=st.integers(1, 100),
        gains=st.sampled_from(["own", "shared"]),
        origin=st.sampled_from(["base", "zero"]),
        every=st.integers(1, 3),
        per_layer=st.booleans(),
        vectors=st.booleans(),
    )
)
def test_a_config_survives_json(config: randes.Config) -> None:
    assert randes.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config.resolved(together=False)


@pytest.mark.parametrize(
    ("signs", "permute", "transform"),
    [
        ("both", 0, Transform(True, True, 0, 2)),
        ("columns", 1, Transform(False, True, 1, 2)),
        ("none", 8, Transform(False, False, 8, 2)),
    ],
)
def test_the_kernels_get_the_same_choices(signs: Any, permute: int, transform: Transform) -> None:
    assert randes.Config(signs=signs, permute=permute, segments=2).transform == transform


@pytest.mark.parametrize("matrix", ["signs", "rotation", "diagonal", "dense"])
def test_the_kernels_get_plain_numbers_which_every_torch_compiles(matrix: Any) -> None:
    # The compiler of torch 2.11 traces no enumeration.
    assert {type(value) for value in randes.Config(matrix=matrix).transform} == {bool, int}
    assert {type(value) for value in Transform()} == {bool, int}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("signs", "rows"), ("signs", None), ("others", "drop"), ("shuffle_layers", 1.0), ("shuffle_layers", -2),
        ("permute", -1), ("permute", 1.0), ("group_size", 0), ("group_size", "8"), ("segments", 0),
        ("min_width", 0), ("seed", -1), ("seed", 2**64), ("seed", 0.5), ("include", "*"), ("exclude", "*norm*"),
        ("matrix", "hadamard"), ("gains", "none"), ("origin", "mean"), ("every", 0), ("per_layer", 1), ("vectors", 1),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        randes.Config(**{name: value})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"matrix": "rotation", "permute": 1}, "permute"),
        ({"matrix": "diagonal", "permute": 8}, "permute"),
        ({"matrix": "dense", "segments": 2}, "segments"),
        ({"matrix": "rotation", "segments": 2}, "segments"),
        ({"matrix": "dense", "rank": 4}, "rank"),
        ({"origin": "zero", "centre": True}, "centre"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        randes.Config(**options)


def test_the_manifest_has_a_later_option_only_where_it_is_used() -> None:
    used = {"matrix": "rotation", "gains": "shared", "origin": "zero", "every": 2, "per_layer": False, "vectors": True}
    assert not used.keys() & randes.Config().to_dict().keys()
    assert randes.Config(**used).to_dict().items() >= used.items()


@pytest.mark.parametrize("matrix", ["rotation", "diagonal", "dense"])
def test_a_matrix_takes_the_place_of_column_signs(matrix: Any) -> None:
    both, none = (randes.Config(matrix=matrix, signs=signs).transform for signs in ("both", "none"))
    assert (both.row_signs, none.row_signs) == (True, False)
    assert (both.column_signs, none.column_signs) == (False, False)
    assert both.matrix == none.matrix == Matrix[matrix.upper()]


def test_a_function_can_choose_and_is_not_written_down() -> None:
    config = randes.Config(include=lambda name, shape: shape[0] == 48)
    assert config.selects("up.weight", (48, 32))
    assert not config.selects("down.weight", (32, 48))
    assert not config.selects("norm.weight", (48, 48))  # excluded
    with pytest.raises(ValueError, match=r"^include must be"):
        config.to_dict()


def test_an_unknown_choice_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'absorber'"):
        randes.Config.from_dict({"absorber": True})


@pytest.mark.parametrize(
    ("tensor", "shape", "superposed"),
    [
        ("layers.0.up.weight", (32, 64), True),
        ("weight", (32, 32), True),
        ("layers.0.up.weight", (31, 64), False),
        ("layers.0.up.weight", (64, 31), False),
        ("layers.0.up.bias", (64,), False),
        ("layers.0.up.bias", (64, 64), False),
        ("conv.weight", (64, 64, 3), False),
        ("embed_tokens.weight", (64, 64), False),
        ("transformer.wte.weight", (64, 64), False),
        ("layers.0.norm1.weight", (64, 64), False),
    ],
)
def test_matrices_are_superposed_and_small_or_looked_up_ones_are_not(
    tensor: str, shape: tuple[int, ...], superposed: bool
) -> None:
    assert randes.Config().selects(tensor, shape) is superposed


def test_patterns_choose_what_is_superposed() -> None:
    config = randes.Config(include=("layers.*.weight", "head*"), exclude=("*.1.*",), min_width=1)
    chosen = [
        name
        for name in ("layers.0.q.weight", "layers.1.q.weight", "head", "Head", "norm.weight")
        if config.selects(name, (2, 2))
    ]
    assert chosen == ["layers.0.q.weight", "head"]
