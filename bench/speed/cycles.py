"""Cycles a step of a kernel's inner loop takes, read from the machine code of sm_80 and sm_90. Needs no GPU.

    python bench/speed/cycles.py KERNEL.sass...             as ``cuobjdump -sass`` prints it

Each instruction carries how many cycles the warp's next one waits, which of six scoreboards it waits for, and which it
sets until its operands are read or its result is there. What the hardware decides at run time is left to a table of
usual latencies. A model, not a measurement: copies from global memory are there in time, and nothing else runs.

    alone      cycles a step of one warp: stalls and scoreboards
    issue      slots of its scheduler that it takes
    shared     cycles of the multiprocessor's shared memory, 128 bytes each
    product    cycles of the tensor cores

Of w warps on a scheduler a step takes max(alone, w · issue), and at least what all warps of the multiprocessor take of
shared memory and of the tensor cores.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

LATENCY = {
    "LDSM": 33, "LDS": 30, "LDGSTS": 30, "STS": 25, "LDG": 450, "LDC": 40, "SHFL": 25, "BAR": 30, "SYNCS": 25,
    "HGMMA": 128, "HMMA": 33, "R2UR": 12, "S2R": 30, "I2F": 20, "F2F": 20, "MUFU": 20, "ELECT": 12, "UTMALDG": 30,
}  # fmt: skip
"""From issue until the scoreboard is clear, cycles."""
OTHER_LATENCY, READ_LATENCY, BARRIER = 20, 12, 20
"""The same of what the table leaves out, and of operands that were read; what a barrier takes at least."""
SHARED_CYCLES = {"LDSM": 4, "LDGSTS": 4, "LDS": 1, "STS": 1}
"""Of a whole warp, in the widest form for the first two and by 32 bits a thread for the others."""
ROUNDS = 6
"""Until the loop's scoreboards are as the step before left them."""


class Instruction(NamedTuple):
    """One of a warp's. ``sets``, ``reads``: scoreboards, 7 for none; ``waits``: a bit for each."""

    address: int
    text: str
    stall: int
    sets: int
    reads: int
    waits: int

    @property
    def name(self) -> str:
        """The opcode without predicate and modifiers."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0].split(".")[0]


class Step(NamedTuple):
    """What one step along K takes, in cycles of one warp."""

    instructions: int
    alone: int
    issue: int
    shared: int
    product: float

    def cycles(self, warps: int, schedulers: int = 4) -> int:
        """A step where ``warps`` run on a multiprocessor."""
        together = -(-warps // schedulers) * self.issue
        return round(max(self.alone, together, warps * self.shared, warps * self.product))


def parse(assembly: str) -> list[Instruction]:
    """The instructions of a disassembly, in order."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    found = []
    for address, text, word in re.findall(pattern, assembly):
        control = int(word, 16) >> 41
        stall, sets, reads, waits = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        found.append(Instruction(int(address, 16), text.strip(), stall, sets, reads, waits))
    return found


def inner_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The shortest loop with a product in it; empty where there is none."""
    place = {one.address: number for number, one in enumerate(instructions)}
    loops = []
    for number, one in enumerate(instructions):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", one.text)
        if target and int(target[1], 16) < one.address:
            body = instructions[place[int(target[1], 16)] : number + 1]
            if any(inside.name in ("HGMMA", "HMMA", "FFMA") for inside in body):
                loops.append(body)
    return min(loops, key=len, default=[])


def step_of(loop: list[Instruction]) -> Step:
    """What a step of the loop takes."""
    return Step(
        len(loop), _alone(loop), sum(not one.text.startswith("@!PT") for one in loop),
        sum(_shared_cycles(one) for one in loop), sum(_product_cycles(one) for one in loop),
    )  # fmt: skip


def step_in(assembly: str) -> Step | None:
    """What a step of the inner loop of a disassembled kernel takes; None where none multiplies."""
    loop = inner_loop(parse(assembly))
    return step_of(loop) if loop else None


def _alone(loop: list[Instruction]) -> int:
    """Cycles from one step to the next, of a warp that has its scheduler for itself."""
    now, began, clear = 0, 0, [0] * 8
    for _ in range(ROUNDS):
        began = now
        for one in loop:
            now = max([now, *(clear[board] for board in range(6) if one.waits >> board & 1)])
            for board, latency in ((one.sets, LATENCY.get(one.name, OTHER_LATENCY)), (one.reads, READ_LATENCY)):
                if board < 7:
                    clear[board] = max(clear[board], now + latency)
            now += max(1, one.stall) + (BARRIER if one.name == "BAR" else 0)
    return now - began


def _shared_cycles(one: Instruction) -> int:
    wide = re.search(r"\.(64|128)\b", one.text)
    if one.text.startswith("@!PT") or one.name not in SHARED_CYCLES:
        return 0
    if one.name == "LDGSTS":
        return int(wide[1]) // 32 if wide else 1
    if one.name == "LDSM":
        return int(one.text.split("M88")[1].lstrip(".")[:1] if "M88." in one.text else 1)
    return int(wide[1]) // 32 if wide else 1


def _product_cycles(one: Instruction) -> float:
    """One warp's share of the multiprocessor's cycles: its four tensor cores do 2048 multiply-adds of 16 bits in one,
    half of that without wgmma."""
    if one.name == "HGMMA":
        m, n, k = map(int, re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", one.text).groups())  # type: ignore[union-attr]
        return m * n * k / 4 / 2048
    return 16 * 8 * 16 / 1024 if one.name == "HMMA" else 0.0


def main() -> None:
    for name in sys.argv[1:]:
        step = step_in(Path(name).read_text(encoding="utf-8"))
        print(f"{name}: {step or 'no loop multiplies'}")


if __name__ == "__main__":
    main()
