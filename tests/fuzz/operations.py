"""Random operations on a store, against a model of what must be true: a dictionary of what is in it.

After each of them the store on the disk has the bytes of one that is made anew of the same models in the same groups.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import content, finetune, linear, stored
from torch import nn

import randes

NAMES = ("a", "b", "ünï/日本", "../up", "x" * 200)
CONFIGS = (
    randes.Config(group_size=2), randes.Config(group_size=3, shuffle_layers=-1, seed=5),
    randes.Config(others="average"), randes.Config(permute=8, others="base"),
    randes.Config(gains="shared", signs="columns"),
)  # fmt: skip


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(linear(32, 32), linear(48, 32), nn.Linear(48, 2))


class Store(RuleBasedStateMachine):
    """``there`` is what must be in it: group, seed of the checkpoint, and α, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.there: dict[str, tuple[int, int, float]] = {}
        self.saved = dict(self.there)

    @initialize(config=st.sampled_from(CONFIGS))
    def create(self, config: randes.Config) -> None:
        self.config = config
        self.sup = randes.Superposition.create(base(), config)
        self.sup.save(self.folder / "store")

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 3), alpha=st.sampled_from((1.0, 0.5, -1.0)))
    def add(self, name: str, seed: int, alpha: float) -> None:
        try:
            self.sup.add(name, finetune(base(), seed), alpha=alpha)
        except ValueError:
            assert name in self.there
            return
        assert name not in self.there
        self.there[name] = self.sup.member(name).group, seed, alpha

    @rule(name=st.sampled_from(NAMES), right=st.booleans())
    def remove(self, name: str, right: bool) -> None:
        _, seed, _ = self.there.get(name, (0, 0, 0))
        try:
            self.sup.remove(name, finetune(base(), seed if right else seed + 10))
        except randes.UnknownModelError:
            assert name not in self.there
        except randes.CheckpointError:
            assert not right
        else:
            assert right
            del self.there[name]

    @rule()
    def save(self) -> None:
        self.sup.save(self.folder / "store")
        self.saved = dict(self.there)

    @rule(check=st.booleans())
    def load(self, check: bool) -> None:
        self.sup = randes.Superposition.load(self.folder / "store", check=check)
        self.there = dict(self.saved)

    @rule()
    def somebody_else_adds(self) -> None:
        other = randes.Superposition.load(self.folder / "store")
        name = f"other {len(other.names)}"
        if name in other.names:
            return
        other.add(name, finetune(base(), 3))
        other.save(self.folder / "store")
        self.saved[name] = other.member(name).group, 3, 1.0
        self.sup.add("mine", finetune(base(), 2)) if "mine" not in self.there else None
        try:
            self.sup.save(self.folder / "store")
        except randes.StoreError:
            self.load(True)
        else:
            raise AssertionError("what somebody else had written was lost")

    @precondition(lambda self: self.there)
    @rule(bits=st.sampled_from((8, 4, 2, 1, 0.5)))
    def pack(self, bits: float) -> None:
        packed = self.sup.pack(bits)
        first = stored(packed, self.folder / "packed")
        again = randes.Superposition.load(self.folder / "packed")
        assert again.names == sorted(self.there)
        assert stored(again, self.folder / "packed again") == first
        for name in ("packed", "packed again"):
            shutil.rmtree(self.folder / name)

    @invariant()
    def the_store_is_one_made_anew(self) -> None:
        if not hasattr(self, "sup"):
            return
        assert self.sup.names == sorted(self.there)
        place = self.sup.stored  # a copy elsewhere would be the store that it went to last
        for number, there in ((0, self.there), (1, self.saved)):
            anew = randes.Superposition.create(base(), self.config)
            for name, (group, seed, alpha) in sorted(there.items(), key=lambda one: one[1][0]):
                anew.add(name, finetune(base(), seed), group=group, alpha=alpha)
            expected = stored(anew, self.folder / "anew")
            found = content(self.folder / "store") if number else stored(self.sup, self.folder / "mine")
            assert found == expected
            for folder in ("anew", "mine"):
                shutil.rmtree(self.folder / folder, ignore_errors=True)
        self.sup.stored = place

    def teardown(self) -> None:
        shutil.rmtree(self.folder)
