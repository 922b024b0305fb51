"""For which calls a batch was chosen: those of one thread, and inside a coroutine or a generator of that one alone."""

import contextlib
import inspect
import sys
import threading
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from types import FrameType

import torch

from randes.serving.batch import Batch


class Scope:
    """A batch that was chosen for a while."""

    def __init__(self, batch: Batch | None) -> None:
        self.batch = batch


OUTSIDE = Scope(None)


class Scoped(threading.local):
    """What a call of this thread has chosen; threads that use different models at once do not meet."""

    def __init__(self) -> None:
        self.scope = OUTSIDE
        self.before: list[Scope] = []  # of the calls of whole models under way, innermost last


class SuspendableScope(Scope):
    """A scope that was opened inside a coroutine or a generator: it counts while that is running, in any thread.

    Python tells nobody that one is suspended, but its frame is not on a thread's stack then. What a coroutine starts
    elsewhere (a task, a function in a thread) runs without its frame, and finds the scope in its context.
    """

    def __init__(self, batch: Batch, owner: FrameType, outer: Scope, opened: "list[SuspendableScope]") -> None:
        super().__init__(batch)
        self._owner, self._outer, self._opened = owner, outer, opened

    def __enter__(self) -> None:
        self._opened.append(self)
        if self._owner.f_code.co_flags & inspect.CO_COROUTINE:  # a generator's context is that of whoever runs it
            _TASK.set((*_TASK.get(), self))

    def __exit__(self, *_: object) -> None:
        self._opened.remove(self)
        _TASK.set(tuple(scope for scope in _TASK.get() if scope is not self))

    def counts(self, running: Collection[FrameType], scope: Scope) -> bool:
        """Whether this is chosen, with these frames on the stack and ``scope`` the thread's innermost other one: that
        may be of a call that was made since."""
        return scope in (self._outer, OUTSIDE) and (self._owner in running or self in _TASK.get())


_TASK: ContextVar[tuple[SuspendableScope, ...]] = ContextVar("randes_scopes", default=())


def innermost(scope: Scope, opened: Sequence[SuspendableScope]) -> Scope:
    """The scope that counts now: ``scope``, or one of those that were opened in coroutines and generators."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "using(...) and disable_adapter() inside a coroutine or a generator cannot be seen by a compiled model:"
            " pass adapter_names=[...] to its calls"
        )
    running = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    return next((own for own in reversed(tuple(opened)) if own.counts(running, scope)), scope)


def _file(frame: FrameType | None) -> str | None:
    return None if frame is None else frame.f_code.co_filename


_SUSPENDABLE = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE


def suspendable_frame(frame: FrameType | None) -> FrameType | None:
    """The nearest caller that can be suspended; None where there is none. Generators that are context managers, as
    ``contextlib`` runs them, are left out: what counts is who entered them."""
    while frame is not None:
        entered_by = frame.f_back
        if frame.f_code.co_flags & _SUSPENDABLE and not {_file(frame), _file(entered_by)} & {contextlib.__file__}:
            return frame
        frame = entered_by
    return None
