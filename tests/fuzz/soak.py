"""Hours of serving in minutes: mixed batches in threads while models come and go, every answer checked to the bit.

What a call may answer are the answers of the sets of models that were there between its beginning and its end: each
set's are taken from a model that is made anew of that set.
"""

import copy
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from random import Random

import torch
from models import finetune, net, tokens
from torch import Tensor

import randes

STAY, VISIT = ("m0", "m1"), ("m2", "m3", "m4")
THREADS = 3
GROWTH = 32 << 20
"""Bytes that memory may grow by once the first tenth of the time is over."""
Key = tuple[frozenset[str], tuple[str, ...]]


def soak(seconds: float) -> tuple[Counter[str], list[str]]:
    """Serve for so long. How many answers and changes there were, and what must not be."""
    torch.set_num_threads(1)
    base, config = net(), randes.Config(group_size=8)
    tuned = {name: finetune(base, number) for number, name in enumerate((*STAY, *VISIT))}
    mixes = [("m0", "m1", "__base__", "m0"), ("m1",), ("__base__", "m0"), ("m0",) * 3]
    expected = _expected(base, config, tuned, mixes)
    sup = randes.Superposition.create(copy.deepcopy(base), config)
    for name in STAY:
        sup.add(name, tuned[name], group=0)
    model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=8)
    states, done, wrong = [frozenset(STAY)], Counter[str](), list[str]()
    lock, ended = threading.Lock(), threading.Event()

    def ask(number: int) -> None:
        chance = Random(number)
        while not ended.is_set():
            mix = chance.choice(mixes)
            first = len(states) - 1
            with torch.no_grad():
                found = model(tokens(len(mix)), adapter_names=list(mix))
            # One more than was said to be there: a change is served before it is said.
            allowed = {*states[max(0, first - 1) :], *upcoming}
            right = any(torch.equal(found, expected[names, mix]) for names in allowed)
            with lock:
                done["answers"] += 1
                if not right:
                    wrong.append(f"an answer to {mix} that no set of models gives")

    upcoming: list[frozenset[str]] = []
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    chance, began, least = Random(0), time.monotonic(), 0
    try:
        while time.monotonic() - began < seconds:
            name, there = chance.choice(VISIT), states[-1]
            upcoming[:] = [there ^ {name}]
            try:
                (model.delete_adapter if name in there else model.add_adapter)(name, tuned[name])
            except randes.CapacityError:
                time.sleep(0.001)  # a call that began before the last change has not ended
                continue
            states.append(there ^ {name})
            done["changes"] += 1
            if not least and time.monotonic() - began > seconds / 10:
                least = _resident()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    grown = _resident() - least
    done["KiB that memory grew by"] = grown >> 10
    if grown > GROWTH:
        wrong.append(f"memory grew by {grown >> 20} MiB")
    return done, wrong


def _expected(
    base: torch.nn.Module, config: randes.Config, tuned: dict[str, torch.nn.Module], mixes: Sequence[tuple[str, ...]]
) -> dict[Key, Tensor]:
    found = {}
    for count in range(len(VISIT) + 1):
        for visitors in combinations(VISIT, count):
            sup = randes.Superposition.create(copy.deepcopy(base), config)
            for name in (*STAY, *visitors):
                sup.add(name, tuned[name], group=0)
            model = randes.SuperposedModel(copy.deepcopy(base), sup, capacity=8)
            for mix in mixes:
                with torch.no_grad():
                    found[frozenset((*STAY, *visitors)), mix] = model(tokens(len(mix)), adapter_names=list(mix))
    return found


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
