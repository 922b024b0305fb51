"""Threads beside one another: values made ahead of whoever takes them, and operators that torch does not split."""

from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Barrier, Event, Semaphore, Thread
from typing import Generic, TypeVar

import torch

AHEAD = 2
"""Parts that are read while another is computed with."""
T = TypeVar("T")


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class ahead(Iterator[T], Generic[T]):  # noqa: N801 (used as the functions of itertools are)
    """The same values in the same order, made by a thread that is ``AHEAD`` values ahead at most.

    room: how many values there may be instead, those that were taken included, until the taker releases their places.
    To be closed, or used in a ``with``: that ends the thread.
    """

    def __init__(self, values: Iterable[T], room: Semaphore | None = None) -> None:
        self._values: SimpleQueue[T | _Failed] = SimpleQueue()
        self._room, self._shared = room or Semaphore(AHEAD), room is not None
        self._stopped = Event()
        self._thread = Thread(target=self._run, args=(iter(values),), daemon=True)
        self._thread.start()

    def _run(self, values: Iterator[T]) -> None:
        try:
            for value in values:
                while not self._room.acquire(timeout=0.1):
                    if self._stopped.is_set():
                        return
                self._values.put(value)
                if self._stopped.is_set():
                    return
            self._values.put(_Failed(StopIteration()))
        except BaseException as error:
            self._values.put(_Failed(error))
        finally:
            if hasattr(values, "close"):
                values.close()

    def __next__(self) -> T:
        value = self._values.get()
        if isinstance(value, _Failed):
            self._values.put(value)  # whoever asks again gets the same answer
            raise value.error
        if not self._shared:
            self._room.release()
        return value

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        with suppress(Empty):
            while True:
                self._values.get_nowait()
        self._values.put(_Failed(CancelledError()))  # for another thread that waits for a value

    def __enter__(self) -> "ahead[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def one_thread() -> ThreadPoolExecutor:
    """A thread in which torch splits no operator over others: those would have to be waited for at each of them, beside
    threads that read and hash."""
    return unsplit_threads(1)


def unsplit_threads(count: int) -> ThreadPoolExecutor:
    """So many of them. What one computes does not depend on how many there are, in the last bits either."""
    others, all_there = torch.get_num_threads(), Barrier(count)

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread sets it
        torch.set_num_threads(1)
        all_there.wait()  # so that none takes two of these

    threads = ThreadPoolExecutor(count)
    for begun in [threads.submit(begin) for _ in range(count)]:
        begun.result()
    torch.set_num_threads(others)  # the threads told all those to come
    return threads
