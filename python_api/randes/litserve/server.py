"""The server: LitServe's HTTP process, which checks requests and queues them for the worker.

POST   /predict             {"model": "german", "inputs": {...}} or {"model": "german", "text": "..."}
GET    /v1/models           the names that can be asked for
POST   /v1/models           {"model": "medical", "path": "medical/"}: superpose one more and serve it
DELETE /v1/models/NAME      stop serving it; with ?path=medical/ also subtract it
"""

import os
import signal
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from litserve import LitServer
from litserve.server import RegularRequestHandler
from starlette.exceptions import HTTPException
from starlette.responses import Response

from randes.litserve.replies import Add, Remove, Store, failed
from randes.litserve.rows import RefusedError
from randes.litserve.worker import Names, NewModel, StoreAPI, response

MOST_BYTES = 100 << 20
"""Of one request."""


def server_of(
    store: Store, *, batch: int = 32, wait: float = 0.0, changes: bool = False, device: str = "auto",
    timeout: float = 30.0,
) -> LitServer:  # fmt: skip
    """A LitServe server for a store, which ``run`` starts.

    batch: most rows in one call of the model. wait: seconds that a batch waits for more rows; what comes while another
        is computed is in one without.
    changes: whether models may be added and removed by requests, which may name any path that the server can read.
    device: "cpu", "cuda" or "auto". timeout: seconds after which a request that still waits is given up.
    """
    api = StoreAPI(store, batch=batch, wait=wait)
    server = LitServer(
        api, accelerator=device, devices=1, timeout=timeout, max_payload_size=MOST_BYTES,
        model_metadata={"store": store.path},
    )  # fmt: skip
    _add_routes(server.app, RegularRequestHandler(api, server), [Depends(server.setup_auth(api))], changes)
    return server


def run(server: LitServer, host: str = "127.0.0.1", port: int = 8000, *, log_level: str = "info") -> None:
    """Serve until it is interrupted or terminated. Call it in the main thread of a program's ``__main__``, which its
    processes import again.

    Raises ``ValueError`` for a host or port that LitServe does not take, ``SystemExit`` for a port that is taken, and
    ``RuntimeError`` where the model cannot be loaded, with the reason in the log, or its process was killed.
    """
    main = os.getpid()

    def end(*_: object) -> None:  # LitServe ends its processes on an interrupt alone; they inherit this
        raise KeyboardInterrupt if os.getpid() == main else SystemExit

    before = signal.signal(signal.SIGTERM, end)
    try:
        server.run(host=host, port=port, generate_client_file=False, log_level=log_level)
    except RuntimeError as error:
        raise RuntimeError("the model cannot be loaded, for the reason above") from error
    except EOFError as error:  # LitServe ends everything then, what it waits for included
        raise RuntimeError("the process that has the model was ended, and the server with it") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _add_routes(app: FastAPI, handler: Any, auth: list[Any], changes: bool) -> None:
    @app.get("/v1/models", dependencies=auth)
    async def models() -> Response:
        """The names that can be asked for."""
        found: Response = await handler.handle_request(Names(), Names)
        return found

    if changes:

        @app.post("/v1/models", dependencies=auth)
        async def add(request: NewModel) -> Response:
            """Superpose a fine-tune and serve it."""
            found: Response = await handler.handle_request(Add(request.model, request.path), Add)
            return found

        @app.delete("/v1/models/{name:path}", dependencies=auth)
        async def remove(name: str, path: str | None = None) -> Response:
            """Stop serving a fine-tune."""
            found: Response = await handler.handle_request(Remove(name, path), Remove)
            return found

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        text = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found)
        status = 400 if any(one["type"] == "json_invalid" for one in found) else 422
        return response(
            failed(RefusedError(status, text, str(found[0]["loc"][-1]) if found and status == 422 else None))
        )

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        reply = response(failed(RefusedError(error.status_code, str(error.detail))))
        reply.headers.update(error.headers or {})
        return reply
