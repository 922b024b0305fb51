"""Names of fine-tunes in vLLM, and what is refused before it starts."""

import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import finetune, net

import randes
from randes.superposition.store.manifest import read_manifest, version_of
from randes.vllm.paths import Paths, path_of
from randes.vllm.refusals import NotServedError, check, check_request

command = import_module("randes.cli.serve")  # the package has a function of that name


@pytest.fixture
def store(tmp_path: Path) -> Path:
    superposition = randes.Superposition.create(net(), randes.Config(rank=0, group_size=2))
    for number, name in enumerate(("a", "b@c", "d")):
        superposition.add(name, finetune(net(), number))
    superposition.save(tmp_path / "store")
    return tmp_path / "store"


def test_a_version_changes_with_all_that_answers_depend_on(store: Path) -> None:
    before = {name: path_of(store, name) for name in ("a", "b@c", "d")}
    assert len({*before.values()}) == 3
    superposition = randes.Superposition.load(store)
    superposition.add("e", finetune(net(), 5))  # into the second group
    superposition.save(store)
    assert path_of(store, "a") == before["a"]
    assert path_of(store, "b@c") == before["b@c"]
    assert path_of(store, "d") != before["d"]
    superposition.remove("e", finetune(net(), 5))
    superposition.save(store)
    assert path_of(store, "d") == before["d"]
    superposition.remove("a", finetune(net(), 0))
    superposition.add("a", finetune(net(), 0), alpha=0.5)
    superposition.save(store)
    assert path_of(store, "a") != before["a"]
    with pytest.raises(randes.UnknownModelError, match="no model is called 'z'; there are: a, b@c, d"):
        version_of(read_manifest(store), "z")


def test_paths_are_read_with_a_version_or_without(store: Path) -> None:
    paths = Paths(store)
    for name in ("a", "b@c"):
        assert paths.current(f"randes:{name}") == paths.of(name)
        assert paths.current(f"randes:{name}@0123456789abcdef") == paths.of(name)
    for path, said in (("randes:z", "no model is called 'z'"), ("a", "lora_path must be randes:NAME"), ("", "got ''")):
        with pytest.raises((ValueError, randes.UnknownModelError), match=said):
            paths.current(path)


def test_a_request_names_a_version_that_is_or_was(store: Path) -> None:
    old = path_of(store, "a")
    check_request(str(store), old, None)
    check_request(str(store), None, None)
    superposition = randes.Superposition.load(store)
    superposition.remove("b@c", finetune(net(), 1))
    superposition.save(store)
    check_request(str(store), old, None)  # begun before
    for path in ("randes:a", "randes:a@0123456789abcdef", "/tmp"):
        with pytest.raises(ValueError, match="lora_path must be randes:"):
            check_request(str(store), path, None)
    with pytest.raises(randes.UnknownModelError):
        check_request(str(store), "randes:b@x", None)
    with pytest.raises(ValueError, match="prompt_logprobs must be left out"):
        check_request(str(store), None, 0)
    with pytest.raises(randes.StoreError, match="is not a store"):
        check_request(str(store / "no"), old, None)


def test_a_store_without_a_base_is_not_asked_for_it(tmp_path: Path) -> None:
    superposition = randes.Superposition.create(net(), randes.Config(rank=0, origin="zero"))
    superposition.add("a", finetune(net(), 0))
    superposition.save(tmp_path / "store")
    with pytest.raises(ValueError, match="this store has no base"):
        check_request(str(tmp_path / "store"), None, None)


def config(**changes: Any) -> Any:
    """What ``check`` reads of a ``VllmConfig``, all right but for the changes, by names with underscores for dots."""
    made = SimpleNamespace(
        model_config=SimpleNamespace(
            enable_sleep_mode=False, enable_prompt_embeds=False, quantization_config=None, head_dtype="x", dtype="x",
            is_multimodal_model=False, is_encoder_decoder=False, use_mla=False, runner_type="generate",
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, data_parallel_size=1, decode_context_parallel_size=1,
            prefill_context_parallel_size=1, enable_dbo=False,
        ),
        lora_config=SimpleNamespace(fully_sharded_loras=False),
        load_config=SimpleNamespace(load_format="randes"),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0.0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        speculative_config=None,
    )  # fmt: skip
    for name, value in changes.items():
        owner, _, last = name.rpartition("__")
        setattr(getattr(made, owner) if owner else made, last, value)
    return made


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_config": None}, "must be served with --enable-lora"),
        ({"load_config__load_format": "auto"}, "must be served with --load-format randes"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__data_parallel_size": 2}, "data parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"model_config__enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"model_config__enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"lora_config__fully_sharded_loras": True}, "--fully-sharded-loras"),
        ({"model_config__quantization_config": {}}, "online quantization"),
        ({"offload_config__uva": SimpleNamespace(cpu_offload_gb=1.0)}, "weights that are offloaded"),
        ({"model_config__head_dtype": "y"}, "a head in another dtype"),
        ({"model_config__is_multimodal_model": True}, "models of images or sound"),
        ({"model_config__is_encoder_decoder": True}, "an encoder"),
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__runner_type": "pooling"}, "pooling"),
    ],
)
def test_what_would_be_answered_wrongly_is_refused(change: dict[str, Any], said: str) -> None:
    check(config())
    with pytest.raises(NotServedError, match=said):
        check(config(**change))


def test_names_must_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    with pytest.raises(NotServedError, match="any name as the base"):
        check(config())


# ------------------------------------------------------------------ the command


def test_the_command_names_every_fine_tune_with_its_version(store: Path) -> None:
    made = command.vllm_command(store, "::1", 8123, 2, ["--dtype", "bfloat16"])
    assert made[1:7] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(store), "--load-format", "randes"]
    assert made[made.index("--max-loras") + 1] == "5"
    assert made[-2:] == ["--dtype", "bfloat16"]
    modules = made[made.index("--lora-modules") + 1 : -2]
    assert [eval(one) for one in modules] == [
        {"name": name, "path": path_of(store, name)} for name in ("a", "b@c", "d")
    ]


def test_the_command_is_printed_and_run(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    monkeypatch.setattr(os, "execve", lambda *arguments: ran.append(arguments))
    command.serve(store, port=8124, engine=command.Engine.vllm)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 " in capsys.readouterr().out
    ((program, arguments, environment),) = ran
    assert program == arguments[0]
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_without_vllm_one_sentence_says_what_to_install(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from randes.cli import app

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    ran = CliRunner().invoke(app, ["serve", str(store), "--engine", "vllm"])
    assert ran.exit_code == 2
    assert "serving needs vLLM: pip install 'randes[vllm]'" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_what_cannot_be_served_is_said_first(store: Path, tmp_path: Path) -> None:
    with pytest.raises(randes.StoreError, match="is not a store"):
        command.vllm_command(tmp_path, "::1", 1, 0, ())
    randes.Superposition.load(store).pack(2).save(tmp_path / "packed")
    with pytest.raises(ValueError, match="--room must be 0 for a packed store"):
        command.vllm_command(tmp_path / "packed", "::1", 1, 1, ())
    assert command.vllm_command(tmp_path / "packed", "::1", 1, 0, ())
    randes.Superposition.create(net(), randes.Config(rank=0)).save(tmp_path / "empty")
    with pytest.raises(ValueError, match="must have a fine-tune to be served: randes add"):
        command.vllm_command(tmp_path / "empty", "::1", 1, 0, ())


def test_who_serves_a_store_does_not_depend_on_the_version_of_transformers(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's build for CPUs brings one that is older than what stores are opened with."""
    monkeypatch.setattr("transformers.__version__", "5.19.0")
    assert not command.generates(store)  # no configuration
    for name, own in (("LlamaForCausalLM", True), ("ViTForImageClassification", False), ("Nobody", False)):
        (tmp_path / "config.json").write_text(f'{{"architectures": ["{name}"]}}')
        assert command.generates(tmp_path) == own
