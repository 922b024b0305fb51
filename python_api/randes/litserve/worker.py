"""LitServe's worker: the one process that has the model, and a loop that answers each request by itself.

LitServe's own loop gives all requests of a batch the error of one, and asks for requests without a pause.
"""

import json
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

from randes.litserve.replies import Add, Remove, Reply, Store, failed, to_asks, to_change, to_list
from randes.litserve.rows import Ask, RefusedError, Rows
from randes.litserve.tensors import array_of

PAUSE = 1.0
"""Seconds after which the loop looks whether it shall end."""
Respond = Callable[[Reply], None]


class Predict(BaseModel):
    """One row for one model: tensors by the names of its arguments, or a text."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr = Field(description="A fine-tune's name, or __base__.")
    inputs: dict[str, Annotated[Any, BeforeValidator(array_of)]] = Field(
        default={}, description="Tensors of one row, without the batch's dimension."
    )
    text: StrictStr | None = Field(default=None, description="In place of inputs, for the store's tokenizer.")
    outputs: list[StrictStr] | None = Field(default=None, description="Those to return; by default all.")
    encoding: Literal["json", "base64"] = Field(default="json", description="Of the answer's tensors.")

    @model_validator(mode="after")
    def _one_of_both(self) -> "Predict":
        if bool(self.inputs) == (self.text is not None):
            raise ValueError("one of inputs and text must be given")
        return self

    def ask(self) -> Ask:
        outputs = None if self.outputs is None else tuple(self.outputs)
        return Ask(self.model, self.inputs, self.text, outputs, self.encoding == "base64")


class NewModel(BaseModel):
    """A fine-tune to superpose and serve."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr = Field(description="Its name.")
    path: StrictStr | None = Field(default=None, description="A checkpoint; none for one that is superposed already.")


@dataclass(frozen=True)
class Names:
    """A question for the names that can be asked for."""


class RowLoop(LitLoop):
    """Answers whatever waits in one batch. Models come and go in a thread beside, while others are answered."""

    changes: ThreadPoolExecutor | None = None

    def run(self, lit_api: "StoreAPI", device: str, worker_id: int, queue: Any, transport: Any, *_: Any) -> None:
        """One batch. LitServe calls it again and again."""
        asks: list[Ask] = []
        responders: list[Respond] = []
        for consumer, uid, since, request in self._waiting(lit_api, queue):
            respond = self._responder(transport, consumer, uid)
            if lit_api.request_timeout not in (-1, False) and time.monotonic() - since > lit_api.request_timeout:
                respond(failed(RefusedError(504, "the request waited for too long")))
            elif isinstance(request, Predict):
                asks.append(request.ask())
                responders.append(respond)
            elif isinstance(request, Names):
                respond(to_list(lit_api.rows, lit_api.store, lit_api.since))
            else:
                self.changes = self.changes or ThreadPoolExecutor(1)
                self.changes.submit(lit_api.change, request, respond)
        for respond, reply in zip(responders, to_asks(lit_api.rows, asks), strict=True):
            respond(reply)

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
        def respond(reply: Reply) -> None:
            self.put_response(transport, consumer, uid, response(reply), LitAPIStatus.OK, LoopResponseType.REGULAR)

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

    def change(self, change: Add | Remove, respond: Respond) -> None:
        """Add or remove a model, and say how it went."""
        respond(to_change(self.rows, change))

    def decode_request(self, request: Predict) -> Predict:  # its type is what LitServe checks bodies against
        return request


def response(reply: Reply) -> Response:
    return Response(json.dumps(reply.content, allow_nan=False), reply.status, media_type="application/json")
