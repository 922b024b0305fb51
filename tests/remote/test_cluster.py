"""Stores that are made part by part: the bytes of those that are made at once, whoever makes the parts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import GPT2
from models import content, finetune, net
from typer.testing import CliRunner

import randes
from randes import cluster
from randes.checkpoints.lazy_tensors import size as size_of
from randes.checkpoints.lora import ADAPTER_CONFIG, WEIGHTS
from randes.checkpoints.safetensors import write_file
from randes.cli import app
from randes.cluster.parts import Job, Part, made
from randes.config import LARGE_TABLE
from randes.errors import CheckpointError, RandesError, StoreError
from randes.superposition.store.contents import files_of

SIZE = 8000
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "groups of two": {"group_size": 2},
    "centred": {"centre": True, "rank": 4},
    "shuffled": {"shuffle_layers": -1, "rank": 0, "gains": "shared"},
    "shifted": {"shuffle_layers": 1, "rank": 0},
    "averages": {"others": "average"},
    "from zero": {"origin": "zero", "gains": "shared", "rank": 0},
    "vectors": {"vectors": True, "min_width": 1, "rank": 0},
}


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[str, dict[str, str]]:
    base = net()
    write_file(tmp_path / "base.safetensors", base.state_dict())
    for number in range(3):
        write_file(tmp_path / f"m{number}.safetensors", finetune(base, number).state_dict())
    return str(tmp_path / "base.safetensors"), {f"m{n}": str(tmp_path / f"m{n}.safetensors") for n in range(3)}


def backwards(function: Callable[[Job, int], Part], job: Job, numbers: range) -> Iterator[Part]:
    """Makes the last part first, and each of them twice, as a cluster does that has lost one."""
    for number in reversed(numbers):
        part = function(job, number)
        assert function(job, number).records == part.records
        yield part


def at_once(base: str, models: dict[str, str], out: Path, size: int = SIZE, **config: Any) -> dict[str, bytes]:
    randes.compress(base, models, randes.Config(**config)).save(out, shard_size=size)
    return content(out)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_store_made_by_parts_is_the_store_made_at_once(
    kind: str, checkpoints: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    expected = at_once(*checkpoints, tmp_path / "at once", **CONFIGS[kind])
    cluster.compress(
        *checkpoints, randes.Config(**CONFIGS[kind]), out=tmp_path / "by parts", shard_size=SIZE, run=backwards
    )
    assert content(tmp_path / "by parts") == expected
    assert len([name for name in expected if name.startswith("base-")]) > 2
    assert randes.Superposition.load(tmp_path / "by parts").names == ["m0", "m1", "m2"]


@pytest.mark.parametrize("size", [1, 100_000_000])
def test_parts_of_one_tensor_and_one_part_of_all_are_the_same(
    size: int, checkpoints: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    cluster.compress(*checkpoints, out=tmp_path / "by parts", shard_size=size)
    assert content(tmp_path / "by parts") == at_once(*checkpoints, tmp_path / "at once", size)


def test_folders_adapters_added_rows_and_heads_are_taken_as_at_once(tmp_path: Path) -> None:
    """Whatever a fine-tune is that a part has some tensors of."""
    base = net()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    write_file(tmp_path / "base.safetensors", state)
    longer = {**finetune(base, 0).state_dict()}
    weight = longer["layers.0.up.weight"]
    longer["layers.0.up.weight"] = torch.cat([weight, torch.ones(3, weight.shape[1])])
    write_file(tmp_path / "longer.safetensors", longer)
    other = {**finetune(base, 1).state_dict(), "head.weight": torch.ones(7, 32), "head.bias": torch.ones(7)}
    write_file(tmp_path / "other.safetensors", other)
    (tmp_path / "adapter").mkdir()
    pair = {"lora_A": torch.full((2, 32), 0.1), "lora_B": torch.full((48, 2), 0.1)}
    write_file(tmp_path / "adapter" / WEIGHTS, {f"base_model.model.layers.1.up.{k}.weight": v for k, v in pair.items()})
    (tmp_path / "adapter" / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    models = {name: str(tmp_path / f"{name}.safetensors") for name in ("longer", "other")}
    models["adapter"] = str(tmp_path / "adapter")
    expected = at_once(str(tmp_path / "base.safetensors"), models, tmp_path / "at once", min_width=1)
    cluster.compress(
        tmp_path / "base.safetensors", models, min_width=1, out=tmp_path / "by parts", shard_size=SIZE, run=backwards
    )
    assert content(tmp_path / "by parts") == expected


def test_a_transformers_folder_with_tied_and_transposed_weights(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    for name, model in {"base": base, "m0": finetune(base, 0), "m1": finetune(base, 1)}.items():
        model.save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("m0", "m1")}
    expected = at_once(str(tmp_path / "base"), models, tmp_path / "at once", 20_000)
    cluster.compress(tmp_path / "base", models, out=tmp_path / "by parts", shard_size=20_000, run=backwards)
    assert content(tmp_path / "by parts") == expected
    assert randes.from_pretrained(tmp_path / "by parts").names == ["m0", "m1"]


def test_stores_elsewhere_are_made_by_parts(checkpoints: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    cluster.compress(*checkpoints, out="memory://cluster/store", shard_size=SIZE)
    found = {path.rsplit("/", 1)[1]: system.cat_file(path) for path in system.ls("/cluster/store", detail=False)}
    system.rm("/cluster", recursive=True)
    assert found == at_once(*checkpoints, tmp_path / "at once")


def test_what_failed_can_be_done_again(checkpoints: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    def failing(function: Callable[[Job, int], Part], job: Job, numbers: range) -> Iterator[Part]:
        yield function(job, 1)
        raise OSError("a machine is gone")

    def forgetful(function: Callable[[Job, int], Part], job: Job, numbers: range) -> Iterator[Part]:
        yield from (function(job, number) for number in numbers[1:])

    out = tmp_path / "store"
    with pytest.raises(OSError, match="a machine is gone"):
        cluster.compress(*checkpoints, out=out, shard_size=SIZE, run=failing)
    with pytest.raises(StoreError, match="has no manifest"):
        randes.Superposition.load(out)
    (out / f".group-0-{'0' * 32}.safetensors.12ab.tmp").write_bytes(b"half a file")
    with pytest.raises(RandesError, match=r"all \d+ parts must be made, got none of number 0"):
        cluster.compress(*checkpoints, out=out, shard_size=SIZE, run=forgetful)
    cluster.compress(*checkpoints, out=out, shard_size=SIZE)
    assert content(out) == at_once(*checkpoints, tmp_path / "at once")


def test_a_file_that_changed_since_its_part_was_made_is_noticed(
    checkpoints: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    def damaging(function: Callable[[Job, int], Part], job: Job, numbers: range) -> Iterator[Part]:
        for number in numbers:
            part = function(job, number)
            if number == 1:
                (tmp_path / "store" / next(iter(part.files))).write_bytes(b"something else")
            yield part

    with pytest.raises(StoreError, match=r"is not whole: .* is not a whole safetensors file"):
        cluster.compress(*checkpoints, out=tmp_path / "store", shard_size=SIZE, run=damaging)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_what_cannot_be_shared_out_is_refused_before_anything_is_written(
    checkpoints: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    base, models = checkpoints
    out = tmp_path / "store"
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"base": net()}, ValueError, "base must be a path or an address, which others can read, got Net"),
        ({"models": {"m": net()}}, ValueError, r"models\['m'\] must be a path or an address"),
        ({"models": {}}, ValueError, "models must hold at least one fine-tune"),
        ({"shard_size": 0}, ValueError, "shard_size must be above 0"),
        ({"shard_size": "much"}, ValueError, "shard_size must be a number of bytes"),
        ({"include": lambda *_: True}, ValueError, "config.include must be patterns"),
        ({"alpha": float("nan")}, ValueError, "alpha must be a finite number"),
        ({"groups": 3}, TypeError, "has none called 'groups'"),
        ({"base": str(tmp_path / "nothing.safetensors")}, CheckpointError, "does not exist"),
    ]
    for wrong, kind, said in refused:
        with pytest.raises(kind, match=said):
            cluster.compress(**{"base": base, "models": models, "out": out, "shard_size": SIZE, **wrong})
        assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="must be empty or a store"):
        cluster.compress(base, models, out=out)


def test_a_part_is_made_of_its_own_tensors_alone(
    checkpoints: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from randes.checkpoints.safetensors import File

    base, models = checkpoints
    job = Job(base, models, randes.Config().resolved(together=True), 1.0, str(tmp_path / "out"), SIZE)
    (tmp_path / "out").mkdir()
    read: set[str] = set()
    rows = File.rows
    monkeypatch.setattr(File, "rows", lambda self, name, *run: read.add(name) or rows(self, name, *run))
    part = made(job, 1)
    stored = {name.partition("@")[0] for file in part.files.values() for name in file.digests}
    assert read == stored
    assert stored < net().state_dict().keys()


def test_without_ray_the_error_says_what_to_install(
    checkpoints: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'randes\[ray\]'"):
        cluster.on_ray("local")
    base, models = checkpoints
    command = ["compress", "--base", base, "--model", f"m0={models['m0']}", "--out", str(tmp_path / "store")]
    found = CliRunner().invoke(app, [*command, "--ray", "local"])
    assert found.exit_code == 2
    assert "pip install 'randes[ray]'" in found.output.replace("\n", " ")
    for more in (["--budget", "2x"], ["--shard-size", "0"]):
        assert CliRunner().invoke(app, [*command, "--ray", "local", *more]).exit_code == 2
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("tables", [1, 2])
def test_each_models_own_delta_of_a_table_is_written_before_the_next_ones_is_made(
    tables: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is the only one of its part: many of them would fill the memory."""
    base = net()
    for number in range(tables):
        setattr(base, f"embed_{number}", torch.nn.Embedding(LARGE_TABLE // 32 + 1, 32))
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("base", "m0", "m1", "m2")}
    for number, path in enumerate(paths.values()):
        write_file(Path(path), (finetune(base, number) if number else base).state_dict())
    held: list[int] = []

    def seen(sup: randes.Superposition, size: int) -> Any:
        own = [deltas for group, deltas in sup.deltas.items() if isinstance(group, str)]
        held.extend(size_of(getattr(deltas, "held", deltas)) for deltas in own)
        return files_of(sup, size)

    monkeypatch.setattr("randes.cluster.parts.files_of", seen)
    models = {name: path for name, path in paths.items() if name != "base"}
    for size, out in ((SIZE, "small"), (10_000_000, "one part")):
        held.clear()
        cluster.compress(paths["base"], models, out=tmp_path / out, shard_size=size, run=backwards)
        alone = tables == 1 or size == SIZE
        assert len(held) == 2 * 3 * (tables if size == SIZE else 1)
        assert (sum(held) == 0) is alone
        assert content(tmp_path / out) == at_once(paths["base"], models, tmp_path / f"{out} at once", size)
    assert [name for name in content(tmp_path / "small") if name.startswith("unshared-")]
