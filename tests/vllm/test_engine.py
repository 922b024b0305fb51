"""vLLM's engine answers a mixed batch as ``SuperposedModel.generate`` does, token by token."""

import os
import shutil
from pathlib import Path

import engine
import pytest
import tiny
from engine import answers

import randes

ROWS = [(prompt, name) for prompt in tiny.PROMPTS for name in (*tiny.NAMES, "__base__")]
LONG = [number % 500 + 1 for number in range(70)]


def tokens(found: list[tuple[list[int], int]]) -> list[list[int]]:
    return [row for row, _ in found]


@pytest.mark.parametrize(
    ("tied", "config", "bits", "options"),
    [
        pytest.param(False, {}, None, {}, id="default"),
        pytest.param(True, {}, None, {"enforce_eager": False}, id="tied, compiled"),
        pytest.param(True, {"rank": 4}, 2, {}, id="tied, in 2 bits, with a basis"),
        pytest.param(True, {"embeddings": "shared", "permute": 8, "group_size": 1}, 8, {}, id="superposed embeddings"),
        pytest.param(False, {"vectors": True, "matrix": "rotation"}, 1, {}, id="superposed vectors"),
        pytest.param(False, {"others": "average"}, 4, {}, id="averages"),
    ],
)
def test_a_mixed_batch_is_answered_as_transformers_does(
    tied: bool, config: dict[str, object], bits: float | None, options: dict[str, object], tmp_path: Path
) -> None:
    base = tiny.llama(tied)
    store = tiny.store(tmp_path / "store", base, randes.Config(**{"rank": 0, **config}), bits)  # type: ignore[arg-type]
    (found,) = answers(store, [ROWS], tiny.STEPS, **options)
    wanted = tiny.generated(base, store, ROWS)
    assert tokens(found) == wanted
    # The test can fail: the models answer one prompt in different ways.
    assert len({tuple(row) for row in wanted[:3]}) == 3


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "opt"])
def test_other_norms_and_positions_are_each_models_own(kind: str, tmp_path: Path) -> None:
    """Norms of heads, Gemma's norms, layer norms with biases beside a table of positions."""
    base = tiny.model(kind)
    store = tiny.store(tmp_path / "store", base, randes.Config(rank=0))
    (found,) = answers(store, [ROWS], tiny.STEPS)
    assert tokens(found) == tiny.generated(base, store, ROWS)


@pytest.mark.nightly
def test_what_was_compiled_of_a_store_is_not_used_for_another_in_its_place(tmp_path: Path) -> None:
    """The second's models have norms of their own, which the first's have not."""
    base, folder = tiny.llama(), tmp_path / "store"
    for vectors in (0.0, 0.3):
        shutil.rmtree(folder, ignore_errors=True)
        store = tiny.store(folder, base, randes.Config(rank=0), vectors=vectors)
        kept = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
        (found,) = answers(store, [ROWS], tiny.STEPS, kept, enforce_eager=False)
        assert tokens(found) == tiny.generated(base, store, ROWS)


def test_what_was_cached_of_a_prompt_is_one_models(tmp_path: Path) -> None:
    base = tiny.llama()
    store = tiny.store(tmp_path / "store", base)
    runs = [[(LONG, name)] for name in ("german", "german", "french", "__base__", "german", "french")]
    found = answers(store, runs, tiny.STEPS)
    cached = [count for ((_, count),) in found]
    assert cached == [0, 64, 0, 0, 64, 64]
    assert [row for ((row, _),) in found] == tiny.generated(base, store, [rows[0] for rows in runs])


@pytest.mark.nightly
def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    base = tiny.llama(tied=True)
    store = tiny.store(tmp_path / "store", base)
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    wanted = tiny.generated(base, store, ROWS)
    (found,) = answers(store, [ROWS], tiny.STEPS, bound, tensor_parallel_size=2)
    assert tokens(found) == wanted
    # The control: with signs that do not know where a shard begins all fine-tunes are wrong, and the base is right.
    path = os.pathsep.join((str(engine.HERE / "without_origins"), os.environ.get("PYTHONPATH", "")))
    (wrong,) = answers(store, [ROWS], tiny.STEPS, {**bound, "PYTHONPATH": path}, tensor_parallel_size=2)
    right = [row == own for row, own in zip(tokens(wrong), wanted, strict=True)]
    assert right == [name == "__base__" for _, name in ROWS]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"enable_lora": False}, "a store must be served with --enable-lora", id="no adapters"),
        pytest.param({"load_format": "auto"}, "a store must be served with --load-format randes", id="loader"),
        pytest.param({"enable_prompt_embeds": True}, "a store is not served with --enable-prompt-embeds", id="embeds"),
    ],
)
def test_what_would_answer_wrongly_does_not_start(options: dict[str, object], said: str, tmp_path: Path) -> None:
    store = tiny.store(tmp_path / "store", tiny.llama())
    wanted = {"store": str(store), "options": {**engine.OPTIONS, **options}, "runs": [], "steps": 1}
    ran = engine.run(wanted)
    assert ran.returncode != 0
    assert f"NotServedError: {said}" in ran.stderr


def test_experts_are_refused(tmp_path: Path) -> None:
    base = tiny.model("mixtral", num_local_experts=2, num_experts_per_tok=1)
    store = tiny.store(tmp_path / "store", base, randes.Config(rank=0))
    ran = engine.run({"store": str(store), "options": engine.OPTIONS, "runs": [], "steps": 1})
    assert ran.returncode != 0
    assert "a store is not served with experts by vLLM" in ran.stdout + ran.stderr


def test_a_bad_name_never_ends_the_engine(tmp_path: Path) -> None:
    store = tiny.store(tmp_path / "store", tiny.llama())
    wanted = {"store": str(store), "options": engine.OPTIONS, "runs": [], "steps": 4, "bad": True}
    ran = engine.run(wanted)
    assert ran.returncode == 0, ran.stderr[-6000:]
    *errors, tokens = engine.said(ran)
    assert "no model is called 'spanish'" in errors[0]
    assert "lora_path must be randes:NAME" in errors[1]
    assert "as the store is now" in errors[2]
    assert tokens == "4 tokens"
