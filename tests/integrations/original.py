"""Runs FusionBench's own RanDeS, in an environment that has it, with matrices that are handed to it.

    python original.py FOLDER

FOLDER holds cases.json, what each case superposes (safetensors) and the matrices that stand in for the original's own
random draws, in the order in which it draws them. What it retrieves is written beside them.
``test_fusionbench_beside.py`` prepares the folder and compares. Nothing of ours is imported, and nothing of the
original's is replaced but where it draws random numbers and, for its dense matrices, asks for a GPU.
"""

import json
import random
import sys
from collections import OrderedDict
from pathlib import Path

import fusion_bench.method.randes as original
import numpy
import torch
from fusion_bench.method.randes import base_algorithm
from fusion_bench.modelpool import BaseModelPool
from safetensors.torch import load_file, save_file
from torch import nn


class Model(nn.Module):
    """A state dict as a module. Its tensors are no Parameters: the original's task arithmetic refuses to add those."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *_, **__):
        return OrderedDict(self.tensors)

    def load_state_dict(self, tensors):
        self.tensors = dict(tensors)

    def named_parameters(self, *_, **__):
        return iter(self.tensors.items())


class Pool(BaseModelPool):
    """Models that are at hand. Adapters are dicts of tensors, which a pool does not load."""

    def load_model(self, name, *_, **__):
        tensors = {key: value.clone() for key, value in self.held[name].items()}
        return tensors if self.adapters and name != "_pretrained_" else Model(tensors)


def hand_over(matrices, orders):
    """Every draw gives the next of ``matrices``, and every shuffle the next of ``orders``."""
    left, orders = iter(matrices), iter(orders)

    def drawn(shape):
        matrix = next(left)
        assert tuple(matrix.shape) == tuple(shape), (matrix.shape, shape)
        return matrix.numpy()

    numpy.random.binomial = lambda p, n, size: (drawn(size) + 1) / 2
    numpy.random.randn = lambda *shape: drawn(shape)
    base_algorithm.ortho_group.rvs = lambda dim, random_state: drawn((dim, dim))

    def shuffle(values):
        values[:] = next(orders)

    random.shuffle = shuffle
    return left, orders


def run(folder, case):
    held = {name: load_file(folder / f"{case['models']}-{name}.safetensors") for name in case["names"]}
    held = {name: {key: tensors[key] for key in case["order"][name]} for name, tensors in held.items()}
    drawn = load_file(folder / f"{case['name']}-matrices.safetensors") if case["matrices"] else {}
    left, orders = hand_over([drawn[str(number)] for number in range(case["matrices"])], case["orders"])
    pool = Pool(models={name: {"_target_": "none"} for name in held})
    pool.held, pool.adapters = held, "LoRA" in case["algorithm"]
    algorithm = getattr(original, case["algorithm"])(**case["keys"])
    found = algorithm.run(pool)
    assert next(left, None) is None
    assert next(orders, None) is None
    for name, model in found["models"].items():
        tensors = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, folder / f"{case['name']}-{name}-retrieved.safetensors")
    (folder / f"{case['name']}-metadata.json").write_text(json.dumps(found["metadata"], default=float))


def facts(common):
    """What docs/paper.md says of it: what it raises, and the seeds that it draws with, by case."""
    torch.manual_seed(0)
    told = {}

    def layers(depth, mlps):
        named = {f"attn.{layer}.weight": torch.randn(4, 4) for layer in range(depth)}
        return named | {f"mlp.{layer}.weight": torch.randn(4, 4) for layer in range(mlps)} | {"norm": torch.ones(4)}

    def attempt(name, algorithm, states, without=(), **keys):
        options = {key: value for key, value in (common | keys).items() if key not in without}
        pool = Pool(models={model: {"_target_": "none"} for model in states})
        pool.held, pool.adapters = states, False
        if "parameters" in name:
            pool.load_model = lambda model, **_: nn.Linear(4, 4)
        try:
            found = getattr(original, algorithm)(**options).run(pool)
            told[name] = found["metadata"]
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"

    deltas, soup = "SuperposedTaskArithmeticAlgorithm", "SuperposedModelSoupAlgorithm"
    even = {name: layers(2, 2) for name in ("_pretrained_", "a", "b", "c")}
    seeds, seed = [], numpy.random.seed
    numpy.random.seed = lambda value: (seeds.append(value), seed(value))
    attempt("seeds", deltas, even, scaling_factor=1.0)
    numpy.random.seed = seed
    told["seeds"] = seeds[:3], common["random_seed"] + hash("attn.0.weight") % 1e6
    attempt("rotation", deltas, even, mode="random_rotation_matrix", scaling_factor=1.0)
    attempt("manual absorption", soup, even, mode="manual_absorption")
    attempt("parameters", deltas, even, scaling_factor=1.0, target_layer=["all"])
    attempt("yaml", deltas, even, without=("absorber", "ms_mode"), scaling_factor=1.0)
    uneven = {name: layers(2, 3) for name in even}
    attempt("two depths", deltas, uneven, shift_layers=1, scaling_factor=1.0)
    vectors = {name: value | {"mlp.0.bias": torch.ones(4)} for name, value in even.items()}
    attempt("vectors", deltas, vectors, target_layer=["mlp"], scaling_factor=1.0)
    attempt("every second", deltas, even, dropout_rate=2, scaling_factor=1.0)
    alike = {name: value | {"norm": value["norm"] * 100} for name, value in even.items()}
    attempt("debug 2", soup, alike, debug=2)
    return told


def analysed(folder):
    """What its analysis says of two models."""
    first, second, third = (load_file(folder / f"full-{name}.safetensors") for name in ("m0", "m1", "m2"))
    name = "encoder.layers.0.mlp.fc1.weight"
    tensors = [model[name] for model in (first, second, third)]
    return {
        "cosine": base_algorithm.cosine_similarity(*tensors[:2]),
        "pairwise": base_algorithm.pairwise_cosine_similarity_matrix(tensors).tolist(),
        "subspaces": base_algorithm.compute_svd_subspace_similarity(*tensors[:2]),
        "chunks": [s.tolist() for s in base_algorithm.svd_and_partition(tensors[0])[1]],
        "models": base_algorithm.compare_models(first, second),
    }


def main():
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts(cases[0]["common"]), default=float))
    (folder / "analysis.json").write_text(json.dumps(analysed(folder), default=float))
    moved = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **options: self if args == ("cuda",) else moved(self, *args, **options)
    for case in cases:
        run(folder, case)


if __name__ == "__main__":
    main()
