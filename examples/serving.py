"""A server's loop: one thread answers a stream of requests for any models, another adds and deletes models meanwhile.

    python examples/serving.py

Requests that wait are answered together, whatever models they name. A request for a model that is not served gets the
error, by itself. Everything is random and small: 12 layers, 64 wide, and fine-tunes that are the base and noise.
"""

import argparse
import copy
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import randes

MOST_ROWS = 16
"""Of a batch."""


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())


def network(layers: int = 12, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(block(width) for _ in range(layers)), nn.Linear(width, 10))


def finetune(base: nn.Module, seed: int) -> nn.Module:
    """A stand-in for one: the base and noise."""
    tuned, noise = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    return tuned


@dataclass
class Request:
    """x: (K,), one row. answer: what will come of it."""

    name: str
    x: Tensor
    answer: Future[Tensor] = field(default_factory=Future)


class Server:
    """Answers requests in one thread until it is closed."""

    def __init__(self, model: randes.SuperposedModel) -> None:
        self.model = model
        self._requests: queue.Queue[Request | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def ask(self, name: str, x: Tensor) -> Future[Tensor]:
        request = Request(name, x)
        self._requests.put(request)
        return request.answer

    def close(self) -> None:
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._requests.get()) is not None:
            waiting, first = [first], None
            while len(waiting) < MOST_ROWS and not self._requests.empty():
                request = self._requests.get()
                if request is None:
                    self._requests.put(None)  # after these
                    break
                waiting.append(request)
            self._answer(waiting)

    @torch.inference_mode()
    def _answer(self, requests: list[Request]) -> None:
        try:
            y = self.model(torch.stack([r.x for r in requests]), adapter_names=[r.name for r in requests])
        except Exception as error:
            if len(requests) == 1:
                requests[0].answer.set_exception(error)
                return
            for request in requests:  # whose it is comes out one by one
                self._answer([request])
            return
        for request, row in zip(requests, y, strict=True):
            request.answer.set_result(row)


def change(model: randes.SuperposedModel, verb: str, name: str, checkpoint: nn.Module, patience: float = 10.0) -> float:
    """Add or delete a model, and again where calls under way still need what the last change replaced.

    Returns the seconds that it took."""
    start = time.perf_counter()
    while True:
        try:
            getattr(model, verb)(name, checkpoint)
            return time.perf_counter() - start
        except randes.CapacityError:
            if time.perf_counter() - start > patience:
                raise
            time.sleep(0.005)


@dataclass
class Found:
    """answered, refused: requests. changes: seconds of each. longest: seconds for one and ``rows`` requests with it."""

    answered: int
    refused: int
    changes: list[float]
    longest: float
    rows: int


def run(requests: int = 400, changes: int = 8) -> Found:
    """Serve "a" and "b" all the time, and "guest" between every second change and the next."""
    base = network()
    tuned = {name: finetune(base, seed) for seed, name in enumerate(("a", "b", "guest"), 1)}
    sup = randes.Superposition.create(base)
    for name in ("a", "b"):
        sup.add(name, tuned[name])
    model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=4)
    server = Server(model)
    names, rows = ["a", "guest", "__base__", "b"], requests // changes
    took: list[float] = []
    answered = refused = 0
    longest = 0.0
    try:
        for part in range(changes):
            start = time.perf_counter()
            answers = [server.ask(names[row % 4], torch.ones(64)) for row in range(rows)]
            took.append(change(model, "delete_adapter" if part % 2 else "add_adapter", "guest", tuned["guest"]))
            for answer in answers:
                try:
                    answer.result()
                    answered += 1
                except randes.UnknownModelError:
                    refused += 1
            longest = max(longest, time.perf_counter() - start)
    finally:
        server.close()
    return Found(answered, refused, took, longest, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a stream of requests while a model comes and goes.")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--changes", type=int, default=8)
    given = parser.parse_args()
    found = run(given.requests, given.changes)
    middle = sorted(found.changes)[len(found.changes) // 2]
    print(f"{found.answered} requests answered, {found.refused} refused while their model was not served;")
    print(f"{len(found.changes)} changes of {1e3 * middle:.0f} ms each (median), beside them;")
    print(f"at most {1e3 * found.longest:.0f} ms for {found.rows} requests and a change")


if __name__ == "__main__":
    main()
