"""Parts of a store made by a Ray cluster, one task each."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from randes.cluster.compress import Runner
from randes.cluster.parts import Job, Part
from randes.errors import RandesError

RETRIES = 3
"""Times that a task is tried again whose worker was lost, or that a disk or a server refused something."""


def on_ray(address: str = "auto", *, retries: int = RETRIES) -> Runner:
    """A ``Runner`` on a Ray cluster, a task a part and a core a task.

    address: of the cluster, as ``ray.init`` takes it; "auto" for the one that this machine belongs to, "local" for one
        of this machine's cores, which ends with the store. Each of its machines has this version of randes.
    retries: times that a task is tried again where its worker dies, or raises ``OSError``.
    Raises ``ImportError`` without Ray, and while it runs ``RandesError`` where there is no cluster or a worker dies
    each time.
    """
    ray = _library()

    def run(function: Callable[[Job, int], Part], job: Job, numbers: range) -> Iterator[Part]:
        ours = not ray.is_initialized()
        if ours:
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
            except Exception as error:  # whatever Ray has against an address
                raise RandesError(f"there is no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from error
        try:
            task = ray.remote(num_cpus=1, max_retries=retries, retry_exceptions=[OSError])(function)
            waiting = [task.remote(job, number) for number in numbers]
            while waiting:
                done, waiting = ray.wait(waiting)
                yield _answer(ray, done[0], retries)
        finally:
            if ours:
                ray.shutdown()

    return run


def _answer(ray: Any, done: Any, retries: int) -> Part:
    try:
        part: Part = ray.get(done)
        return part
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else RandesError(str(error))) from error
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()[0]
        raise RandesError(f"a part could not be made, which was tried {retries + 1} times: {said}") from error


def _library() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("this needs Ray: pip install 'randes[ray]'") from error
