"""Stores made by a Ray cluster that starts for real, on two cores of this machine: ``python tests/remote ray``."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from models import content
from safetensors.torch import save_file
from typer.testing import CliRunner

import randes
from randes import cluster
from randes.cli import app
from randes.errors import CheckpointError, RandesError

LAYERS, MODELS = 12, 3
SIZE = (1 << 20) + 4096
"""A matrix and its bias."""


@pytest.fixture(scope="module")
def machines() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A base of twelve matrices, 12 MB, and three fine-tunes of it."""
    folder, chance = tmp_path_factory.mktemp("checkpoints"), torch.Generator().manual_seed(0)
    base = {f"layers.{layer}.weight": torch.randn(512, 512, generator=chance) for layer in range(LAYERS)}
    base |= {f"layers.{layer}.bias": torch.randn(512, generator=chance) for layer in range(LAYERS)}
    save_file(base, folder / "base.safetensors")
    for number in range(MODELS):
        noise = {name: value + 0.02 * torch.randn(value.shape, generator=chance) for name, value in base.items()}
        save_file(noise, folder / f"m{number}.safetensors")
    return str(folder / "base.safetensors"), {f"m{n}": str(folder / f"m{n}.safetensors") for n in range(MODELS)}


@pytest.fixture(scope="module")
def expected(checkpoints: tuple[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("expected") / "store"
    randes.compress(*checkpoints).save(folder, shard_size=SIZE)
    return content(folder)


@pytest.mark.usefixtures("machines")
def test_a_cluster_makes_the_bytes_of_one_process(
    checkpoints: tuple[str, dict[str, str]], expected: dict[str, bytes], tmp_path: Path
) -> None:
    told: list[int] = []
    cluster.compress(
        *checkpoints, out=tmp_path / "store", shard_size=SIZE, run=cluster.on_ray(),
        progress=lambda stage, nbytes: told.append,
    )  # fmt: skip
    assert content(tmp_path / "store") == expected
    assert len(told) == LAYERS


@pytest.mark.usefixtures("machines")
def test_parts_of_workers_that_are_killed_are_made_again(
    checkpoints: tuple[str, dict[str, str]], expected: dict[str, bytes], tmp_path: Path
) -> None:
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        """The process that writes a file of the store, twice, in the middle of that."""
        while len(killed) < 2 and not over.is_set():
            for process in Path("/proc").iterdir():
                if process.name.isdigit() and int(process.name) not in (os.getpid(), *killed):
                    try:
                        handles = [os.readlink(one) for one in (process / "fd").iterdir()]
                    except OSError:
                        continue
                    if any(str(tmp_path / "store") in one and one.endswith(".tmp") for one in handles):
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.append(int(process.name))
                        break
            time.sleep(0.001)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        cluster.compress(*checkpoints, out=tmp_path / "store", shard_size=SIZE, run=cluster.on_ray())
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2
    assert content(tmp_path / "store") == expected


@pytest.mark.usefixtures("machines")
def test_what_is_wrong_with_a_checkpoint_is_said_as_without_a_cluster(
    checkpoints: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    base, models = checkpoints
    broken = {f"layers.{layer}.{kind}": torch.zeros(size) for layer in range(LAYERS)
              for kind, size in (("weight", (512, 512)), ("bias", (512,)))}  # fmt: skip
    broken["layers.3.weight"][5, 5] = float("nan")
    save_file(broken, tmp_path / "broken.safetensors")
    models = {**models, "broken": str(tmp_path / "broken.safetensors")}
    with pytest.raises(CheckpointError, match=r"layers.3.weight must be finite"):
        cluster.compress(base, models, out=tmp_path / "store", shard_size=SIZE, run=cluster.on_ray())
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.usefixtures("machines")
def test_a_part_whose_worker_dies_each_time_is_an_error() -> None:
    def dying(job: object, number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RandesError, match="a part could not be made, which was tried 2 times"):
        list(cluster.on_ray(retries=1)(dying, None, range(1)))  # type: ignore[arg-type]


def test_the_command_line_starts_a_cluster_of_its_own(
    checkpoints: tuple[str, dict[str, str]], expected: dict[str, bytes], tmp_path: Path
) -> None:
    ray.shutdown()
    base, models = checkpoints
    given = [part for name, path in models.items() for part in ("--model", f"{name}={path}")]
    command = ["compress", "--base", base, *given, "--out", str(tmp_path / "store"), "--shard-size", str(SIZE)]
    found = CliRunner().invoke(app, [*command, "--ray", "local"])
    assert found.exit_code == 0, found.output
    assert "3 models in" in found.output
    assert content(tmp_path / "store") == expected
    assert not ray.is_initialized()
    nowhere = CliRunner().invoke(app, [*command[:-3], str(tmp_path / "other"), "--ray", "auto"])
    assert nowhere.exit_code == 2
    assert "there is no Ray cluster at 'auto'" in nowhere.output.replace("\n", " ")
