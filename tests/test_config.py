"""Which choices there are, and that each is checked where it is made."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import randes
from randes_kernels import Transform

PATTERNS = st.lists(st.sampled_from(["*", "*weight", "layers.?.*", "ü", ""]), max_size=3)


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        randes.Config,
        signs=st.sampled_from(["both", "columns", "none"]),
        permute=st.integers(0, 64),
        shuffle_layers=st.sampled_from([0, -1]),
        group_size=st.integers(1, 100),
        seed=st.integers(0, 2**64 - 1),
        others=st.sampled_from(["keep", "base", "average"]),
        segments=st.integers(1, 8),
        include=PATTERNS,
        exclude=PATTERNS,
        min_width=st.integers(1, 100),
    )
)
def test_a_config_survives_json(config: randes.Config) -> None:
    assert randes.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("signs", "rows"), ("signs", None), ("others", "drop"), ("shuffle_layers", 1), ("shuffle_layers", -2),
        ("permute", -1), ("permute", 1.0), ("group_size", 0), ("group_size", "8"), ("segments", 0),
        ("min_width", 0), ("seed", -1), ("seed", 2**64), ("seed", 0.5), ("include", "*"), ("exclude", "*norm*"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        randes.Config(**{name: value})


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
