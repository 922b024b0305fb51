"""Weights that a model's code reads past their layers are found before they are superposed, and kept per model."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CLOSE, alone, finetune, linear, superposed
from torch import Tensor, nn

import randes
from randes.checkpoints.modules.weight_reads import weights_read

transformers = pytest.importorskip("transformers")


class Reads(nn.Module):
    """Reads two weights, describes one, and hands one to ``F.linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.inner = linear(32, 32, seed=1), nn.ModuleDict({"deep": linear(32, 32, seed=2)})
        self.described, self.handed, self.called = (linear(32, 32, seed=seed) for seed in (3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x.to(self.described.weight.dtype), self.handed.weight) @ self.read.weight.T
        return self.called(self.described(x)) + self.scaled(x)

    def scaled(self, x: Tensor) -> Tensor:
        return x @ self.inner.deep.weight

    def extra_repr(self) -> str:
        return str(self.called.weight)


def test_a_modules_own_code_is_searched() -> None:
    assert weights_read(Reads()) == {"read.weight", "inner.deep.weight"}
    assert weights_read(nn.Sequential(linear(32, 32), Reads())) == {"1.read.weight", "1.inner.deep.weight"}
    assert weights_read(Reads(), seen_alone=True) == set()
    assert weights_read(linear()) == set()


def test_what_is_read_is_kept_per_model_and_said() -> None:
    base, x = Reads(), torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    said = "2 matrices are kept per model and not superposed, because the model's code reads their values .*: read.w"
    with pytest.warns(UserWarning, match=said):
        sup, _ = superposed(base, 2, size=0.1)
    assert sup.superposed == ("called.weight", "described.weight", "handed.weight")
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    for name in ("m0", "m1", "__base__"):
        torch.testing.assert_close(model(x, adapter_names=[name] * 3), alone(base, sup, name)(x), **CLOSE)
    with pytest.raises(randes.WeightReadError):
        model(x, adapter_names=["m0", "m1", "m0"])


def mamba(**sizes: Any) -> Any:
    return transformers.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=64, time_step_rank=32, **sizes)


def bloom(tensor_parallel: int) -> Any:
    return transformers.BloomConfig(
        n_layer=1, hidden_size=64, n_head=4, vocab_size=64, pretraining_tp=tensor_parallel, slow_but_exact=True
    )


SPEECH: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "tdnn_dim": (32, 32), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1),
    "xvector_output_dim": 32,
}  # fmt: skip
MOBILE: dict[str, Any] = {
    "hidden_size": 64, "embedding_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "intra_bottleneck_size": 32, "vocab_size": 64,
}  # fmt: skip
CASES = {
    "MambaModel": (mamba, {"layers.0.mixer.dt_proj.weight", "layers.0.mixer.conv1d.weight"}),
    "WavLMModel": (
        lambda: transformers.WavLMConfig(**SPEECH),
        {f"encoder.layers.0.attention.{name}_proj.weight" for name in ("q", "k", "v", "out")},
    ),
    "MobileBertForMaskedLM": (
        lambda: transformers.MobileBertConfig(**MOBILE),
        {"cls.predictions.decoder.weight", "cls.predictions.dense.weight"},
    ),
    "Wav2Vec2ForXVector": (
        lambda: transformers.Wav2Vec2Config(**SPEECH), {"tdnn.0.kernel.weight", "tdnn.1.kernel.weight"},
    ),
    "BloomModel": (lambda: bloom(2), {"h.0.mlp.dense_4h_to_h.weight", "h.0.self_attention.dense.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_transformers_models_are_run_once_on_meta(name: str) -> None:
    make, expected = CASES[name]
    torch.manual_seed(3)
    model = getattr(transformers, name)(make())
    state = torch.random.get_rng_state()
    assert weights_read(model) == expected
    assert weights_read(nn.ModuleDict({"inside": model}), seen_alone=True) == {f"inside.{name}" for name in expected}
    assert torch.equal(torch.random.get_rng_state(), state)


def test_code_that_does_not_run_keeps_nothing_from_being_superposed() -> None:
    assert weights_read(transformers.BloomModel(bloom(1))) == set()


def test_a_store_of_tensors_whose_weights_are_read_is_refused_when_it_is_served() -> None:
    torch.manual_seed(0)
    base = transformers.MambaModel(mamba())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sup = randes.Superposition.create(base.state_dict())  # nobody could look
    sup.add("m", finetune(base, 1).state_dict())
    with pytest.raises(ValueError, match=r"dt_proj\.weight is superposed, but the model's code reads its values past"):
        randes.SuperposedModel(base, sup)
    assert type(base.layers[0].mixer.dt_proj) is nn.Linear


def test_mamba_answers_as_one_model_and_refuses_a_mix() -> None:
    torch.manual_seed(0)
    base = transformers.MambaForCausalLM(mamba()).eval()
    with pytest.warns(UserWarning, match=r"dt_proj\.weight"):
        sup = randes.Superposition.create(copy.deepcopy(base))
    for number in range(2):
        sup.add(f"m{number}", finetune(base, number, 0.1))
    model = randes.SuperposedModel(copy.deepcopy(base), sup)
    x = torch.arange(12).view(2, 6)
    for name in ("m0", "m1", "__base__"):
        expected = alone(base, sup, name)(x).logits
        torch.testing.assert_close(model(x, adapter_names=[name] * 2).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="one model at a time"):
        model(x, adapter_names=["m0", "m1"])
