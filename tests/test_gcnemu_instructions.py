"""Every instruction of the emulator's table against an independent model and LLVM's assembler."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from gcnemu import build

try:
    build.compiler()
except build.NoCompiler as missing:
    pytest.skip(str(missing), allow_module_level=True)

import gcnemu_lanes
import gcnemu_machine
import gcnemu_matrix
import gcnemu_memory
import gcnemu_scalar
import gcnemu_vector
from gcnemu.asm import Unsupported
from gcnemu.emit import Shape
from gcnemu.isa import INSTRUCTIONS
from gcnemu.isa.table import emit_valu

MODULES = (gcnemu_vector, gcnemu_scalar, gcnemu_lanes, gcnemu_memory, gcnemu_matrix, gcnemu_machine)
CASES = [case for module in MODULES[:-1] for case in module.CASES]
BY_NAME = defaultdict(list)
for _case in CASES:
    BY_NAME[_case.name].append(_case)
ARCHS = ("gfx942", "gfx950")
# The division sequence has a test of its own, below.
SEQUENCES = {"v_div_scale_f32", "v_div_fmas_f32", "v_div_fixup_f32"}


def check_all(cases: list[gcnemu_machine.Case], arch: str) -> None:
    with np.errstate(all="ignore"):
        for case in cases:
            if arch in case.archs:
                gcnemu_machine.check(case, arch)


@cache
def compiled() -> bool:
    """Compile every body of every case in one go."""
    bodies = {gcnemu_machine.body(case, arch) for case in CASES for arch in case.archs}
    build.functions(sorted(bodies))
    return True


@pytest.mark.parametrize(
    ("name", "arch"), sorted({(case.name, arch) for case in CASES for arch in case.archs})
)
def test_instruction(name: str, arch: str):
    """The whole state after the instruction is what the model says, under random EXEC masks."""
    compiled()
    check_all(BY_NAME[name], arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_table_is_covered(arch: str):
    """An untested instruction fails the suite, and so does a test without an instruction."""
    table = {name for name, spec in INSTRUCTIONS.items() if arch in spec.archs}
    tested = {case.name for case in CASES if arch in case.archs} | SEQUENCES
    assert table - tested == set(), "untested instructions"
    assert tested - table == set(), "tests of instructions that the table lacks"


@pytest.mark.parametrize("arch", ARCHS)
def test_every_text_assembles(arch: str):
    """LLVM's assembler accepts each tested text for each target that the table claims."""
    from triton.backends.amd.compiler import assemble_amdgcn

    labels = {label for case in CASES for label in case.labels}
    texts = [case.text for case in CASES if arch in case.archs]
    head = f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\n'
    assert assemble_amdgcn(
        head + "\n".join(texts) + "\n" + "".join(f"{x}:\n" for x in labels), arch, ""
    )


def test_gfx942_lacks_what_the_table_says():
    """Instructions of CDNA4 only: LLVM refuses them for gfx942, and so do we."""
    from triton.backends.amd.compiler import assemble_amdgcn

    head = '.amdgcn_target "amdgcn-amd-amdhsa--gfx942"\n'
    for name, spec in INSTRUCTIONS.items():
        if "gfx942" in spec.archs:
            continue
        case = BY_NAME[name][0]
        with pytest.raises(Unsupported, match="not an instruction of gfx942"):
            gcnemu_machine.body(case, "gfx942")
        with pytest.raises(RuntimeError):
            assemble_amdgcn(head + case.text + "\n", "gfx942", "")


def test_sources_are_named():
    for spec in INSTRUCTIONS.values():
        assert spec.source
        assert spec.family


@pytest.mark.parametrize("arch", ARCHS)
def test_division_sequence(arch: str):
    """V_DIV_SCALE, V_DIV_FMAS and V_DIV_FIXUP, as LLVM uses them, divide exactly."""
    from gcnemu_machine import State
    from gcnemu_vector import SPECIAL_F32

    sequence = """v_div_scale_f32 v10, s[20:21], v4, v4, v2
v_div_scale_f32 v11, vcc, v2, v4, v2
v_rcp_f32 v12, v10
v_fma_f32 v13, -v10, v12, 1.0
v_fma_f32 v12, v13, v12, v12
v_mul_f32 v14, v11, v12
v_fma_f32 v15, -v10, v14, v11
v_fma_f32 v14, v15, v12, v14
v_fma_f32 v15, -v10, v14, v11
v_div_fmas_f32 v15, v15, v12, v14
v_div_fixup_f32 v10, v15, v4, v2"""
    rng = np.random.default_rng(3)
    special = np.array([x for x in SPECIAL_F32 if x & 0x7FFFFFFF], np.uint32)
    for _ in range(40):
        n = (rng.standard_normal(64) * 2.0 ** rng.integers(-149, 127, 64)).astype(np.float32)
        d = (rng.standard_normal(64) * 2.0 ** rng.integers(-149, 127, 64)).astype(np.float32)
        n[:16], d[8:24] = (
            rng.choice(special, 16).view(np.float32),
            rng.choice(special, 16).view(np.float32),
        )
        state = State(1)
        state.exec = (1 << 64) - 1
        state.v[2], state.v[4] = n.view(np.uint32), d.view(np.uint32)
        gcnemu_machine.run_sequence(state, sequence, arch)
        got = state.v[10].view(np.float32)
        with np.errstate(all="ignore"):
            expected = n / d
        # Results in the denormal range are rounded twice, by FMAS and by its scaling.
        ok = (got == expected) | (np.isnan(got) & np.isnan(expected))
        tiny = np.abs(expected) < np.finfo(np.float32).tiny
        near = np.where(tiny, got, 0).astype(np.float64) - np.where(tiny, expected, 0)
        ok |= tiny & (np.abs(near) <= 2.0**-149)
        assert ok.all(), (n[~ok], d[~ok], got[~ok], expected[~ok])


CONVERSIONS = [
    ("v_cvt_pk_fp8_f32", "gfx942", torch.float8_e4m3fnuz),
    ("v_cvt_pk_fp8_f32", "gfx950", torch.float8_e4m3fn),
    ("v_cvt_pk_bf8_f32", "gfx942", torch.float8_e5m2fnuz),
    ("v_cvt_pk_bf8_f32", "gfx950", torch.float8_e5m2),
    ("v_cvt_pk_bf16_f32", "gfx950", torch.bfloat16),
    ("v_cvt_pk_f16_f32", "gfx950", torch.float16),
    ("v_cvt_f16_f32", "gfx942", torch.float16),
]


@pytest.mark.parametrize(("name", "arch", "dtype"), CONVERSIONS)
def test_every_rounding(name: str, arch: str, dtype: torch.dtype):
    """Every value of the format, halfway point and neighbour of one, against torch's conversion.

    16-bit formats: every 37th of their values.
    """
    bits = 8 * dtype.itemsize
    integer = torch.uint8 if bits == 8 else torch.int16
    codes = torch.arange(0, 1 << bits, 1 if bits == 8 else 37)
    values = codes.to(integer).view(dtype).double()
    finite = values[values.isfinite()].unique()
    middle = ((finite[1:] + finite[:-1]) / 2).float()
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    extremes = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45])
    parts = [finite.float(), middle, torch.nextafter(middle, up), torch.nextafter(middle, down)]
    x = torch.cat([*parts, extremes])
    if dtype == torch.float8_e4m3fn:
        x = x[x.abs() <= 448]  # beyond, torch saturates; hardware does not, with FP16_OVFL 0
    x = torch.cat([x, torch.ones(-len(x) % 64)])
    expected = x.to(dtype).view(integer).int() & (1 << bits) - 1
    second = ", v4" if "_pk_" in name else ""
    state = gcnemu_machine.State(0)
    state.exec = (1 << 64) - 1
    for at in range(0, len(x), 64):
        chunk, wanted = x[at : at + 64], expected[at : at + 64]
        state.v[2] = chunk.view(torch.int32).numpy().view(np.uint32)
        state.v[4] = state.v[2][::-1]
        gcnemu_machine.run_sequence(state, f"{name} v10, v2{second}", arch)
        got = torch.from_numpy(state.v[10].astype(np.int64))
        results = [(got, chunk, wanted)]
        if second:
            results.append((got >> bits, chunk.flip(0), wanted.flip(0)))
        for codes, source, right in results:
            same = (codes & (1 << bits) - 1 == right) | source.isnan()
            assert same.all(), (source[~same], codes[~same], right[~same])


def emitted(shape: Shape) -> str:
    return INSTRUCTIONS[shape.ins.opcode].emit(shape)


WRONG = {
    "v_add_u32": lambda shape: emit_valu(shape, "u32", ["u32", "u32"], "a - b"),
    "v_max_f32": lambda shape: emit_valu(shape, "f32", ["f32", "f32"], "a > b ? a : b"),
    "v_cvt_f16_f32": lambda shape: emit_valu(shape, "b32", ["f32"], "f2h_rtz(a)"),
    "v_bfe_i32": lambda shape: emit_valu(shape, "u32", ["u32"] * 3, "bfe_u(a, b, c)"),
    "s_addc_u32": lambda shape: INSTRUCTIONS["s_add_u32"].emit(shape),
    "ds_read_u16": lambda shape: INSTRUCTIONS["ds_read_i16"].emit(shape),
    "ds_bpermute_b32": lambda shape: INSTRUCTIONS["ds_permute_b32"].emit(shape),
    "global_load_ubyte_d16_hi": lambda shape: INSTRUCTIONS["global_load_ubyte_d16"].emit(shape),
    "global_atomic_umin": lambda shape: INSTRUCTIONS["global_atomic_smin"].emit(shape),
    "v_mfma_f32_16x16x32_fp8_fp8": lambda shape: emitted(shape).replace("FMT_FP8_FNUZ", "FMT_FP8"),
    "v_cvt_f32_fp8": lambda shape: emitted(shape).replace("FMT_FP8_FNUZ", "FMT_FP8"),
    "v_mfma_f32_32x32x8_bf16": lambda shape: emitted(shape).replace("32, 8, 1,", "16, 16, 1,"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_semantic_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    """The tests fail when an instruction does something else."""
    from gcnemu import translate

    spec = INSTRUCTIONS[name]
    wrong = {
        **INSTRUCTIONS,
        name: type(spec)(name, spec.family, spec.archs, spec.source, WRONG[name]),
    }
    monkeypatch.setattr(translate, "INSTRUCTIONS", wrong)
    with pytest.raises(AssertionError):
        check_all(BY_NAME[name], "gfx942")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("v_frobnicate_b32 v1, v2", "not in the instruction table"),
        ("v_add_f32 v1, v2, v3 sparkle:1", "modifier sparkle"),
        ("v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[8:11] abid:1", "modifier abid"),
        ("v_add_u32 v1, -v2, v3", "sign modifier"),
        ("v_add_f32 v1, some_symbol, v3", "some_symbol"),
        ("s_getreg_b32 s1, hwreg(HW_REG_MODE)", "HW_REG_MODE"),
        ("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 0", "s_setreg"),
    ],
)
def test_unknown_is_an_error(text: str, why: str):
    """What is not modelled is refused by name; nothing is skipped in silence."""
    case = gcnemu_machine.Case(text.split()[0], text, lambda state: None)
    with pytest.raises(Unsupported, match=why):
        gcnemu_machine.body(case, "gfx942")
