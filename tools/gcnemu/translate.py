"""A parsed kernel into the array of `Ins` that runtime/run.c executes."""

from __future__ import annotations

import ctypes

from gcnemu import build, state
from gcnemu.asm import Instruction, Kernel, Unsupported
from gcnemu.emit import Shape
from gcnemu.isa import INSTRUCTIONS


class UnsupportedInstructions(NotImplementedError):
    """Instructions that the table lacks, or used as it does not model; the message lists them."""


def shape_of(ins: Instruction, arch: str, labels: dict[str, int]) -> tuple[Shape, str]:
    """The shape and its C body.

    Raises:
        Unsupported: the instruction, an operand or a modifier is not modelled on this target.
    """
    spec = INSTRUCTIONS.get(ins.opcode)
    if spec is None:
        raise Unsupported("not in the instruction table")
    if arch not in spec.archs:
        raise Unsupported(f"not an instruction of {arch}")
    shape = Shape(ins, arch, labels)
    body = spec.emit(shape)
    shape.finish()
    return shape, body


def translate(kernel: Kernel) -> ctypes.Array[state.Ins]:
    """The program of a kernel.

    Raises:
        UnsupportedInstructions: some instruction is not modelled. Nothing is run then.
    """
    shapes: list[Shape] = []
    bodies: list[str] = []
    problems: dict[str, Instruction] = {}
    for ins in kernel.instructions:
        try:
            shape, body = shape_of(ins, kernel.arch, kernel.labels)
        except Unsupported as error:
            problems.setdefault(f"{ins.opcode}: {error}", ins)
            continue
        shapes.append(shape)
        bodies.append(body)
    if problems:
        shown = [f"{why} (line {ins.line}: {ins.text})" for why, ins in problems.items()]
        raise UnsupportedInstructions(
            f"{kernel.name} on {kernel.arch}: {len(problems)} kinds of instruction are not "
            "modelled: " + "; ".join(shown[:8])
        )
    program = (state.Ins * (len(shapes) + 1))()
    addresses = build.functions([*bodies, "return LOST;"])  # running off the end is an error
    for slot, shape, address in zip(program, shapes, addresses, strict=False):
        slot.fn = address
        for n, value in enumerate(shape.registers):
            slot.r[n] = value
        for n, value in enumerate(shape.constants):
            slot.x[n] = value
    program[len(shapes)].fn = addresses[-1]
    return program
