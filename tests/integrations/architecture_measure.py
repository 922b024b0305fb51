"""What a served model's answers are worth: right, refused, or neither, beside the retrieved models run alone.

All floating tensors of an output are compared, relative to how far the two fine-tunes and the base are apart. Answers
and errors alone are looked at, nothing of how a model is served.
"""

import ast
import copy
import linecache
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf
from architecture_answers import SMALLEST, Answers, IndistinctError, axes_of, distance, error_of, tensors
from architecture_cases import Case, NotBuiltError, build, finetuned
from architecture_inputs import LENGTH, ROWS, call, copied, described
from torch import Tensor, nn

import randes
import randes.transformers
import randes_kernels
from randes.checkpoints.lazy_tensors import headers
from randes.checkpoints.sources import digest, read

MIX = ["a", "b", "__base__", "b", "a"]
assert len(MIX) == ROWS
OUTCOMES = ("single", "named", "mixed", "square", "generates", "generates_mixed", "disk", "disk_mixed")
OURS = tuple(str(Path(package.__file__).parent) for package in (randes, randes_kernels))


@dataclass
class Result:
    """What became of a class: an outcome for each way to call it.

    single: one model, chosen by ``set_adapter``. named: one model's name for each row. mixed: names of several.
    generates, generates_mixed: three tokens of ``generate``, by their logits and the caches left behind.
    square: mixed, where the batch has as many rows as tokens, so that one could be taken for the other.
    disk, disk_mixed: one model and several, of folders that ``save_pretrained`` wrote, by way of a store on the disk.
    "late" is what is refused when the store is loaded, after the work of making it.

    error: the largest distance of a right answer from the retrieved models, of that between models.
    unseen: superposed matrices that do not show in the output, so that nothing is known of them.
    """

    name: str
    model_type: str = ""
    parameters: int = 0
    single: str = ""
    named: str = ""
    mixed: str = ""
    square: str = ""
    generates: str = ""
    generates_mixed: str = ""
    disk: str = ""
    disk_mixed: str = ""
    error: float = 0.0
    unseen: list[str] = field(default_factory=list)
    detail: str = ""
    seconds: float = 0.0


def is_refusal(error: BaseException) -> bool:
    """Whether an error was raised by a statement of ours, and not by what our code happened to call."""
    if isinstance(error, randes.RandesError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.startswith(OURS):
        return False
    source = "".join(linecache.getlines(frames[-1].filename))
    line = frames[-1].lineno or 0
    raises = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise))
    return any(node.lineno <= line <= (node.end_lineno or 0) for node in raises)


def outcome_of(error: BaseException) -> str:
    """What an error of a served model counts as."""
    if is_refusal(error):
        return f"refused: {described(error)}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"crashed: {described(error)} ({'/'.join(Path(last.filename).parts[-2:])}:{last.lineno})"


class Subject:
    """A class's base, its superposition, and the plain models that say what is right."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], stored: randes.Superposition | None = None) -> None:
        self.inputs, base = inputs, model
        tuned = {name: finetuned(copy.deepcopy(base), number) for number, name in enumerate("ab")}
        self.tuned = {name: own.state_dict() for name, own in tuned.items()}
        self.superposition = stored or randes.compress(copy.deepcopy(base), tuned, randes.Config())
        self.plain = {"__base__": base}
        for name in "ab":
            self.plain[name] = copy.deepcopy(base)
            found = self.superposition.retrieve(name)
            own = self.plain[name].state_dict()
            assert stored is not None or found.keys() == own.keys()
            self.plain[name].load_state_dict(found, strict=False)  # files leave out what is tied
        self.answers: Answers = {name: self.ask(plain) for name, plain in self.plain.items()}
        self.rounding = self.rounded()

    def ask(self, model: Any, **chosen: Any) -> dict[str, Tensor]:
        """What a model answers, by the places of the tensors."""
        return dict(tensors(call(model, self.inputs, **chosen)))

    def over(self, inputs: dict[str, Any], kind: type["Subject"] | None = None) -> "Subject":
        """The same with other inputs, and another way to ask."""
        other = copy.copy(self)
        other.__class__ = kind or type(self)
        other.inputs = inputs
        other.answers = {name: other.ask(plain) for name, plain in other.plain.items()}
        if kind:
            other.rounding = other.rounded()
        return other

    def check_retrieved(self) -> str:
        """What is wrong with retrieved tensors: each is its model's but for noise that does not depend on it."""
        base = self.plain["__base__"].state_dict()
        for name, tuned in self.tuned.items():
            for tensor, value in self.plain[name].state_dict().items():
                delta = (tuned[tensor] - base[tensor]).double() if value.is_floating_point() else value.flatten()[:0]
                if delta.numel() < 1 or not delta.any():
                    continue
                share = float(((value - base[tensor]).double() * delta).sum() / delta.square().sum())
                if abs(share - 1) > 0.25:
                    return f"wrong: {share:.2f} of the delta of {tensor} is retrieved for {name!r}"
        return ""

    @torch.no_grad()
    def rounded(self, times: int = 1) -> dict[str, float]:
        """What rounding may move each output by, of the distance between models: 30 times what the last bit of every
        weight does."""
        moved = dict.fromkeys(self.answers["a"], SMALLEST)
        for seed in range(times):
            model, generator = copy.deepcopy(self.plain["a"]), torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.mul_(1 + 1e-7 * torch.randn(p.shape, generator=generator))
            found = self.ask(model)
            for place in moved.keys() & found.keys():
                one = {name: {place: own[place]} for name, own in self.answers.items()}
                with suppress(IndistinctError):
                    moved[place] = max(moved[place], 30 * error_of({place: found[place]}, one, ["a"]).size)
        return moved

    def unseen(self) -> list[str]:
        """Superposed matrices that do not show in the output where they are the base's instead of a model's own."""
        model, found = self.plain["a"], []
        own, base = model.state_dict(), self.plain["__base__"].state_dict()
        for name in sorted(self.superposition.superposed):
            if name not in own or torch.equal(own[name], base[name]):
                continue
            before = own[name].clone()
            own[name].copy_(base[name])
            error = error_of(self.ask(model), self.answers, ["a"], rounding=self.rounding)
            own[name].copy_(before)
            if error.excess < 1:
                found.append(name)
        return found


class Generating(Subject):
    """The same, asked for three tokens more: what is compared are their logits and the caches."""

    def ask(self, model: Any, **chosen: Any) -> dict[str, Tensor]:
        given = {name: copied(value) for name, value in self.inputs.items() if not name.startswith("decoder_")}
        torch.manual_seed(0)
        how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
        if self.plain["a"].generation_config.decoder_start_token_id is None:
            how["decoder_start_token_id"] = 0
        with torch.no_grad():
            y = model.generate(**given, **chosen, **how, return_dict_in_generate=True, output_logits=True)
        return dict(tensors({"logits": y.logits, "cache": y.get("past_key_values")}))


def generates(model: Any) -> bool:
    """Whether Transformers generates text with this class."""
    return isinstance(model, hf.GenerationMixin) and model.can_generate()


def measure(case: Case, *, look: bool = True, memory: bool = True, folders: bool = True) -> Result:
    """Build a class and serve it: of loaded models, for ``memory``, and of ``folders``. look: for matrices that do not
    show in the output, too."""
    result = Result(case.name)

    def all_are(outcome: str) -> Result:
        for way in OUTCOMES:
            setattr(result, way, outcome)
        return result

    try:
        model, inputs = build(case)
    except NotBuiltError as why:
        return all_are(f"not run: {why}")
    result.model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    result.parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        first, again, other = (dict(tensors(call(model, inputs, seed=seed))) for seed in (0, 0, 1))
    except Exception as error:
        return all_are(f"not run: {described(error)}")
    if not all(value.isfinite().any() or not value.numel() for value in first.values()):
        return all_are("not run: outputs are not finite")
    if differ(first, again):
        return all_are("not run: two calls differ")
    fresh = copy.deepcopy(model)  # some change their configuration when they generate
    subject = _in_memory(result, model, inputs, all_are) if memory else None
    if folders and isinstance(fresh, hf.PreTrainedModel):
        _from_disk(result, fresh, inputs, subject)
    if differ(first, other):  # what it draws for a row depends on which rows are with it, wherever a part runs by model
        result.mixed = result.square = result.generates_mixed = "not run: it draws random numbers"
        result.disk_mixed = result.mixed
    if look and subject is not None:
        result.unseen = subject.unseen()
    return result


def _in_memory(result: Result, model: nn.Module, inputs: dict[str, Any], all_are: Any) -> Subject | None:
    """Fill in the outcomes of loaded models."""
    try:
        subject = Subject(model, inputs)
    except Exception as error:
        all_are(outcome_of(error))
        return None
    if found := subject.check_retrieved():
        all_are(found)
        return None
    try:
        error_of(subject.answers["a"], subject.answers, ["a"])
    except IndistinctError:
        all_are("indistinct")
        return None
    try:
        served = randes.SuperposedModel(copy.deepcopy(model), subject.superposition)
    except Exception as error:
        all_are(outcome_of(error))
        return None
    result.single = _outcome(result, served, subject, ["b"])
    result.named = _outcome(result, served, subject, ["a"] * ROWS)
    result.mixed = _outcome(result, served, subject, MIX)
    result.square = _square(result, served, subject)
    if generates(model):
        _generate(result, served, subject)
    return subject


def _from_disk(result: Result, model: hf.PreTrainedModel, inputs: dict[str, Any], subject: Subject | None) -> None:
    """Fill in the outcomes of folders."""
    with TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}" for name in ("base", "a", "b")}
        try:
            model.save_pretrained(paths["base"])
            for number, name in enumerate("ab"):
                finetuned(copy.deepcopy(model), number).save_pretrained(paths[name])
            if differ(model.state_dict(), type(model).from_pretrained(paths["base"]).state_dict()):
                raise ValueError("what it reads is not what it wrote")
        except Exception as error:
            result.disk = result.disk_mixed = f"not run: Transformers: {described(error)}"
            return
        try:
            made = randes.compress(paths.pop("base"), paths, randes.Config())
        except Exception as error:
            result.disk = result.disk_mixed = outcome_of(error)
            return
        try:
            made.save(f"{folder}/store")
            stored = randes.Superposition.load(f"{folder}/store")
            if wrong := _other_files(stored, folder):
                result.disk = result.disk_mixed = f"wrong: {wrong}"
                return
            served: Any = type(model).from_pretrained(f"{folder}/store")
            if subject is None or not _alike(stored, subject):
                subject = Subject(model, inputs, stored)
        except Exception as error:
            outcome = outcome_of(error)
            result.disk = result.disk_mixed = outcome.replace("refused", "late", 1)
            return
        result.disk = _outcome(result, served, subject, ["b"])
        result.disk_mixed = _outcome(result, served, subject, MIX)


def _other_files(stored: randes.Superposition, folder: str) -> str:
    """What of the files is not as it was: names, shapes and dtypes of a model's, and the base to the byte."""
    for name in "ab":
        found, own = headers(stored.retrieved(name, as_files=True)), headers(read(f"{folder}/{name}"))
        for tensor in found.keys() | own.keys():
            if tensor not in found or tensor not in own:
                return f"{tensor} is in one of the files of {name!r} alone"
            if (found[tensor].shape, found[tensor].dtype) != (own[tensor].shape, own[tensor].dtype):
                return f"{tensor} of {name!r} is another"
    base, files = read(f"{folder}/base"), stored.to_files.apply(stored.layout.joined(stored.base))
    return next(
        (f"{tensor} of the base is another" for tensor in base if digest(base[tensor]) != digest(files[tensor])), ""
    )


def _alike(stored: randes.Superposition, subject: Subject) -> bool:
    """Whether the models that come back are those that came back in memory."""
    for name in "ab":
        own = subject.plain[name].state_dict()
        if any(not torch.equal(own[tensor], value) for tensor, value in stored.retrieve(name).items()):
            return False
    return True


def differ(first: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two calls of one model answer differently."""
    return any(distance(other.get(place, value.flatten()[:0]), value) > 0 for place, value in first.items())


def _outcome(
    result: Result,
    served: randes.SuperposedModel,
    subject: Subject,
    names: list[str],
    axes: dict[str, int] | None = None,
) -> str:
    """Of a call with these names, one for each row, or one that is chosen before."""
    try:
        if len(names) == 1:
            served.set_adapter(names[0])
        chosen = {"adapter_names": names} if len(names) > 1 else {}
        output = subject.ask(served, **chosen)
    except Exception as error:
        return outcome_of(error)
    owners = names if len(set(names)) > 1 else names[:1]
    try:
        error = error_of(output, subject.answers, owners, rounding=subject.rounding, axes=axes)
        if 1 <= error.excess < 1000:  # near enough to look again
            subject.rounding = subject.rounded(8)
            error = error_of(output, subject.answers, owners, rounding=subject.rounding, axes=axes)
    except IndistinctError:
        return "indistinct"
    if error.excess >= 1:
        return f"wrong: {error.size:.2g} of the distance in {error.where}"
    result.error = max(result.error, error.size)
    return "right"


def _generate(result: Result, served: randes.SuperposedModel, subject: Subject) -> None:
    """Fill in the outcomes of generation."""
    try:
        longer = subject.over(subject.inputs, Generating)
    except Exception as error:
        result.generates = result.generates_mixed = f"not run: {described(error)}"
        return
    result.generates = _outcome(result, served, longer, ["b"])
    result.generates_mixed = _outcome(result, served, longer, MIX)


def _square(result: Result, served: randes.SuperposedModel, subject: Subject) -> str:
    """The mixed outcome with as many tokens as rows; none where inputs are no tokens."""
    names = [name for name, x in subject.inputs.items() if isinstance(x, Tensor) and x.shape[1:2] == (LENGTH,)]
    if "input_ids" not in names:
        return ""
    axes = axes_of(subject.answers["a"])
    inputs = {name: x[:, -ROWS:] if name in names else x for name, x in subject.inputs.items()}
    try:
        shorter = subject.over(inputs)
    except Exception as error:
        return f"not run: {described(error)}"
    return _outcome(result, served, shorter, MIX, axes)


def timed(case: Case, look: bool = True) -> Result:
    """The measure, with the seconds it took."""
    start = time.perf_counter()
    result = measure(case, look=look)
    result.seconds = round(time.perf_counter() - start, 2)
    return result


def kind(outcome: str) -> str:
    return outcome.partition(":")[0]
