"""What a server replies, as HTTP's status and JSON: to rows for models, to changes of the models, and to questions.

Names, errors and lists have the form of OpenAI's API.
"""

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from randes.checkpoints.huggingface import CONFIG, library
from randes.errors import CapacityError, RandesError, UnknownModelError
from randes.litserve.rows import Ask, Outcome, RefusedError, Rows, unknown
from randes.litserve.tensors import json_of
from randes.serving.load import load
from randes.serving.model import SuperposedModel
from randes.superposition.members import BASE_NAME
from randes.superposition.superposition import Superposition

logger = logging.getLogger(__name__)
KINDS = {404: "NotFoundError", 409: "ConflictError", 500: "InternalServerError", 503: "ServiceUnavailableError"}


@dataclass(frozen=True)
class Store:
    """What is served.

    module: "package.module:function", which makes a model of the base's class; none for a store whose base was a
        Transformers model.
    room: fine-tunes that may be added to those that it has.
    """

    path: str
    module: str | None = None
    room: int = 0

    def load(self, device: str) -> Rows:
        """Raises what ``randes.load`` does, and ``ValueError`` for a module that makes no model."""
        superposition = Superposition.load(self.path)
        capacity = len(superposition.served) + self.room if self.room else None
        if self.module is not None:
            model = load(superposition, _made(self.module), capacity=capacity)
        elif CONFIG in superposition.model_files:
            model = SuperposedModel.from_pretrained(self.path, superposition, capacity=capacity)
        else:
            raise ValueError(
                "module must be 'package.module:function', which makes a model of the base's class: the store does not"
                " say what class that is"
            )
        tokenizer = None
        if CONFIG in superposition.model_files and any("tokenizer" in name for name in superposition.model_files):
            tokenizer = library().AutoTokenizer.from_pretrained(self.path)
        return Rows(model.to(device).eval(), tokenizer)


def _made(where: str) -> nn.Module:
    module, _, function = where.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"module must be 'package.module:function', got {where!r}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{where} must make an nn.Module, got {type(made).__name__}")
    return made


@dataclass(frozen=True)
class Add:
    """A fine-tune to serve. path: its checkpoint, to superpose it first."""

    model: str
    path: str | None = None


@dataclass(frozen=True)
class Remove:
    """A fine-tune to stop serving. path: its checkpoint, to subtract it."""

    model: str
    path: str | None = None


@dataclass(frozen=True)
class Reply:
    """status: HTTP's. content: ready for JSON."""

    status: int
    content: dict[str, Any]


def to_asks(rows: Rows, asks: Sequence[Ask]) -> list[Reply]:
    """One for each row, whatever they hold."""
    if not asks:
        return []
    try:
        outcomes = rows.answer(asks)
    except Exception:
        logger.exception("a batch failed")
        return [failed(RefusedError(500, "internal server error")) for _ in asks]
    return [_to_ask(ask, outcome) for ask, outcome in zip(asks, outcomes, strict=True)]


def _to_ask(ask: Ask, outcome: Outcome) -> Reply:
    if isinstance(outcome, RefusedError):
        return failed(outcome)
    try:
        outputs = {name: json_of(value, ask.as_base64) for name, value in outcome.items()}
    except (KeyError, TypeError):  # a dtype that no JSON stands for
        logger.exception("an answer of %s cannot be written", ask.model)
        return failed(RefusedError(500, "the answer cannot be written as JSON"))
    return Reply(200, {"model": ask.model, "outputs": outputs})


def to_change(rows: Rows, change: Add | Remove) -> Reply:
    """After a model was added or removed, or why it was not."""
    try:
        if isinstance(change, Add):
            rows.model.add_adapter(change.model, change.path)
        else:
            rows.model.delete_adapter(change.model, change.path)
    except UnknownModelError:
        return failed(unknown(change.model))
    except CapacityError as error:
        return failed(RefusedError(409, str(error), "model"))
    except (RandesError, ValueError, OSError) as error:
        return failed(RefusedError(400, str(error), "model"))
    except Exception:
        logger.exception("%s could not be changed", change.model)
        return failed(RefusedError(500, "internal server error"))
    removed = {"deleted": True} if isinstance(change, Remove) else {"owned_by": "randes"}
    return Reply(200, {"id": change.model, "object": "model", **removed})


def to_list(rows: Rows, store: Store, since: int) -> Reply:
    """The models. since: seconds since the epoch."""
    models = [
        {"id": name, "object": "model", "created": since, "owned_by": "randes", "root": store.path,
         "parent": None if name == BASE_NAME else BASE_NAME}
        for name in rows.names
    ]  # fmt: skip
    return Reply(200, {"object": "list", "data": models})


def failed(error: RefusedError) -> Reply:
    """The reply that says why there is no answer."""
    kind = KINDS.get(error.status, "BadRequestError")
    content = {"message": str(error), "type": kind, "param": error.parameter, "code": error.status}
    return Reply(error.status, {"error": content})
