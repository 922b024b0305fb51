"""Which model answers which row: names become ids once, and a choice reaches its own calls alone."""

import copy
import threading

import pytest
import torch

from randes import UnknownModelError
from randes.routing import Batch, Router


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


@pytest.mark.parametrize("names", ["a", "", [], ()])
def test_a_bare_string_and_nothing_at_all_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="list with one name a row"):
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
    assert Router(["a", "b"]).of(["a", "b"]).over(torch.empty(2, 3)).spread(x) is x


def test_tokens_that_are_no_whole_rows_are_refused() -> None:
    # Four of six tokens, as an expert layer picks them: whose they are cannot be known.
    batch = Router(["a", "b"]).of(["a", "b"]).over(torch.empty(2, 3))
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
