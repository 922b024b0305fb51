"""The compiled product with a packed D: what unpacking gives, whatever the shape, the rows and the threads; and what
happens where nothing can be compiled, or what lies in the cache is not ours."""

import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from randes_kernels import cpu_delta, native
from randes_kernels.packing import BITS, Packed, pack, unpack

FORMS = [(bits, group) for bits in BITS for group in ((None,) if bits in (8, 0.5) else (64, 192, 0))]
SHAPES = [(130, 576), (67, 70), (33, 1536), (5, 4100), (1, 1)]


@pytest.fixture
def anew() -> Iterator[None]:
    """The library is looked for again, and again after the test."""
    caches = native._library, native._folder
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


def operands(n: int, k: int, rows: int, bits: float, group: int | None) -> tuple[torch.Tensor, Packed]:
    generator = torch.Generator().manual_seed(n * k)
    return torch.randn(rows, k, generator=generator), pack(torch.randn(n, k, generator=generator), bits, group)


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_it_is_the_product_with_what_unpacks(bits: float, group: int | None) -> None:
    for n, k in SHAPES:
        x, packed = operands(n, k, 13, bits, group)
        expected = x.double() @ unpack(packed).double().mT
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = native.product(x.to(dtype), packed)
            assert found is not None
            right = expected if dtype == torch.float32 else x.to(dtype).double() @ unpack(packed).double().mT
            assert (found - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_no_row_and_no_thread_changes_another_answer(bits: float) -> None:
    x, packed = operands(70, 1300, 11, bits, None)
    together = native.product(x, packed)
    assert together is not None
    for rows in (slice(0, 1), slice(3, 5), slice(4, 11)):
        assert torch.equal(native.product(x[rows], packed), together[rows])  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(native.product(x, packed), together)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)


def test_rows_of_a_packed_matrix_and_one_slot_of_several_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    x, packed = operands(70, 300, 3, 4, 64)
    whole = native.product(x, packed)
    assert whole is not None
    part = packed.rows(slice(9, 20))
    assert torch.equal(native.product(x, part), whole[:, 9:20])  # type: ignore[arg-type]
    slots = packed._replace(words=torch.stack((packed.words, packed.words)), steps=torch.stack((packed.steps,) * 2))
    asked = []
    monkeypatch.setattr(native, "product", lambda *given: asked.append(given) or whole)
    assert torch.equal(cpu_delta.product(x[:, None], slots, 1), whole[:, None])
    assert len(asked) == 1
    many = x.repeat(cpu_delta.NATIVE_ROWS, 1)
    expected = many @ unpack(packed).mT
    assert torch.allclose(cpu_delta.product(many, slots, 1), expected, atol=1e-4)
    assert len(asked) == 1


def test_what_was_compiled_is_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._library() is not None
    (kept,) = (tmp_path / "randes").iterdir()
    written = kept.stat().st_mtime_ns
    native._library.cache_clear()
    monkeypatch.setattr(native.subprocess, "run", lambda *_, **__: pytest.fail("it was compiled again"))
    assert native._library() is not None
    assert kept.stat().st_mtime_ns == written


@pytest.mark.parametrize("whose", ["a folder that others can write to", "a file that others can write to"])
def test_what_others_can_have_written_is_not_run(
    whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._library() is not None
    (kept,) = (tmp_path / "randes").iterdir()
    kept.unlink()  # what is loaded stays as it was
    kept.write_bytes(b"planted")
    (kept if "file" in whose else kept.parent).chmod(0o777)
    native._library.cache_clear()
    native._folder.cache_clear()
    assert native._library() is not None
    assert (kept.read_bytes() != b"planted") == ("file" in whose)


@pytest.mark.parametrize("how", ["none is there", "it makes nothing", "it is switched off"])
def test_without_a_compiler_torch_unpacks(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    x, packed = operands(20, 300, 3, 2, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if how == "none is there":
        monkeypatch.setattr(native, "COMPILERS", ())
        monkeypatch.delenv("CC", raising=False)
    elif how == "it makes nothing":
        monkeypatch.setenv("CC", str(shutil.which("false")))
    else:
        monkeypatch.setenv(native.SWITCH, "0")
    slots = packed._replace(words=packed.words[None], steps=packed.steps[None])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = cpu_delta.product(x, slots, 0)
        assert torch.allclose(found, x @ unpack(packed).mT, atol=1e-4)
        cpu_delta.product(x, slots, 0)
    assert [str(one.message) for one in said if "several times as long" in str(one.message)] == (
        [] if "off" in how else [str(said[0].message)]
    )


def test_a_cache_that_cannot_be_made_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native._library() is not None
    assert os.listdir(tmp_path) == ["file"]


def test_without_threads_that_can_be_shared_it_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_threads_of_torch", lambda: False)
    x, packed = operands(20, 300, 3, 1, None)
    found = native.product(x, packed)
    assert found is not None
    assert torch.allclose(found, x @ unpack(packed).mT, atol=1e-4)
