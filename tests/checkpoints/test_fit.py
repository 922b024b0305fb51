"""Fine-tunes that differ from their base in what changes nothing: dtypes, tied heads, constant buffers."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from models import Net, finetune, net
from safetensors.torch import save_file
from torch import Tensor

import randes
from randes import CheckpointError
from randes.checkpoints.fit.tensors import fitted

BASE = {"embed_tokens.weight": torch.randn(40, 8), "norm.weight": torch.ones(8)}


def fit(tensors: dict[str, Tensor], base: dict[str, Tensor] = BASE) -> dict[str, Tensor]:
    return dict(fitted(tensors, base, frozenset(), Path("ft")))


@pytest.mark.parametrize(
    ("base_dtype", "own"),
    [(a, b) for a in randes.checkpoints.fit.tensors.CAST for b in (torch.float32, torch.bfloat16) if a != b],
)
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_fine_tune_in_another_dtype_is_that_which_the_user_would_cast(
    base_dtype: torch.dtype, own: torch.dtype, on_disk: bool, tmp_path: Path
) -> None:
    base, tuned = net(dtype=base_dtype), finetune(net(), 1).to(own)
    save_file(tuned.state_dict(), tmp_path / "ft.safetensors")
    given = tmp_path / "ft.safetensors" if on_disk else tuned
    dtypes = f"from {own} to {base_dtype}".replace("torch.", "")
    with pytest.warns(UserWarning, match=f"cast to the base's dtype: .* {dtypes}"):
        found = randes.compress(base, {"a": given})
    expected = randes.compress(base, {"a": copy.deepcopy(tuned).to(base_dtype)})
    assert found.members["a"].digests == expected.members["a"].digests
    for name, value in expected.retrieve("a").items():
        assert torch.equal(found.retrieve("a")[name], value)
        assert value.dtype == base.state_dict()[name].dtype
    with pytest.warns(UserWarning, match="cast to the base's dtype"):
        found.remove("a", given)
    assert found.names == []


def test_it_says_so_once_for_all_tensors(tmp_path: Path) -> None:
    save_file(finetune(net(), 1).bfloat16().state_dict(), tmp_path / "ft.safetensors")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        randes.compress(net(), {"a": tmp_path / "ft.safetensors"})
    count = len(net().state_dict())
    assert [str(one.message) for one in told] == [
        f"tensors of {tmp_path / 'ft.safetensors'} are cast to the base's dtype: {count} of {count} from bfloat16 to"
        " float32"
    ]


def test_what_fp16_does_not_hold_is_refused_by_name() -> None:
    base = net(dtype=torch.float16)
    tuned = finetune(net(), 1)
    with torch.no_grad():
        tuned.get_parameter("layers.1.up.weight")[3, 4] = 1e5
    sup = randes.Superposition.create(base)
    with (
        pytest.raises(CheckpointError, match=r"layers.1.up.weight must be within ±65504.*got 1e\+05"),
        pytest.warns(UserWarning, match="cast"),
    ):
        sup.add("a", tuned)
    assert sup.names == []


def test_a_tied_head_may_be_listed_or_left_out() -> None:
    own = {name: value + 1 for name, value in BASE.items()}
    listed = own | {"lm_head.weight": own["embed_tokens.weight"].clone()}
    assert fit(listed).keys() == BASE.keys()
    base = BASE | {"lm_head.weight": BASE["embed_tokens.weight"].clone()}
    assert torch.equal(fit(own, base)["lm_head.weight"], own["embed_tokens.weight"])
    untied = base | {"lm_head.weight": torch.randn(40, 8)}
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: lm_head.weight"):
        fit(own, untied)


def test_what_a_model_makes_of_its_configuration_is_no_difference() -> None:
    constants = {
        "layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "bert.embeddings.position_ids": torch.arange(4)[None],
    }
    assert fit(BASE | constants).keys() == BASE.keys()
    filled = fit(BASE, BASE | constants)
    assert all(torch.equal(filled[name], value) for name, value in constants.items())
    for name, value in (("h.0.attn.bias", torch.ones(8)), ("h.0.extra", torch.ones(8))):
        with pytest.raises(CheckpointError, match=f"not in the base: {name}"):
            fit(BASE | {name: value})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_in_few_bits_are_named(dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in net().state_dict().items() if "up" in name}
    with pytest.raises(CheckpointError, match=f"layers.0.up.weight must .*, got .* {dtype}: .*few bits.*bf16"):
        randes.Superposition.create(net()).add("a", net().state_dict() | tensors)
    with pytest.raises(CheckpointError, match=f"up.weight is {dtype}: .*few bits.*bf16"):
        randes.Superposition.create({name: value for name, value in tensors.items() if "weight" in name})


def test_a_matrix_without_rows_is_kept(tmp_path: Path) -> None:
    base = net().state_dict() | {"nothing.weight": torch.zeros(0, 64), "none.weight": torch.zeros(64, 0)}
    tuned = base | finetune(net(), 1).state_dict()
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "ft.safetensors")
    for first, second in ((base, tuned), (tmp_path / "base.safetensors", tmp_path / "ft.safetensors")):
        sup = randes.compress(first, {"a": second})
        assert sup.retrieve("a")["nothing.weight"].shape == (0, 64)
        assert not {"nothing.weight", "none.weight"} & {*sup.superposed}
        sup.save(tmp_path / f"store {type(first).__name__}")
        randes.Superposition.load(tmp_path / f"store {type(first).__name__}").pack(2)


def test_a_cast_model_serves(tmp_path: Path) -> None:
    base, tuned = net(), finetune(net(), 1).bfloat16()
    with pytest.warns(UserWarning, match="cast"):
        sup = randes.compress(base, {"a": tuned})
    sup.save(tmp_path / "store")
    model = randes.SuperposedModel(net(), randes.Superposition.load(tmp_path / "store"))
    tokens = torch.arange(6)[None]
    plain = Net()
    plain.load_state_dict(tuned.float().state_dict())
    torch.testing.assert_close(model(tokens, adapter_names=["a"]), plain(tokens), rtol=1e-3, atol=1e-3)
