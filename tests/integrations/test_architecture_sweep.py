"""Architectures of Transformers answer rightly or refuse, in every way to call them; and the measure can tell.

``python tests/integrations/architecture_sweep.py`` measures all classes; here are those of each kind that reads its
weights in a way of its own.
"""

from typing import Any

import architecture_measure
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from architecture_answers import IndistinctError, error_of
from architecture_cases import Case, cases
from architecture_measure import MIX, OUTCOMES, Result, is_refusal, kind, measure, outcome_of
from torch import Tensor, nn

import randes

TRIED = [
    "BloomForCausalLM", "BloomForCausalLM, slow but exact", "CanineForTokenClassification",
    "ConvNextForImageClassification", "DebertaV2ForMaskedLM", "DetrModel", "FalconForCausalLM",
    "FalconMambaForCausalLM", "MambaForCausalLM",
    "MobileBertForMaskedLM", "ReformerModelWithLMHead", "SwinModel",
    "UniSpeechSatForXVector", "Wav2Vec2ForXVector", "WavLMModel", "PixtralVisionModel", "XLNetModel",
]  # fmt: skip
"""Of each kind that reads its weights in a way of its own."""

MOST_USED = [
    "BartModel", "BertForMaskedLM", "CLIPModel", "DINOv3ViTModel", "DeepseekV3ForCausalLM", "DeiTModel", "Dinov2Model",
    "DistilBertModel", "ElectraModel", "EsmForMaskedLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma3ForCausalLM",
    "GemmaForCausalLM", "LlamaForCausalLM", "LlavaForConditionalGeneration", "MistralForCausalLM",
    "MixtralForCausalLM", "ModernBertModel", "NomicBertModel", "Phi3ForCausalLM", "Qwen2ForCausalLM",
    "Qwen2VLForConditionalGeneration", "Qwen3ForCausalLM", "RobertaForMaskedLM", "SegformerModel",
    "SiglipVisionModel", "T5ForConditionalGeneration", "ViTForImageClassification", "WhisperForConditionalGeneration",
]  # fmt: skip
"""From folders, by way of a store: many of them have other names in files than in modules."""

ONE_AT_A_TIME = {"CLIPModel", "Qwen2VLForConditionalGeneration"}

WITHOUT_GENERATE = {"ReformerModelWithLMHead": "TypeError: 'NoneType' object is not iterable"}
"""What the plain model raises there, so that nothing is compared."""


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Made-up configurations are warned about."""
    verbosity = hf.logging.get_verbosity()
    hf.logging.set_verbosity_error()
    yield
    hf.logging.set_verbosity(verbosity)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRIED)
def test_it_answers_rightly_or_refuses(name: str) -> None:
    case = next(case for case in cases() if case.name == name)
    result = measure(case, look=False, folders=False)
    found = {way: getattr(result, way) for way in OUTCOMES if getattr(result, way)}
    if name in WITHOUT_GENERATE:
        assert {found.pop("generates"), found.pop("generates_mixed")} == {f"not run: {WITHOUT_GENERATE[name]}"}
    assert {kind(outcome) for outcome in found.values()} <= {"right", "refused"}, found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MOST_USED)
def test_folders_are_served_and_written_back(name: str) -> None:
    case = next(case for case in cases() if case.name == name)
    result = measure(case, look=False, memory=False)
    assert result.disk == "right"
    assert kind(result.disk_mixed) == ("refused" if name in ONE_AT_A_TIME else "right"), result.disk_mixed


class Toy(nn.Module):
    """Two linear layers, both called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Linear(32, 40), nn.Linear(40, 32), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": [self.norm(self.last(torch.relu(self.first(x))))], "positions": torch.arange(3)}

    def last(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(x)
        return y


class Handing(Toy):
    """The second's weight is handed to ``F.linear``."""

    def last(self, x: Tensor) -> Tensor:
        return F.linear(x, self.second.weight, self.second.bias)


class Prefetch(Toy):
    """The second's weight is read."""

    def last(self, x: Tensor) -> Tensor:
        return x @ self.second.weight.T


def toy(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> Result:
    x = torch.randn(len(MIX), 3, 32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(architecture_measure, "build", lambda case: (model, {"x": x}))
    return measure(Case("toy", "Toy", {}))


def test_a_layer_that_is_called_is_right_and_one_that_is_read_is_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (Toy(), Handing()):
        answered = toy(monkeypatch, model)
        assert [answered.single, answered.named, answered.mixed] == ["right"] * 3
        assert not answered.unseen
    with pytest.warns(UserWarning, match=r"second\.weight"):
        read = toy(monkeypatch, Prefetch())
    assert [kind(outcome) for outcome in (read.single, read.named, read.mixed)] == ["right", "right", "refused"]


def test_a_small_part_of_an_answer_that_is_anothers_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    call = randes.SuperposedModel.forward

    def nearly(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = call(self, *args, **kwargs)
        y["y"][0][-1] *= 1.0005
        return y

    monkeypatch.setattr(randes.SuperposedModel, "forward", nearly)
    result = toy(monkeypatch, Toy())
    assert [kind(result.single), kind(result.mixed)] == ["wrong", "wrong"]


def test_rows_of_another_model_are_found_wherever_the_batch_is() -> None:
    answers = {name: {"y": torch.randn(3, len(MIX), 4)} for name in set(MIX)}
    mixed = torch.stack([answers[name]["y"][:, row] for row, name in enumerate(MIX)], 1)
    assert error_of({"y": mixed}, answers, MIX).excess == 0
    mixed[:, 2] = answers["a"]["y"][:, 2]
    found = error_of({"y": mixed}, answers, MIX)
    assert found.excess > 1
    assert found.where == "y of '__base__', row 2"
    assert error_of({}, answers, MIX).excess == float("inf")
    assert error_of({"y": mixed[:2]}, answers, ["a"]).excess == float("inf")
    assert error_of({"y": mixed * float("nan")}, answers, ["a"]).excess == float("inf")


def test_models_that_answer_alike_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IndistinctError):
        error_of({"y": torch.ones(5)}, {name: {"y": torch.ones(5)} for name in set(MIX)}, ["a"])
    monkeypatch.setattr(architecture_measure, "finetuned", lambda model, seed: model)
    assert kind(toy(monkeypatch, Toy()).single) == "indistinct"


def test_only_what_our_code_raises_is_a_refusal() -> None:
    def of(function: Any) -> BaseException:
        with pytest.raises(Exception) as raised:  # noqa: PT011
            function()
        return raised.value

    base = nn.Linear(32, 32)
    assert is_refusal(of(lambda: randes.Superposition.create(base).add("__base__", base)))
    assert is_refusal(of(lambda: randes.Config(rank=-1)))
    assert not is_refusal(of(lambda: randes.Superposition.create(base).retrieve([])))  # type: ignore[arg-type]
    assert not is_refusal(of(lambda: base(torch.zeros(3))))
    assert kind(outcome_of(of(lambda: base(torch.zeros(3))))) == "crashed"
