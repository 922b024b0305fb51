"""Runs FusionBench's own RanDeS, in an environment that has it, with matrices that are handed to it.

    python original.py FOLDER

FOLDER holds cases.json, what each case superposes (safetensors) and the matrices that stand in for the original's own
random draws, in the order in which it draws them. What it retrieves is written beside them. ``test_fusionbench.py``
prepares the folder and compares. Nothing of ours is imported, and nothing of the original's is replaced but where
it draws random numbers and, for its dense matrices, asks for a GPU.
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
    """Adapters are dicts of tensors, which a pool does not load."""

    def load_model(self, name, *_, **__):
        return Model({key: value.clone() for key, value in self.held[name].items()}) if self.modules(name) else dict(self.held[name])

    def modules(self, name):
        return name == "_pretrained_" or not self.adapters


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


def main():
    folder = Path(sys.argv[1])
    moved = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **options: self if args == ("cuda",) else moved(self, *args, **options)
    for case in json.loads((folder / "cases.json").read_text()):
        try:
            run(folder, case)
        except Exception as error:
            if not case.get("fails"):
                raise
            (folder / f"{case['name']}-error.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
