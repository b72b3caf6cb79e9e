"""AMDGPU assembly text, as LLVM prints it, into instructions and kernel descriptors.

Nothing here knows what an instruction does; see `isa/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Scalar register numbers of the named registers (ISA "Scalar operands" table).
NAMED = {
    "flat_scratch_lo": 102, "flat_scratch_hi": 103, "xnack_mask_lo": 104, "xnack_mask_hi": 105,
    "vcc_lo": 106, "vcc_hi": 107, "m0": 124, "exec_lo": 126, "exec_hi": 127,
}  # fmt: skip
PAIRS = {"flat_scratch": 102, "xnack_mask": 104, "vcc": 106, "exec": 126}
FIRST_TTMP = 108


class Unsupported(Exception):
    """An instruction, operand or modifier that the emulator does not model."""


@dataclass
class Operand:
    """One operand.

    kind: `v` (VGPR; accumulation registers from 256), `s` (SGPR), `const` (a number), `scc`,
    `vccz`, `execz`, `off`, or `name` (a label, symbol or hwreg).
    """

    text: str
    kind: str
    index: int = 0
    count: int = 1
    value: int | float = 0
    negated: bool = False
    absolute: bool = False
    sign_extended: bool = False


@dataclass
class Instruction:
    """One line: opcode without its encoding suffix, operands, modifiers."""

    opcode: str
    encoding: str  # "", "e32", "e64", "dpp" or "sdwa"
    operands: list[Operand]
    modifiers: dict[str, str]
    text: str
    line: int
    source: str = ""  # "file.py:12" where the assembly says so


@dataclass
class Kernel:
    """One kernel of an assembly file."""

    name: str
    arch: str
    descriptor: dict[str, int]
    instructions: list[Instruction]
    labels: dict[str, int] = field(default_factory=dict)


def kernel_names(text: str) -> list[str]:
    """The kernels that the file defines, in order."""
    return re.findall(r"^\s*\.amdhsa_kernel\s+(\S+)", text, re.M)


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel `name` of an assembly file; its only kernel where no name is given.

    Raises:
        ValueError: no such kernel, several where no name is given, or no target line.
    """
    names = kernel_names(text)
    if name is None:
        if len(names) != 1:
            raise ValueError(f"the assembly defines {names}: name the kernel to run")
        name = names[0]
    elif name not in names:
        raise ValueError(f"no kernel {name!r} in the assembly; it defines {names}")
    target = re.search(r'\.amdgcn_target\s+"[^"]*(gfx\w+)', text)
    if target is None:
        raise ValueError("the assembly has no .amdgcn_target line")
    symbols = {m[1]: m[2] for m in re.finditer(r"^\s*\.set\s+([\w.$]+),\s*(.+?)\s*$", text, re.M)}
    block = re.search(rf"\.amdhsa_kernel\s+{re.escape(name)}\n(.*?)\.end_amdhsa_kernel", text, re.S)
    assert block is not None
    descriptor = {
        key: _symbol_value(value, symbols)
        for key, value in re.findall(r"\.amdhsa_(\w+)\s+(.+)", block[1])
    }
    start = re.search(rf"^{re.escape(name)}:", text, re.M)
    if start is None:
        raise ValueError(f"the assembly has a descriptor of {name!r} but no code")
    first_line = text.count("\n", 0, start.end())
    body = text[start.end() :]
    end = re.search(r"^\.Lfunc_end\d+:|^\s*\.section\b|^\s*\.amdhsa_kernel\b", body, re.M)
    body = body[: end.start()] if end else body
    kernel = Kernel(name, target[1], descriptor, [])
    files = {
        m[1]: m[2]
        for m in re.finditer(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"', text, re.M)
    }
    source = ""
    for number, raw in enumerate(body.split("\n"), first_line + 1):
        line = re.sub(r";.*$|//.*$", "", raw).strip()
        while label := re.match(r"([\w.$]+):\s*", line):
            kernel.labels[label[1]] = len(kernel.instructions)
            line = line[label.end() :]
        if not line:
            continue
        if line.startswith("."):
            where = re.match(r"\.loc\s+(\d+)\s+(\d+)", line)
            if where and where[2] != "0":
                source = f"{files.get(where[1], '?').rsplit('/', 1)[-1]}:{where[2]}"
            continue
        kernel.instructions.append(parse_instruction(line, number, source))
    return kernel


def _symbol_value(text: str, symbols: dict[str, str]) -> int:
    """Descriptor values are numbers or symbols; expressions that do not matter here become 0."""
    for _ in range(8):
        try:
            return int(text, 0)
        except ValueError:
            if text not in symbols:
                return 0
            text = symbols[text]
    return 0


def parse_instruction(line: str, number: int = 0, source: str = "") -> Instruction:
    """One line without its comment; `number` and `source` say where it stands."""
    opcode, _, rest = line.partition(" ") if " " in line else line.partition("\t")
    encoding = ""
    if match := re.fullmatch(r"(v_\w+?)_(e64_dpp|e32|e64|dpp|sdwa)", opcode):
        opcode, encoding = match[1], match[2]
    parts = split_operands(rest)
    modifiers: dict[str, str] = {}
    if opcode in RAW:  # operands of their own kind
        return Instruction(opcode, encoding, [], {"raw": rest.strip()}, line, number, source)
    if parts:
        head, *tail = _split_spaces(parts[-1])
        parts[-1] = head
        for word in tail:
            key, _, value = word.partition(":")
            modifiers[key] = value or "1"
    if parts and parts[-1] in FLAGS:  # an instruction of modifiers only, such as buffer_inv sc1
        modifiers[parts.pop()] = "1"
    operands = [parse_operand(part) for part in parts]
    return Instruction(opcode, encoding, operands, modifiers, line, number, source)


RAW = {"s_waitcnt", "s_getreg_b32", "s_setreg_b32", "s_setreg_imm32_b32", "s_sendmsg", "s_nop"}
FLAGS = {"sc0", "sc1", "nt", "glc", "slc"}


def split_operands(rest: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quoted, current = [], 0, False, ""
    for char in rest:
        quoted ^= char == '"'
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0 and not quoted:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        parts.append(current.strip())
    return parts


def _split_spaces(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for char in text + " ":
        depth += (char in "[(") - (char in "])")
        if char.isspace() and depth == 0:
            if current:
                parts.append(current)
            current = ""
        else:
            current += char
    return parts


def parse_operand(text: str) -> Operand:
    """One operand, with its negation and absolute-value marks."""
    inner = text.strip()
    operand = Operand(text, "name")
    if inner.startswith("-") and not re.match(r"-[\d.]", inner):
        operand.negated, inner = True, inner[1:]
    for mark in ("neg", "sext", "abs"):
        if inner.startswith(mark + "("):
            inner = inner[len(mark) + 1 : -1]
            operand.negated |= mark == "neg"
            operand.sign_extended |= mark == "sext"
            operand.absolute |= mark == "abs"
    if inner.startswith("|"):
        operand.absolute, inner = True, inner.strip("|")
    number = r"(0x[0-9a-fA-F]+|\d+)"
    if match := re.fullmatch(rf"([vas])(?:{number}|\[{number}(?::{number})?\])", inner):
        first = int(match[2] or match[3], 0)
        operand.index = first + (256 if match[1] == "a" else 0)
        operand.count = (int(match[4], 0) if match[4] else first) - first + 1
        operand.kind = "s" if match[1] == "s" else "v"
    elif match := re.fullmatch(r"ttmp(?:(\d+)|\[(\d+):(\d+)\])", inner):
        first = int(match[1] or match[2])
        operand.kind, operand.index = "s", FIRST_TTMP + first
        operand.count = (int(match[3]) if match[3] else first) - first + 1
    elif inner in NAMED:
        operand.kind, operand.index = "s", NAMED[inner]
    elif inner in PAIRS:
        operand.kind, operand.index, operand.count = "s", PAIRS[inner], 2
    elif inner in ("scc", "src_scc"):
        operand.kind = "scc"
    elif inner in ("src_vccz", "src_execz"):
        operand.kind = inner[4:]
    elif inner == "off":
        operand.kind = "off"
    else:
        try:
            operand.value = int(inner, 0)
            operand.kind = "const"
        except ValueError:
            try:
                operand.value = float(inner)
                operand.kind = "const"
            except ValueError:
                pass  # a label or a symbol
    return operand
