"""A model cut over two processes, with gloo: answers are those of one process, and wrong without origins."""

import json
import os
import subprocess
import sys

import parallel_rank
import pytest

import randes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What every check found in each of two processes, which are started once for all."""
    folder = tmp_path_factory.mktemp("parallel")
    base = parallel_rank.llama()
    tuned = {f"m{number}": parallel_rank.finetune(base, number, 0.1) for number in range(2)}
    randes.compress(base, tuned, randes.Config(min_width=16, rank=0)).save(folder / "store")
    command = [sys.executable, parallel_rank.__file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
                   "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), errors
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("check", [check.__name__ for check in parallel_rank.CHECKS])
def test_two_processes_answer_as_one(check: str, found: list[dict[str, str]]) -> None:
    for rank in found:
        said = rank.get(check, "an earlier check failed")
        assert said == "", said
