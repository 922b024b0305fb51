"""The model of cycles, against loops that were worked out by hand."""

import cycles


def line(address: int, text: str, stall: int, sets: int = 7, reads: int = 7, waits: int = 0) -> str:
    """An instruction as a disassembly prints it."""
    control = stall | sets << 5 | reads << 8 | waits << 11
    return f"        /*{address:04x}*/  {text} ;  /* 0x{0:016x} */\n        /* 0x{control << 41:016x} */\n"


LOOP = (
    line(0x00, "MOV R0, RZ", 15)
    + line(0x10, "LDSM.16.M88.4 R4, [R2]", 2, sets=0)
    + line(0x20, "IADD3 R3, R3, 0x1, RZ", 4)
    + line(0x30, "HMMA.16816.F32.BF16 R8, R4, R6, R8", 6, waits=1)
    + line(0x40, "@!PT LDS RZ, [RZ]", 1)
    + line(0x50, "@P0 BRA 0x10", 5)
    + line(0x60, "EXIT", 5)
)


def test_control_words_are_read() -> None:
    found = cycles.parse(LOOP)
    assert [one.name for one in found] == ["MOV", "LDSM", "IADD3", "HMMA", "LDS", "BRA", "EXIT"]
    assert found[1] == (0x10, "LDSM.16.M88.4 R4, [R2]", 2, 0, 7, 0)
    assert found[3].waits == 1


def test_a_step_is_what_its_stalls_and_scoreboards_come_to() -> None:
    step = cycles.step_in(LOOP)
    assert step is not None
    # The product waits until 33 cycles after the load: then 6, 1 and 5 more. The load that is never run takes no slot.
    assert (step.instructions, step.alone, step.issue, step.shared) == (5, 33 + 6 + 1 + 5, 4, 4)
    assert step.cycles(4) == 45
    assert step.cycles(64) == max(16 * 4, 64 * 4, 64 * step.product)


def test_what_has_no_product_has_no_step() -> None:
    assert cycles.step_in(LOOP.replace("HMMA", "IMAD")) is None
