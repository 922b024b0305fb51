"""Requests for many models, answered in one batch: one row each."""

import inspect
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from randes.errors import RandesError, UnknownModelError
from randes.litserve.outputs import Answer, Outputs, PaddingError
from randes.serving.model import SuperposedModel
from randes.superposition.members import BASE_NAME

logger = logging.getLogger(__name__)
SHORT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
Inputs = dict[str, Tensor]
"""Of one row, by the model's arguments."""


@dataclass(frozen=True)
class Ask:
    """One row for one model.

    inputs: by the name of the model's argument, without the batch's dimension; or text for its tokenizer.
    outputs: those that are wanted; all where it is None. as_base64: whether they are sent as bytes.
    """

    model: str
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    text: str | None = None
    outputs: tuple[str, ...] | None = None
    as_base64: bool = False


class RefusedError(RandesError):
    """A request that gets no answer. status: HTTP's. parameter: what of the request was wrong."""

    def __init__(self, status: int, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.parameter = status, parameter


Outcome = Answer | RefusedError


@dataclass(frozen=True)
class Row:
    """A request that can be run."""

    model: str
    inputs: Inputs
    is_text: bool

    @property
    def length(self) -> int:
        """Of a text, in tokens."""
        return len(self.inputs["input_ids"])


class Rows:
    """Answers requests in batches, as many of them in one as have inputs of the same shapes.

    No request gets anything of another: where a batch fails it is run again for each model, and then for each row, and
    outputs that are not a row's own are left out (``outputs.py``). Texts share a batch where padding changes nothing.
    """

    def __init__(self, model: SuperposedModel, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        parameters = inspect.signature(model.base_model.forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.arguments = [parameter.name for parameter in parameters if parameter.kind in kinds]
        floats = (value.dtype for value in model.parameters() if value.is_floating_point())
        self._dtype = next(floats, torch.float32)
        self._device = next((value.device for value in model.parameters()), torch.device("cpu"))
        self._outputs = Outputs()
        self._mixes = True
        self._pads = self._may_pad()

    def _may_pad(self) -> bool:
        """Whether a text can be padded behind its end, where no position moves and the model knows where that is."""
        if self.tokenizer is None or self.tokenizer.padding_side != "right" or "attention_mask" not in self.arguments:
            return False
        pads = getattr(getattr(self.model.base_model, "config", None), "pad_token_id", None)
        return pads is not None and pads == self.tokenizer.pad_token_id

    @property
    def names(self) -> list[str]:
        """What can be asked for."""
        return [*([BASE_NAME] if BASE_NAME in self.model.router.versions else []), *self.model.names]

    def answer(self, asks: Sequence[Ask]) -> list[Outcome]:
        """The answers in the order of the requests, each with the outputs that it asked for. Never raises for what a
        request holds."""
        outcomes: dict[int, Outcome] = {}
        rows: dict[int, Row] = {}
        for place, ask in enumerate(asks):
            try:
                rows[place] = Row(ask.model, self._inputs(ask), ask.text is not None)
            except RefusedError as refused:
                outcomes[place] = refused
        for places in _grouped(rows, lambda place: self._alike(rows[place])):
            outcomes.update(zip(places, self._run([rows[place] for place in places]), strict=True))
        return [_chosen(ask, outcomes[place]) for place, ask in enumerate(asks)]

    # ---------------------------------------------------------------- inputs

    def _inputs(self, ask: Ask) -> Inputs:
        if ask.model not in self.model.router.versions:
            raise unknown(ask.model)
        if ask.text is not None:
            return self._tokens(ask.text)
        for name in ask.inputs:
            if self.arguments and name not in self.arguments:
                raise RefusedError(422, f"inputs must be of {', '.join(self.arguments)}, got {name}", "inputs")
        if not ask.inputs:
            raise RefusedError(422, "inputs must hold a tensor, or text be given; got neither", "inputs")
        return {name: self._tensor(value) for name, value in ask.inputs.items()}

    def _tensor(self, value: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.array(value))
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _tokens(self, text: str) -> Inputs:
        if self.tokenizer is None:
            raise RefusedError(422, "text needs a store with a tokenizer, and this one has none: give inputs", "text")
        tokens = self.tokenizer(text)
        most, count = self.tokenizer.model_max_length, len(tokens["input_ids"])
        if not 0 < count <= most:
            raise RefusedError(422, f"text must be of 1 to {most} tokens, got {count}", "text")
        return {name: torch.tensor(value) for name, value in tokens.items() if name in self.arguments}

    def _alike(self, row: Row) -> Hashable:
        """What rows of one batch have in common."""
        model = None if self._mixes else row.model
        if row.is_text and self._pads:
            return model, "text"
        return model, tuple((name, value.shape, value.dtype) for name, value in sorted(row.inputs.items()))

    # ---------------------------------------------------------------- one batch

    def _run(self, rows: list[Row]) -> list[Outcome]:
        models = {row.model for row in rows}
        try:
            return [*self._batch(rows)]
        except PaddingError as error:
            logger.warning("texts of different lengths are answered apart from now on: padding changes %s", error)
            self._pads = False
            return self._apart(rows, self._alike)
        except Exception as error:
            if len(rows) == 1:
                return [_refusal(rows[0].model, error)]
            if len(models) == 1:
                return [outcome for row in rows for outcome in self._run([row])]
            found = self._apart(rows, lambda row: row.model)
            refused = any(isinstance(outcome, RefusedError) for outcome in found)
            if self._mixes and not refused and not isinstance(error, SHORT_OF_MEMORY):
                logger.warning("mixed batches are answered model by model from now on: %s", error)
                self._mixes = False
            return found

    def _apart(self, rows: list[Row], key: Callable[[Row], Hashable]) -> list[Outcome]:
        found: dict[int, Outcome] = {}
        for places in _grouped(range(len(rows)), lambda place: key(rows[place])):
            found.update(zip(places, self._run([rows[place] for place in places]), strict=True))
        return [found[place] for place in range(len(rows))]

    def _batch(self, rows: Sequence[Row]) -> list[Answer]:
        """The rows in one call. Raises whatever it raises, and ``PaddingError``."""
        answers = self._outputs.of_rows(self._call(rows), len(rows), lambda times: self._call([rows[0]] * times))
        if rows[0].is_text and len({row.length for row in rows}) > 1:
            lengths = [row.length for row in rows]
            self._outputs.without_padding(answers, lengths, lambda place: self._batch([rows[place]])[0])
        return answers

    @torch.inference_mode()
    def _call(self, rows: Sequence[Row]) -> object:
        stacked = self._stacked([row.inputs for row in rows])
        inputs = {name: value.to(self._device) for name, value in stacked.items()}
        return self.model(**inputs, adapter_names=[row.model for row in rows])

    def _stacked(self, rows: Sequence[Inputs]) -> Inputs:
        first = rows[0]
        if all(row[name].shape == first[name].shape for row in rows for name in first):
            return {name: torch.stack([row[name] for row in rows]) for name in first}
        lists = {name: [row[name].tolist() for row in rows] for name in first}
        return dict(self.tokenizer.pad(lists, padding=True, return_tensors="pt"))


def unknown(name: str) -> RefusedError:
    """404, as a server of OpenAI's interface has it."""
    return RefusedError(404, f"the model {name!r} does not exist", "model")


def _refusal(model: str, error: Exception) -> RefusedError:
    """Of a row that fails by itself, nearly always for its inputs."""
    if isinstance(error, UnknownModelError):  # deleted since
        return unknown(model)
    if isinstance(error, SHORT_OF_MEMORY):
        return RefusedError(503, "there is not enough memory for this request")
    logger.info("a request was refused by the model", exc_info=error)
    return RefusedError(422, f"the model cannot be run on these inputs: {type(error).__name__}: {error}", "inputs")


def _chosen(ask: Ask, outcome: Outcome) -> Outcome:
    if isinstance(outcome, RefusedError) or ask.outputs is None:
        return outcome
    if missing := [name for name in ask.outputs if name not in outcome]:
        return RefusedError(422, f"outputs must be of {', '.join(outcome)}, got {missing[0]}", "outputs")
    return {name: outcome[name] for name in ask.outputs}


def _grouped(places: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for place in places:
        groups.setdefault(key(place), []).append(place)
    return [*groups.values()]
