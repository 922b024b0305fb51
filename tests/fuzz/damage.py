"""How bytes, JSON, tensors and files are damaged: at random, from one seed, so that each damage can be made again."""

import copy
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

NUMBERS = (
    0, 1, -1, 2, 7, 64, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    10**30, 10**400, -(2**63), 0.5, -0.0, 1e-300, 1e38, 1e39, 1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", ".", "..", "../secret", "/etc/passwd", "a/b", "a\\b", "x" * 300, "x" * 5000, "\0", "\x1b[31mred", "\ud800",
    "\u202e", "日本", "*", "[", "(a+)+$", "(a|a)" * 30, ".*.*.*.*.*.*x", "(?=", "\\", "NaN", "__base__", "__class__",
    "F32", "BF16", "F4", "C64", "BOOL", "auto", "both", "config.json", "manifest.json", "AutoModel", "pipeline",
    "BertModel", "GPT2LMHeadModel", "base-" + "0" * 32 + ".safetensors",
)  # fmt: skip
DEEP = json.loads("[" * 50 + "]" * 50)
VALUES = (None, True, False, [], {}, [[]], {"a": {}}, [None], DEEP)


def damaged_bytes(chance: Random, data: bytes, others: list[bytes]) -> bytes:
    """One to three changes of some bytes, of lengths above all."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        # Half of them near the beginning, where headers are.
        end = max(1, len(found) if chance.random() < 0.5 else min(len(found), 600))
        place = chance.randrange(end)
        how = chance.randrange(9)
        if how == 0 and found:
            found[place % len(found)] ^= 1 << chance.randrange(8)
        elif how == 1 and found:
            found[place % len(found)] = chance.randrange(256)
        elif how == 2:
            del found[place:]
        elif how == 3:
            found += bytes(chance.randrange(1, 100))
        elif how == 4:
            del found[place : place + chance.randrange(1, 64)]
        elif how == 5:
            found[place:place] = chance.randbytes(chance.randrange(1, 64))
        elif how == 6:
            number = chance.choice([number for number in NUMBERS if isinstance(number, int) and 0 <= number < 2**64])
            found[:8] = number.to_bytes(8, "little")
        elif how == 7:
            other = chance.choice(others)
            start = chance.randrange(max(1, len(other)))
            found[place : place + 40] = other[start : start + 40]
        else:
            digits = [at for at, byte in enumerate(found[:4000]) if 48 <= byte < 58]
            if digits:
                found[chance.choice(digits)] = chance.choice(b"0123456789-.eE")
    return bytes(found)


def damaged_json(chance: Random, value: Any) -> Any:
    """One to three values replaced, dropped, renamed, or put in another's place."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return _any(chance)
        holder, key = chance.choice(places)
        how = chance.randrange(7)
        if how <= 2:
            holder[key] = _any(chance)
        elif how == 3:
            del holder[key]
        elif how == 4:
            other, own = chance.choice(places)
            holder[key] = copy.deepcopy(other[own])
        elif isinstance(holder, dict):
            name = chance.choice(TEXTS) if how == 5 else chance.choice([*holder, chance.choice(TEXTS)])
            holder[name] = holder.pop(key) if how == 5 else _any(chance)
        else:
            holder.insert(key, _any(chance))
    return value


def _any(chance: Random) -> Any:
    return copy.deepcopy(chance.choice((chance.choice(NUMBERS), chance.choice(TEXTS), chance.choice(VALUES))))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in list(inner):
        yield value, key
        yield from _places(held)


def damaged_tensors(chance: Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor of another shape, dtype or value, under another name, or none at all."""
    found = dict(tensors)
    name = chance.choice(list(found))
    value, how = found[name], chance.randrange(8)
    if how == 0:
        found[name] = value[:-1] if value.dim() else value[None]
    elif how == 1:
        found[name] = value.mT.contiguous() if value.dim() > 1 else value.flatten()[:0]
    elif how == 2:
        found[name] = value.to(chance.choice((torch.float32, torch.float16, torch.int32, torch.int64, torch.bool)))
    elif how == 3:
        found[name] = value[None] if chance.random() < 0.5 else value.flatten()
    elif how == 4:
        del found[name]
    elif how == 5:
        found[chance.choice((*TEXTS[3:6], "@basis", "a@steps", *found))] = found.pop(name)
    elif how == 6:
        found[chance.choice(("more", *found))] = torch.zeros(chance.choice(((), (0,), (3, 0), (2, 3))))
    elif value.dim():
        raw = value.clone().contiguous().view(torch.uint8)
        found[name] = raw.random_(generator=torch.Generator().manual_seed(chance.randrange(99))).view(value.dtype)
    return {name: value for name, value in found.items() if "\ud800" not in name}


def put_something_else(chance: Random, path: Path) -> None:
    """In a file's place a pipe, a link, a folder, a socket, a device, or a file of a terabyte without content."""
    whole = path.read_bytes()
    path.unlink()
    how = chance.randrange(8)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(path)
    elif how == 3:
        path.symlink_to("/dev/zero")
    elif how == 4:
        path.symlink_to("/nowhere/at/all")
    elif how == 5:
        with path.open("wb") as file:
            file.truncate(2**40)
    elif how == 6:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)
    else:
        outside = path.parent.parent / "outside"
        outside.write_bytes(whole)
        path.symlink_to(outside)
