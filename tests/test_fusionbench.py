"""FusionBench's RanDeS beside ours: its configuration, its results with our matrices, and its command line.

FusionBench is installed into an environment of its own, with the few packages that its RanDeS imports; torch and the
rest come from this one. ``original.py`` runs there.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import randes
from randes import analysis, fusionbench
from randes.checkpoint import write_file
from randes.cli import app
from randes.errors import RandesError

PACKAGES = (
    "fusion-bench==0.2.33", "hydra-core==1.3.2", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3", "lightning",
    "lightning-utilities", "torchmetrics", "bidict",
)  # fmt: skip
DEPTH, NAMES = 3, ("m0", "m1", "m2")
SOUP, DELTAS, LORA = fusionbench.ALGORITHMS
COMMON = {
    "mode": "random_binary_diagonal_matrix", "target_layer": ["mlp_w", "attn_w"], "random_seed": 42,
    "different_across_layers": True, "joint_matrix_mode": "flatten_hstack", "rank": 1, "random_components": False,
    "shift_layers": 0, "absorber": "None", "debug": 0, "ms_mode": "original", "verbose": 0, "dropout_rate": 1,
}  # fmt: skip
TOLERANCE = {"random_dense_matrix": 1e-3, "random_diagonal_matrix": 1e-4}
"""Of retrieved weights, relative to the largest of a tensor. Inverses lose digits; a dense matrix's most."""

FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

State = dict[str, Tensor]


# -------------------------------------------------------------------- the models


def base_state() -> State:
    """Names as CLIP's, three layers."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (10, 32)}
    for layer in range(DEPTH):
        at = f"encoder.layers.{layer}"
        for name in ("q_proj", "out_proj"):
            shapes |= {f"{at}.self_attn.{name}.weight": (32, 32), f"{at}.self_attn.{name}.bias": (32,)}
        shapes |= {f"{at}.mlp.fc1.weight": (48, 32), f"{at}.mlp.fc1.bias": (48,), f"{at}.mlp.fc2.weight": (32, 48)}
        shapes[f"{at}.layer_norm1.weight"] = (32,)
    shapes["classifier.weight"] = (10, 32)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def finetuned(base: State, number: int) -> State:
    generator = torch.Generator().manual_seed(1 + number)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()}


def adapter(base: State, number: int) -> State:
    """LoRA of rank 4 on every matrix of the layers, under PEFT's names."""
    generator, found = torch.Generator().manual_seed(10 + number), {}
    for name, value in base.items():
        if name.startswith("encoder") and value.dim() == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            found[f"{module}.lora_A.weight"] = torch.randn(4, value.shape[1], generator=generator)
            found[f"{module}.lora_B.weight"] = torch.randn(value.shape[0], 4, generator=generator)
    return found


def write_adapter(folder: Path, state: State) -> Path:
    """As PEFT writes it, with a scaling of 1: the original knows of none."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    write_file(folder / "adapter_model.safetensors", state)
    return folder


BASE = base_state()
MODELS = {name: finetuned(BASE, number) for number, name in enumerate(NAMES)}
ADAPTERS = {name: adapter(BASE, number) for number, name in enumerate(NAMES)}


# -------------------------------------------------------------------- the cases


@dataclass(eq=False)
class Case:
    """One run of the original and ours beside it."""

    algorithm: str
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def all_keys(self) -> dict[str, Any]:
        scale = {} if self.algorithm == SOUP else {"scaling_factor": 0.5}
        return COMMON | scale | self.keys

    @property
    def name(self) -> str:
        told = "-".join(str(value) for value in self.keys.values())
        return f"{self.algorithm}-{told}".replace("[", "").replace("]", "").replace("'", "").replace(", ", "+")

    @cached_property
    def superposed(self) -> randes.Superposition:
        """Ours, from the original's own keys."""
        found = fusionbench.options({"_target_": f"a.b.{self.algorithm}", **self.all_keys}, len(NAMES))
        if found.lora:
            with TemporaryDirectory() as folder:
                folders = {name: write_adapter(Path(folder) / name, state) for name, state in ADAPTERS.items()}
                return randes.superpose_adapters(BASE, folders, found.config)
        return randes.compress(BASE, MODELS, found.config, alpha=found.alpha)

    def retrieved(self, name: str) -> State:
        """One model, as the original's class gives it back."""
        if self.algorithm == LORA:
            return dict(randes.merge_adapter(self.superposed, name, BASE, scaling=self.all_keys["scaling_factor"]))
        return self.superposed.retrieve(name)


def of_every_mode(algorithm: str, **keys: Any) -> list[Case]:
    return [Case(algorithm, {"mode": mode, **keys}) for mode in fusionbench.MODES]


CASES = [
    *of_every_mode(DELTAS),
    *of_every_mode(DELTAS, shift_layers=1),
    *of_every_mode(DELTAS, shift_layers=-1),
    *of_every_mode(DELTAS, different_across_layers=False),
    *of_every_mode(LORA),
    *of_every_mode(LORA, shift_layers=1),
    *of_every_mode(SOUP),
    *of_every_mode(SOUP, shift_layers=2, ms_mode="average"),
    *(Case(SOUP, {"target_layer": target}) for target in (["mlp"], ["attn"], ["all"], ["mlp_w", "attn"])),
    Case(SOUP, {"target_layer": ["all"], "mode": "random_diagonal_matrix"}),
    Case(DELTAS, {"target_layer": ["mlp"], "mode": "random_rotation_matrix"}),
    *(Case(DELTAS, {"dropout_rate": rate}) for rate in (2, 3)),
    Case(DELTAS, {"scaling_factor": 1.0, "shift_layers": 1, "dropout_rate": 2}),
    *(
        Case(SOUP, {"absorber": absorber, "ms_mode": mode})
        for absorber in fusionbench.ABSORBERS
        for mode in fusionbench.MS_MODES
    ),
]
IDS = [case.name for case in CASES]


def targets(case: Case) -> list[str]:
    """What is superposed, under our names, in the original's order."""
    factors = [FACTOR.sub(r"\1.weight.lora_\2", name) for name in ADAPTERS["m0"]]
    order = factors if case.algorithm == LORA else list(BASE)
    return [name for name in order if name in case.superposed.superposed]


def draws(case: Case) -> tuple[list[Tensor], list[list[int]]]:
    """Our matrices and orders of layers in the order in which the original draws its own."""
    keys, superposition = case.all_keys, case.superposed
    matrices, orders = [], []
    if keys["shift_layers"] == -1:
        for model in NAMES:
            for family in dict.fromkeys(tuple(superposition.family(target)) for target in targets(case)):
                places = [superposition.place(model, tensor) for tensor in family]
                orders.append([next(int(part) for part in place.split(".") if part.isdigit()) for place in places])
    if keys["mode"] != "identity_matrix":
        for place in targets(case):
            for model in NAMES:
                lying = next(t for t in superposition.family(place) if superposition.place(model, t) == place)
                matrices.append(fusionbench.matrix(superposition, model, lying))
    return matrices, orders


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


@pytest.mark.parametrize("case", CASES, ids=IDS)
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
    assert found.total_param_count_original == metadata["total_param_count_original"]
    assert found.nonzero_param_count_context == metadata["nonzero_param_count_context"]
    assert found.nonzero_parameter_count == metadata["nonzero_parameter_count"]
    assert found.total_gb_original == pytest.approx(metadata["total_gb_original"])
    assert found.total_gb_retrieved == pytest.approx(metadata["total_gb_retrieved"])


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


# -------------------------------------------------------------------- its configuration


def options(**keys: Any) -> fusionbench.Options:
    return fusionbench.options({"name": "superposed_task_arithmetic", **COMMON, "scaling_factor": 0.3, **keys}, 4)


def test_each_key_has_its_meaning() -> None:
    config, alpha, lora, notes = options(shift_layers=-1, dropout_rate=2, different_across_layers=False)
    expected = randes.Config(
        signs="columns", shuffle_layers=-1, group_size=4, seed=42, others="sum", min_width=1, gains="shared", every=2,
        include=("*mlp*", "*Dense*", "*attn*", "*Attention*"), exclude=("*bias*",), per_layer=False, vectors=True,
    )  # fmt: skip
    assert (config, alpha, lora) == (expected, 0.3, False)
    assert notes == (
        "joint_matrix_mode, rank, random_components: the original reads none of it, and nothing is done with it here",
        "absorber, ms_mode: of model soups alone, as in the original",
    )
    soup = {"_target_": "fusion_bench.method.randes.SuperposedModelSoupAlgorithm", **COMMON}
    assert fusionbench.options({"method": soup, "modelpool": {}}, 4).config.origin == "zero"
    for ms_mode, factor in (("average", 0.25), ("original", 1.0)):
        assert fusionbench.options({**soup, "ms_mode": ms_mode}, 4).alpha == factor
    for absorber, others in (("average", "average"), ("pretrained", "base"), ("None", "sum"), (None, "sum")):
        assert fusionbench.options({**soup, "absorber": absorber}, 4).config.others == others
    assert fusionbench.options({"name": "superposed_task_arithmetic_lora", **COMMON}, 4).lora


def test_targets_are_the_originals() -> None:
    names = [
        "a.mlp.w.weight",
        "a.mlp.w.bias",
        "DenseReluDense.wi",
        "a.attn.q.weight",
        "a.attn.q.bias",
        "SelfAttention.k",
        "n",
    ]
    expected = {
        ("mlp_w",): {0, 2}, ("attn_w",): {3, 5}, ("mlp",): {0, 1, 2}, ("attn",): {3, 4, 5}, ("all",): set(range(7)),
        ("mlp_w", "attn_w"): {0, 2, 3, 5}, ("mlp_w", "attn"): {0, 2, 3, 4, 5}, ("mlp", "attn_w"): {0, 1, 2, 3, 5},
    }  # fmt: skip
    for targets, chosen in expected.items():
        config = options(target_layer=list(targets)).config
        assert {n for n, name in enumerate(names) if config.selects(name, (64, 64))} == chosen
        assert {n for n, name in enumerate(names) if config.selects(name, (64,))} == chosen
    assert options(target_layer="all").config == options(target_layer=["all"]).config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mode": "manual_absorption"}, "mode must be one of random_binary_diagonal_matrix, .*got 'manual"),
        ({"name": "dummy"}, "name or _target_ must be one of superposed_model_soup, .*, got 'dummy'"),
        ({"temperature": 1}, "must have FusionBench's keys only, got temperature"),
        ({"target_layer": ["mlps"]}, "target_layer must be one of mlp_w, attn_w, mlp, attn, all, got 'mlps'"),
        ({"target_layer": []}, "target_layer must be a list"),
        ({"absorber": "mean"}, "absorber must be one of average, pretrained, None, got 'mean'"),
        ({"ms_mode": "sum"}, "ms_mode must be one of average, original, got 'sum'"),
        ({"scaling_factor": "x"}, "scaling_factor must be a number, got 'x'"),
        ({"shift_layers": -2}, "shuffle_layers must be an integer of at least -1, got -2"),
    ],
)  # fmt: skip
def test_what_the_original_has_no_meaning_for_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**keys)


def test_a_matrix_is_of_a_superposed_tensor() -> None:
    superposition = CASES[0].superposed
    with pytest.raises(ValueError, match=r"tensor must be one that is superposed, got 'embed\.weight'"):
        fusionbench.matrix(superposition, "m0", "embed.weight")
    with pytest.raises(randes.UnknownModelError):
        fusionbench.matrix(superposition, "m9", "embed.weight")


# -------------------------------------------------------------------- on the command line


def written_checkpoints(folder: Path) -> list[str]:
    """The arguments that name them."""
    arguments = ["--base", str(write(folder / "base.safetensors", BASE))]
    for name, state in MODELS.items():
        arguments += ["--model", f"{name}={write(folder / f'{name}.safetensors', state)}"]
    return arguments


def write(path: Path, state: State) -> Path:
    write_file(path, state)
    return path


def compressed(folder: Path, text: str, *more: str) -> tuple[int, str]:
    (folder / "config.yaml").write_text(text)
    arguments = [*written_checkpoints(folder), "--config", str(folder / "config.yaml"), "--out", str(folder / "store")]
    result = CliRunner().invoke(app, ["compress", *arguments, *more])
    return result.exit_code, " ".join(result.output.split())


YAML = "\n".join(f"{key}: {value}" for key, value in {"name": "superposed_task_arithmetic", **COMMON}.items())


def test_the_command_takes_the_configuration_as_it_is(tmp_path: Path) -> None:
    code, said = compressed(tmp_path, YAML + "\nscaling_factor: 0.5\nmodel_path: null\n")
    assert code == 0, said
    assert "note: joint_matrix_mode, rank, random_components: the original reads none of it" in said
    superposition = randes.Superposition.load(tmp_path / "store")
    expected = Case(DELTAS, {"scaling_factor": 0.5}).superposed
    assert {superposition.members[name].alpha for name in NAMES} == {0.5}
    assert superposition.config == expected.config
    for name in NAMES:
        for tensor, value in expected.retrieve(name).items():
            assert torch.equal(superposition.retrieve(name)[tensor], value)


def test_flags_override_the_configuration(tmp_path: Path) -> None:
    code, said = compressed(tmp_path, YAML, "--others", "keep", "--alpha", "0.25", "--signs", "both")
    assert code == 0, said
    superposition = randes.Superposition.load(tmp_path / "store")
    config = superposition.config
    assert (config.others, config.signs, config.seed, config.group_size) == ("keep", "both", 42, 3)
    assert superposition.members["m0"].alpha == 0.25
    assert torch.equal(superposition.retrieve("m1")["embed.weight"], MODELS["m1"]["embed.weight"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            YAML.replace("random_binary_diagonal_matrix", "manual_absorption"),
            "error: mode must be one of random_binary_",
        ),
        ("- a list", "config.yaml must hold one mapping of keys to values, got list"),
        ("mode: [", "config.yaml must be a YAML file:"),
    ],
)
def test_a_configuration_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    code, said = compressed(tmp_path, text)
    assert code == 2
    assert message in said
    assert not (tmp_path / "store").exists()


def test_without_pyyaml_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(RandesError, match=r"python -m pip install 'randes\[yaml\]'"):
        fusionbench.read(tmp_path / "config.yaml")


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
