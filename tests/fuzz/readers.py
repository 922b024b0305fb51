"""Readers beside a writer: each load is the store as it stood at some moment, and none is refused."""

import os
import signal
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random

import torch
from models import deep, finetune
from torch import Tensor

import randes

VISITORS = ("m1", "m2", "m3")


def write_on(store: Path) -> None:
    """Add, remove and save, until the process is killed."""
    base, chance = deep(2), Random(0)
    tuned = {name: finetune(base, number) for number, name in enumerate(("m0", *VISITORS))}
    sup = randes.Superposition.load(store)
    while True:
        name = chance.choice(VISITORS)
        sup.remove(name, tuned[name]) if name in sup.names else sup.add(name, tuned[name], group=0)
        sup.save(store)


def answers() -> dict[tuple[str, ...], dict[str, Tensor]]:
    """What comes back of ``m0``, by the models that are there."""
    base, found = deep(2), {}
    for count in range(len(VISITORS) + 1):
        for others in combinations(VISITORS, count):
            sup = randes.Superposition.create(base)
            for number, name in enumerate(("m0", *VISITORS)):
                if name in ("m0", *others):
                    sup.add(name, finetune(base, number))
            found[("m0", *others)] = sup.retrieve("m0")
    return found


def beside_a_writer(folder: Path, loads: int) -> tuple[Counter[str], list[str]]:
    """So many loads, while another process changes the store. How they ended, and what must not be."""
    expected = answers()
    sup = randes.Superposition.create(deep(2))
    sup.add("m0", finetune(deep(2), 0))
    sup.save(folder)
    sys.stdout.flush()
    if (writer := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            write_on(folder)
        finally:
            os._exit(1)
    done: Counter[str] = Counter()
    wrong, seen = [], set()
    try:
        for number in range(loads):
            try:
                found = randes.Superposition.load(folder, check=bool(number % 2))
                seen.add((folder / "manifest.json").stat().st_mtime_ns)
                if number % 4 == 0:
                    names, back = tuple(found.names), found.retrieve("m0")
                    if any(not torch.equal(back[tensor], value) for tensor, value in expected[names].items()):
                        wrong.append(f"load {number}: a wrong answer with {names}")
                done["loaded"] += 1
            except Exception as error:
                done["refused"] += 1
                wrong.append(f"load {number}: {type(error).__name__}: {error}")
        if os.waitpid(writer, os.WNOHANG) != (0, 0):
            wrong.append("the writer had ended")
            writer = 0
    finally:
        if writer:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
    done["stores seen"] = len(seen)
    return done, wrong
