"""LitServe's worker: the one process that has the model, and a loop that answers each request by itself.

LitServe's own loop gives all requests of a batch the error of one, and asks for requests without a pause.
"""

import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty
from typing import Annotated, Any, Literal

from litserve import LitAPI
from litserve.loops import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, model_validator
from starlette.responses import Response
from torch import nn

from randes.checkpoints.huggingface import CONFIG, library
from randes.errors import CapacityError, RandesError, UnknownModelError
from randes.litserve.rows import Ask, Outcome, RefusedError, Rows, unknown
from randes.litserve.tensors import array_of, json_of
from randes.serving.load import load
from randes.serving.model import SuperposedModel
from randes.superposition.members import BASE_NAME
from randes.superposition.superposition import Superposition

logger = logging.getLogger(__name__)
PAUSE = 1.0
"""Seconds after which the loop looks whether it shall end."""
Respond = Callable[[Response], None]
KINDS = {404: "NotFoundError", 409: "ConflictError", 500: "InternalServerError", 503: "ServiceUnavailableError"}


class Predict(BaseModel):
    """One row for one model: tensors by the names of its arguments, or a text."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    model: StrictStr = Field(description="A fine-tune's name, or __base__.")
    inputs: dict[str, Annotated[Any, BeforeValidator(array_of)]] = Field(
        default={}, description="Tensors of one row, without the batch's dimension."
    )
    text: StrictStr | None = Field(default=None, description="In place of inputs, for the store's tokenizer.")
    outputs: list[StrictStr] | None = Field(default=None, description="Those that are wanted; by default all.")
    encoding: Literal["json", "base64"] = Field(default="json", description="Of the answer's tensors.")

    @model_validator(mode="after")
    def _one_of_both(self) -> "Predict":
        if bool(self.inputs) == (self.text is not None):
            raise ValueError("one of inputs and text must be given")
        return self

    def ask(self) -> Ask:
        return Ask(self.model, self.inputs, self.text, None if self.outputs is None else tuple(self.outputs))


class NewModel(BaseModel):
    """A fine-tune to superpose and serve."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr = Field(description="Its name.")
    path: StrictStr | None = Field(default=None, description="A checkpoint; none for one that is superposed already.")


@dataclass(frozen=True)
class Remove:
    """A fine-tune to stop serving. path: its checkpoint, to subtract it."""

    model: str
    path: str | None = None


@dataclass(frozen=True)
class Names:
    """A question for the names that can be asked for."""


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
        """Raises what ``randes.load`` does."""
        superposition = Superposition.load(self.path)
        capacity = len(superposition.served) + self.room if self.room else None
        if self.module is None:
            model = SuperposedModel.from_pretrained(self.path, superposition, capacity=capacity)
        else:
            model = load(superposition, self._made(self.module), capacity=capacity)
        tokenizer = None
        if CONFIG in superposition.model_files and any("tokenizer" in name for name in superposition.model_files):
            tokenizer = library().AutoTokenizer.from_pretrained(self.path)
        return Rows(model.to(device).eval(), tokenizer)

    @staticmethod
    def _made(where: str) -> nn.Module:
        module, _, function = where.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            made = getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"module must be 'package.module:function', got {where!r}: {error}") from error
        if not isinstance(made, nn.Module):
            raise ValueError(f"{where} must make an nn.Module, got {type(made).__name__}")
        return made


class RowLoop(LitLoop):
    """Answers whatever waits in one batch. Models come and go in a thread beside, while others are answered."""

    changes: ThreadPoolExecutor | None = None

    def run(self, lit_api: "StoreAPI", device: str, worker_id: int, queue: Any, transport: Any, *_: Any) -> None:
        """One batch. LitServe calls it again and again."""
        asked = []
        for consumer, uid, since, request in self._waiting(lit_api, queue):
            respond = self._responder(transport, consumer, uid)
            if lit_api.request_timeout not in (-1, False) and time.monotonic() - since > lit_api.request_timeout:
                respond(failed(RefusedError(504, "the request waited for too long")))
            elif isinstance(request, Predict):
                asked.append((request, respond))
            elif isinstance(request, Names):
                respond(answered(listed(lit_api.rows, lit_api.store.path, lit_api.since)))
            else:
                self.changes = self.changes or ThreadPoolExecutor(1)
                self.changes.submit(lit_api.change, request, respond)
        for (_, respond), response in zip(asked, responses(lit_api.rows, [one for one, _ in asked]), strict=True):
            respond(response)

    def _waiting(self, lit_api: "StoreAPI", queue: Any) -> list[Any]:
        """Requests that wait, as many as one batch takes, or none yet. Ends the process where the server has ended."""
        found: list[Any] = []
        try:
            found.append(queue.get(timeout=PAUSE))
            until = time.monotonic() + lit_api.batch_timeout
            while len(found) < lit_api.max_batch_size:
                left = until - time.monotonic()
                found.append(queue.get(timeout=left) if left > 0 else queue.get_nowait())
        except Empty:
            if os.getppid() != self._server_pid:  # the server was killed
                raise SystemExit from None
        except (KeyboardInterrupt, EOFError, OSError):
            raise SystemExit from None
        if any(request[1] is None for request in found):  # LitServe's word for the end
            raise SystemExit
        return found

    def _responder(self, transport: Any, consumer: int, uid: str) -> Respond:
        def respond(response: Response) -> None:
            self.put_response(transport, consumer, uid, response, LitAPIStatus.OK, LoopResponseType.REGULAR)

        return respond


class StoreAPI(LitAPI):
    """Serves a store. batch: most rows in one call. wait: seconds that a batch waits for more of them."""

    rows: Rows

    def __init__(self, store: Store, *, batch: int, wait: float) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=wait, loop=RowLoop())
        self.store, self.since = store, int(time.time())

    def setup(self, device: str) -> None:
        """In the worker, once."""
        try:
            self.rows = self.store.load(device)
        except Exception as error:
            print(f"{self.store.path} cannot be loaded: {error}", file=sys.stderr, flush=True)
            raise

    def change(self, request: NewModel | Remove, respond: Respond) -> None:
        """Add or remove a model, and say how it went."""
        respond(changed(self.rows, request))

    def decode_request(self, request: Predict) -> Predict:  # its type is what LitServe checks bodies against
        return request


# ---------------------------------------------------------------- responses


def responses(rows: Rows, requests: list[Predict]) -> list[Response]:
    """One for each request, whatever they hold."""
    if not requests:
        return []
    try:
        outcomes: list[Outcome] = rows.answer([request.ask() for request in requests])
    except Exception:
        logger.exception("a batch failed")
        return [failed(RefusedError(500, "internal server error")) for _ in requests]
    return [_response(request, outcome) for request, outcome in zip(requests, outcomes, strict=True)]


def _response(request: Predict, outcome: Outcome) -> Response:
    if isinstance(outcome, RefusedError):
        return failed(outcome)
    try:
        outputs = {name: json_of(value, request.encoding == "base64") for name, value in outcome.items()}
        return answered({"model": request.model, "outputs": outputs})
    except Exception:
        logger.exception("an answer of %s cannot be written", request.model)
        return failed(RefusedError(500, "the answer cannot be written as JSON"))


def changed(rows: Rows, request: NewModel | Remove) -> Response:
    """After a model was added or removed, or why it was not."""
    try:
        if isinstance(request, NewModel):
            rows.model.add_adapter(request.model, request.path)
        else:
            rows.model.delete_adapter(request.model, request.path)
    except UnknownModelError:
        return failed(unknown(request.model))
    except CapacityError as error:
        return failed(RefusedError(409, str(error), "model"))
    except (RandesError, ValueError, OSError) as error:
        return failed(RefusedError(400, str(error), "model"))
    except Exception:
        logger.exception("%s could not be changed", request.model)
        return failed(RefusedError(500, "internal server error"))
    removed = {"deleted": True} if isinstance(request, Remove) else {"owned_by": "randes"}
    return answered({"id": request.model, "object": "model", **removed})


def listed(rows: Rows, store: str, since: int) -> dict[str, Any]:
    """The models as OpenAI's interface lists them."""
    models = [
        {"id": name, "object": "model", "created": since, "owned_by": "randes", "root": store,
         "parent": None if name == BASE_NAME else BASE_NAME}
        for name in rows.names
    ]  # fmt: skip
    return {"object": "list", "data": models}


def answered(content: object) -> Response:
    return Response(json.dumps(content, allow_nan=False), media_type="application/json")


def failed(error: RefusedError) -> Response:
    """An error as OpenAI's interface has it."""
    kind = KINDS.get(error.status, "BadRequestError")
    content = {"error": {"message": str(error), "type": kind, "param": error.parameter, "code": error.status}}
    return Response(json.dumps(content), error.status, media_type="application/json")
