"""FusionBench's RanDeS beside ours, and ours inside FusionBench.

FusionBench is installed into an environment of its own, with the few packages that its RanDeS imports; torch and the
rest come from this one. ``original.py`` runs there.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from fusionbench_cases import ADAPTERS, BASE, CASES, COMMON, FACTOR, LORA, MODELS, NAMES, Case, draws, targets
from safetensors.torch import load_file

import randes
from randes.checkpoints.sources import write_file
from randes.inspect import analysis

PACKAGES = (
    "fusion-bench==0.2.33", "hydra-core==1.3.2", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3", "lightning",
    "lightning-utilities", "torchmetrics", "bidict",
)  # fmt: skip
TOLERANCE = {"random_dense_matrix": 1e-3, "random_diagonal_matrix": 1e-4}
"""Of retrieved weights, relative to the largest of a tensor. Inverses lose digits; a dense matrix's most."""


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has FusionBench, which sees this one's packages behind its own."""
    folder = tmp_path_factory.mktemp("fusionbench")
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(own) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q", *PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"FusionBench could not be installed from the package index:\n{done.stderr[-2000:]}")
    return python


@pytest.fixture(scope="session")
def results(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the original retrieved in every case."""
    folder = tmp_path_factory.mktemp("original")
    for kind, models in {"full": MODELS, "lora": ADAPTERS}.items():
        for name, state in {"_pretrained_": BASE, **models}.items():
            write_file(folder / f"{kind}-{name}.safetensors", state)
    told = []
    for case in CASES:
        matrices, orders = draws(case)
        if matrices:
            write_file(folder / f"{case.name}-matrices.safetensors", {str(n): m for n, m in enumerate(matrices)})
        kind, models = ("lora", ADAPTERS) if case.algorithm == LORA else ("full", MODELS)
        order = {name: list(state) for name, state in {"_pretrained_": BASE, **models}.items()}
        told.append({"name": case.name, "algorithm": case.algorithm, "keys": case.all_keys, "models": kind,
                     "names": list(order), "order": order, "matrices": len(matrices), "orders": orders,
                     "common": COMMON})  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(told))
    run_in(environment, Path(__file__).with_name("original.py"), folder)
    return folder


def run_in(python: Path, *arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


# -------------------------------------------------------------------- the comparison


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_original_retrieves_what_we_do(case: Case, results: Path) -> None:
    superposition, keys = case.superposed, case.all_keys
    metadata = json.loads((results / f"{case.name}-metadata.json").read_text())
    named = [FACTOR.sub(r"\1.weight.lora_\2", name) for name in metadata["target_layers"]]
    assert named == targets(case)
    for name in NAMES:
        theirs, ours = load_file(results / f"{case.name}-{name}-retrieved.safetensors"), case.retrieved(name)
        assert theirs.keys() == ours.keys()
        for tensor, expected in theirs.items():
            found = ours[tensor]
            absorbed = tensor not in superposition.superposed and keys["absorber"] != "None"
            if absorbed and keys["ms_mode"] == "average":
                found = found / len(NAMES)  # the original divides what it absorbed too
            budget = TOLERANCE.get(keys["mode"], 3e-6) * float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=budget, msg=lambda m, t=tensor: f"{t}: {m}")


@pytest.mark.parametrize("case", [case for case in CASES if case.algorithm != LORA], ids=lambda case: case.name)
def test_the_original_counts_what_we_say_it_counts(case: Case, results: Path) -> None:
    metadata = json.loads((results / f"{case.name}-metadata.json").read_text())
    found = analysis.fusionbench_storage(case.superposed)
    for key, value in found.to_dict().items():
        assert value == pytest.approx(metadata[key], rel=0 if isinstance(value, int) else 1e-6), key


def test_the_originals_analysis_says_what_ours_does(results: Path) -> None:
    theirs = json.loads((results / "analysis.json").read_text())
    tensors = [model["encoder.layers.0.mlp.fc1.weight"] for model in MODELS.values()]
    assert analysis.cosine_similarity(*tensors[:2]) == pytest.approx(theirs["cosine"], abs=1e-6)
    torch.testing.assert_close(analysis.pairwise_cosines(tensors).float(), torch.tensor(theirs["pairwise"]))
    for chunk, values in zip(analysis.svd_partition(tensors[0]), theirs["chunks"], strict=True):
        torch.testing.assert_close(chunk.s, torch.tensor(values))
    for own, their in zip(analysis.subspace_similarity(*tensors[:2]), theirs["subspaces"], strict=True):
        assert own.cosine == pytest.approx(their["cosine_similarity"], abs=1e-5)
        assert own.distance / tensors[0].numel() == pytest.approx(their["frobenius_similarity"], rel=1e-5)
    compared = analysis.compare_models(MODELS["m0"], MODELS["m1"]).fusionbench()
    assert compared.keys() == theirs["models"].keys()
    for key, value in compared.items():
        assert value == pytest.approx(theirs["models"][key], rel=1e-5)


# -------------------------------------------------------------------- what docs/paper.md says of the original


def test_the_original_is_as_the_page_for_its_readers_says(results: Path) -> None:
    facts = json.loads((results / "facts.json").read_text())
    seeds, first = facts["seeds"]
    assert seeds == [first, first + 1, first + 2]  # by place in the pool, from Python's salted hash
    assert "cannot be used to seed" in facts["rotation"]
    assert facts["manual absorption"] == "ValueError: Unsupported mode: manual_absorption"
    assert "expected Parameter, got Tensor" in facts["parameters"]
    assert "missing 2 required positional arguments: 'absorber' and 'ms_mode'" in facts["yaml"]
    assert "Shape mismatch for key 'mlp.0.bias'" in facts["vectors"]
    assert "extra keys: ['attn.2.weight']" in facts["two depths"]
    assert facts["every second"]["target_layers"] == ["attn.1.weight", "mlp.1.weight"]
    after = torch.tensor(facts["debug 2"]["pairwise_cosine_similarity_matrix_after_a"])
    assert after.min() > 0.99  # of norms that nothing turned


# -------------------------------------------------------------------- inside FusionBench

POOL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(32, 32), nn.Linear(32, 64)

class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers, self.norm = nn.ModuleList(Block() for _ in range(3)), nn.LayerNorm(32)
"""
MODEL_POOL = """
_target_: fusion_bench.modelpool.BaseModelPool
models:
  _pretrained_: {_target_: pool.Net, seed: 0}
  a: {_target_: pool.Net, seed: 1}
  b: {_target_: pool.Net, seed: 2}
"""


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("randes/superposition", ["method.store=store", "method.compare=true", "+method.seed=3", "method.alpha=0.5"]),
        ("randes/superposed_task_arithmetic", ["+method._target_=randes.fusionbench.method.SuperposedTaskArithmetic"]),
        ("randes/superposed_model_soup",
         ["method._target_=randes.fusionbench.method.SuperposedModelSoup", "method.mode=random_rotation_matrix"]),
    ],
)  # fmt: skip
def test_our_method_runs_from_its_command_line(
    method: str, options: list[str], environment: Path, tmp_path: Path
) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    (tmp_path / "conf" / "modelpool").mkdir(parents=True)
    (tmp_path / "conf" / "modelpool" / "tiny.yaml").write_text(MODEL_POOL)
    root = Path(randes.__file__).parent.parent.parent
    paths = os.pathsep.join(map(str, (tmp_path, root, root / "python_api")))
    run_in(
        environment, "-m", "fusion_bench.scripts.cli", f"method={method}", "modelpool=tiny", "taskpool=dummy",
        f"hydra.searchpath=[pkg://randes.fusionbench.config,file://{tmp_path / 'conf'}]", "fabric.loggers=null",
        "print_config=false", "print_function_call=false", f"report_save_path={tmp_path / 'out' / 'report.json'}",
        *options,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    report = json.loads(next(tmp_path.rglob("report.json")).read_text())
    assert list(report["models"]) == ["a", "b"]
    metadata = report["metadata"]
    assert "layers.0.attn.weight" in metadata["target_layers"]
    assert metadata["total_gb_retrieved"] > metadata["total_gb_original"] > 0
    if "method.store=store" in options:
        superposition = randes.Superposition.load(tmp_path / "store")
        assert (superposition.names, superposition.config.seed) == (["a", "b"], 3)
        assert superposition.members["a"].alpha == 0.5
        likeness = metadata["model_retrieval_similarity"]["a"]
        assert likeness["layerwise_cosine_similarity"]["layers.0.attn.bias"] == pytest.approx(1)
        assert 0 < likeness["total_cosine_similarity"] < 1


LOOKED_THROUGH = """
import torch
from fusion_bench import BaseModelPool
from randes.fusionbench.method import RandesAlgorithm

torch.manual_seed(0)
pool = BaseModelPool({name: torch.nn.Linear(32, 32) for name in ("_pretrained_", "a", "b")})
models = RandesAlgorithm().run(pool)["models"]
for found in (dict(models), {**models}, models.copy(), models | {}, dict(models.items())):
    assert [type(model) for model in found.values()] == [torch.nn.Linear] * 2, found
assert isinstance(models.pop("a"), torch.nn.Linear) and list(models) == ["b"] and models.pop("a", 1) == 1
"""


def test_retrieved_models_are_a_dict_however_they_are_taken_out(environment: Path, tmp_path: Path) -> None:
    root = Path(randes.__file__).parent.parent.parent
    paths = os.pathsep.join(map(str, (root, root / "python_api")))
    run_in(environment, "-c", LOOKED_THROUGH, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
