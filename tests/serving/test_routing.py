"""Which model answers which row: names become ids once, and a choice reaches its own calls alone."""

import asyncio
import copy
import re
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from randes import UnknownModelError
from randes.serving.batch import Batch
from randes.serving.routing import Router


def test_names_become_their_numbers_and_the_base_minus_one() -> None:
    batch = Router(["a", "b"]).of(["b", "__base__", "a", "b"])
    assert batch.ids.tolist() == [1, -1, 0, 1]
    assert batch.ids.dtype == torch.int32
    assert batch.mixed
    assert not batch.base_only


@pytest.mark.parametrize(("names", "ids", "base_only"), [(["b"] * 3, [1], False), (["__base__"] * 3, [-1], True)])
def test_rows_that_are_all_alike_are_one_run(names: list[str], ids: list[int], base_only: bool) -> None:
    batch = Router(["a", "b"]).of(names)
    assert batch.ids.tolist() == ids
    assert batch.base_only is base_only
    assert not batch.mixed


def test_every_unknown_name_is_listed_beside_the_known_ones() -> None:
    with pytest.raises(UnknownModelError, match=r"^no model is called 'x', 'y'; there are: a, b$"):
        Router(["a", "b"]).of(["y", "a", "x"])
    with pytest.raises(UnknownModelError, match=r"there are: no models$"):
        Router([]).of(["a"])


@pytest.mark.parametrize("names", ["a", "", [], (), {"a"}, {"a": 1}, {"a": 1}.keys(), iter(["a"]), b"a", None])
def test_what_has_no_order_of_rows_is_refused(names: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"adapter_names must be a list with one name a row, got {re.escape(repr(names))}"
    ):
        Router(["a"]).of(names)


def test_the_base_is_never_a_default() -> None:
    with pytest.raises(RuntimeError, match="no model is chosen"):
        Router(["a"]).batch()


def test_the_innermost_choice_counts_and_the_one_before_comes_back() -> None:
    router = Router(["a", "b", "c"])
    router.chosen = router.of(["a"])
    b, c = router.of(["b"]), router.of(["c"])
    with router.during(b):
        assert router.batch() is b
        with router.during(c):
            assert router.batch() is c
        assert router.batch() is b
    assert router.batch() is router.chosen


def test_a_choice_for_one_thread_is_not_seen_by_another() -> None:
    router = Router(["a", "b"])
    router.chosen = router.of(["a"])
    seen: list[Batch] = []
    with router.during(router.of(["b"])):
        thread = threading.Thread(target=lambda: seen.append(router.batch()))
        thread.start()
        thread.join()
    assert seen == [router.chosen]


def test_a_copy_starts_from_the_choice_for_all_calls() -> None:
    router = Router(["a", "b"])
    router.chosen = router.of(["b"])
    with router.during(router.of(["a"])):
        copied = copy.deepcopy({"x": router, "y": router})
    assert copied["x"] is copied["y"]
    assert copied["x"].batch().ids.tolist() == [1]
    copied["x"].chosen = None
    assert router.batch().ids.tolist() == [1]


@pytest.mark.parametrize("shape", [(2, 8), (2, 5, 8), (6, 8)])
def test_an_input_whose_rows_are_the_batch_or_equal_runs_of_it_fits(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    for first in (torch.zeros(2, 3, dtype=torch.int64), torch.empty(2, 3, 8)):
        assert Router(["a", "b"]).of(["a", "b"]).over(first).spread(x) is x


@pytest.mark.parametrize("first", [torch.empty(2, 3, 4, 4), torch.empty(2, 3), torch.zeros(2, 3, 8, dtype=torch.int64)])
def test_what_is_no_position_is_not_flattened_into_rows(first: torch.Tensor) -> None:
    # Three crops of two images are as many rows as two images of three positions.
    batch = Router(["a", "b"]).of(["a", "b"]).over(first)
    with pytest.raises(ValueError, match="first dimension must be the batch"):
        batch.spread(torch.empty(6, 8))


def test_tokens_that_are_no_whole_rows_are_refused() -> None:
    # Four of six tokens, as an expert layer picks them: whose they are cannot be known.
    batch = Router(["a", "b"]).of(["a", "b"]).over(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="first dimension must be the batch"):
        batch.spread(torch.empty(4, 8))


def test_a_batch_made_for_other_models_is_refused() -> None:
    # Its numbers would stand for other names.
    with pytest.raises(ValueError, match=r"must be a batch of this model, of \('a', 'b'\), got one of \('b',\)"):
        Router(["a", "b"]).of(Router(["b"]).of(["b"]))


def test_one_row_for_all_rows_of_the_batch_is_given_to_each() -> None:
    assert Router(["a", "b"]).of(["a", "b"]).spread(torch.empty(1, 5, 8)).shape == (2, 5, 8)


@pytest.mark.parametrize("shape", [(8,), (), (3, 8), (3, 2, 8)])
def test_an_input_that_does_not_start_with_the_batch_is_refused(shape: tuple[int, ...]) -> None:
    router = Router(["a", "b"])
    with pytest.raises(ValueError, match=r"names 2 rows, but .* first dimension must be the batch"):
        router.of(["a", "b"]).spread(torch.empty(shape))
    router.of(["a", "a"]).spread(torch.empty(shape))


def test_a_search_has_its_beams_rows_and_nothing_else_is_taken_for_them() -> None:
    batch = replace(Router(["a", "b"]).of(["a", "b"]), spreads=3)
    assert batch.over(torch.zeros(6, 4)).ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.over(torch.zeros(2, 4)).ids.tolist() == [0, 1]
    assert batch.over(torch.zeros(12, 4)).rows == 2  # patches of two images, which need not be equally many


# ---------------------------------------------------------------- what can be suspended


def asks(router: Router, name: str, times: int = 8) -> Iterator[None]:
    """Yields between two looks at what is chosen, which must be its own."""
    with router.using(router.of([name])):
        for _ in range(times):
            assert named(router) == name
            yield
            assert named(router) == name


def named(router: Router) -> str | None:
    batch = router.current()
    return None if batch is None else batch.named.versions[0].name


def test_tasks_that_await_inside_a_scope_do_not_meet() -> None:
    router = Router(["a", "b", "c"])

    @contextmanager
    def wrapped(name: str) -> Iterator[None]:
        with router.using(router.of([name])):
            yield

    async def ask(name: str, wraps: bool) -> None:
        with wrapped(name) if wraps else router.using(router.of([name])):
            for _ in range(10):
                await asyncio.sleep(0)
                assert named(router) == name
                with router.during(router.of(["c"])):
                    assert named(router) == "c"
                with router.using(router.of(["c"])):
                    assert named(router) == "c"
                    await asyncio.sleep(0)
                    assert named(router) == "c"
        assert named(router) is None

    async def all_at_once() -> None:
        await asyncio.gather(*(ask("ab"[number % 2], number % 3 == 0) for number in range(9)))
        assert named(router) is None

    asyncio.run(all_at_once())
    assert named(router) is None
    router.choose("c")
    asyncio.run(asyncio.wait_for(ask_chosen(router), 5))


async def ask_chosen(router: Router) -> None:
    """A task without a scope beside one that has one."""

    async def other() -> None:
        with router.using(router.of(["a"])):
            for _ in range(4):
                await asyncio.sleep(0)

    task = asyncio.create_task(other())
    for _ in range(3):
        await asyncio.sleep(0)
        assert named(router) == "c"
    await task


def test_what_a_task_starts_in_a_thread_or_a_task_has_its_scope() -> None:
    router = Router(["a", "b"])

    async def ask(name: str) -> None:
        with router.using(router.of([name])):
            for _ in range(3):
                assert await asyncio.to_thread(named, router) == name
            assert await asyncio.create_task(later()) == name
            left = asyncio.create_task(later())
        assert await left == name  # it runs when the scope has ended, as its context says

    async def later() -> str | None:
        await asyncio.sleep(0)
        return named(router)

    async def both() -> None:
        await asyncio.gather(ask("a"), ask("b"))

    asyncio.run(both())


def test_generators_that_yield_inside_a_scope_do_not_meet() -> None:
    router = Router(["a", "b"])
    for _ in zip(asks(router, "a"), asks(router, "b"), strict=True):
        assert named(router) is None
    left = asks(router, "a")
    next(left)
    assert named(router) is None
    left.close()
    router.choose("b")
    in_threads = asks(router, "a", times=3)  # as servers run what streams an answer
    for _ in range(3):
        thread = threading.Thread(target=lambda: next(in_threads))
        thread.start()
        thread.join()
        assert named(router) == "b"
    in_threads.close()
    assert router._suspendable == []


@contextmanager
def wrapped(router: Router, name: str) -> Iterator[None]:
    with router.using(router.of([name])):
        yield


def test_a_generator_keeps_its_scope_whoever_consumes_it() -> None:
    router = Router(["a", "b", "c"])
    router.choose("a")
    its = asks(router, "c", times=12)
    next(its)
    with router.using(router.of(["b"])):
        next(its)
        assert named(router) == "b"
        with wrapped(router, "a"), router.during(router.of(["b"])):
            next(its)
            assert named(router) == "b"
    begun_inside = asks(router, "b")
    with router.using(router.of(["c"])):
        next(begun_inside)
    with router.using(router.of(["a"])):
        next(begun_inside)
        assert named(router) == "a"

    async def consume() -> None:
        opened_before = asks(router, "a")
        next(opened_before)
        with router.using(router.of(["b"])):
            next(its)
            next(opened_before)
            await asyncio.to_thread(next, opened_before)
            await asyncio.create_task(in_a_task(its))
            assert named(router) == "b"

    async def in_a_task(its: Iterator[None]) -> None:
        next(its)
        assert named(router) == "b"  # of the task that started this one
        with router.using(router.of(["a"])):
            next(its)
            assert named(router) == "a"

    def around(its: Iterator[None]) -> Iterator[None]:
        with router.using(router.of(["b"])):
            for _ in its:
                assert named(router) == "b"
                yield
                asyncio.run(consume())

    next(around(its))
    asyncio.run(consume())
    next(it for it in [around(its)] if next(it) is None)
    its.close()
    begun_inside.close()


def test_a_scope_inside_a_call_inside_a_coroutine_is_the_innermost() -> None:
    router = Router(["a", "b", "c"])

    async def ask() -> None:
        with router.using(router.of(["a"])), router.during(router.of(["b"])):
            with router.using(router.of(["c"])):
                assert named(router) == "c"
                with router.during(router.of(["a"])):
                    assert named(router) == "a"
                assert named(router) == "c"
            assert named(router) == "b"

    asyncio.run(ask())


def test_async_generators_keep_their_scope_and_what_they_start_elsewhere_is_refused() -> None:
    router = Router(["a", "b", "c"])
    router.choose("a")

    async def later() -> str | None:
        return named(router)

    async def with_its_own(name: str) -> None:
        with router.using(router.of([name])):
            assert named(router) == name
            assert await asyncio.to_thread(named, router) == name

    async def stream() -> AsyncIterator[str | None]:
        with router.using(router.of(["c"])):
            while True:
                yield named(router)
                with pytest.raises(RuntimeError, match=r"async generator: .* pass adapter_names"):
                    await asyncio.to_thread(named, router)
                for start in (asyncio.create_task, asyncio.gather, lambda work: asyncio.wait_for(work, 5)):
                    with pytest.raises(RuntimeError, match=r"async generator: .* pass adapter_names"):
                        await start(later())
                await with_its_own("b")
                assert named(router) == "c"

    async def consume() -> None:
        its = stream()
        assert await anext(its) == "c"
        assert named(router) == "a"
        with router.using(router.of(["b"])):
            assert await anext(its) == "c"
            assert named(router) == "b"
            with pytest.raises(RuntimeError, match="by who iterates over it"):
                await asyncio.to_thread(named, router)
            await asyncio.create_task(with_its_own("b"))
            assert await anext(its) == "c"
        with pytest.raises(RuntimeError, match="by who iterates over it"):  # silence would be wrong for one of the two
            await asyncio.create_task(later())
        await its.aclose()
        assert await asyncio.create_task(later()) == "a"

    asyncio.run(consume())
    assert router._suspendable == []


# ---------------------------------------------------------------- how a scope is entered and left


def test_a_scope_belongs_to_who_enters_it_and_not_to_who_made_it() -> None:
    router = Router(["a", "b"])
    router.choose("a")
    made = router.using(router.of(["b"]))

    async def one(done: asyncio.Event) -> None:
        with made:
            assert named(router) == "b"
            await done.wait()
            assert named(router) == "b"

    async def both() -> None:
        done = asyncio.Event()
        task = asyncio.create_task(one(done))
        await asyncio.sleep(0)
        assert named(router) == "a"
        with pytest.raises(RuntimeError, match="entered already"), made:
            pass
        done.set()
        await task

    asyncio.run(both())
    with made:  # once more, now that it was left
        assert named(router) == "b"
    assert router.using(router.of(["b"]))(named)(router) == "b"
    assert named(router) == "a"
    with pytest.raises(RuntimeError, match="not entered"):
        made.__exit__(None, None, None)


def test_scopes_left_in_the_wrong_order_or_in_another_thread_leave_nothing_behind() -> None:
    router = Router(["a", "b", "c"])
    router.choose("a")
    one, other = router.using(router.of(["b"])), router.using(router.of(["c"]))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert named(router) == "c"
    other.__exit__(None, None, None)
    assert named(router) == "a"
    with ThreadPoolExecutor(1) as here, ThreadPoolExecutor(1) as there:
        for scope in (router.using(router.of(["b"])), wrapped(router, "b")):
            here.submit(scope.__enter__).result()
            with pytest.raises(RuntimeError, match="entered in one thread and left in another"):
                there.submit(scope.__exit__, None, None, None).result()
            assert here.submit(named, router).result() == there.submit(named, router).result() == "a"
    outer = router.using(router.of(["c"]))
    outer.__enter__()
    with router.during(router.of(["b"])):
        outer.__exit__(None, None, None)
        assert named(router) == "b"
    assert named(router) == "a"
