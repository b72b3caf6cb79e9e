"""The assembly parser, and the cache of compiled instructions."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from gcnemu import asm, build


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v7", ("v", 7, 1)),
        ("v[4:7]", ("v", 4, 4)),
        ("v[0x5e:0x5f]", ("v", 94, 2)),
        ("v[9]", ("v", 9, 1)),
        ("a3", ("v", 259, 1)),
        ("a[0:15]", ("v", 256, 16)),
        ("s[20:21]", ("s", 20, 2)),
        ("ttmp9", ("s", 117, 1)),
        ("ttmp[4:5]", ("s", 112, 2)),
        ("vcc", ("s", 106, 2)),
        ("exec_lo", ("s", 126, 1)),
        ("m0", ("s", 124, 1)),
        ("off", ("off", 0, 1)),
        ("src_scc", ("scc", 0, 1)),
        (".LBB0_3", ("name", 0, 1)),
    ],
)
def test_registers(text: str, expected: tuple):
    operand = asm.parse_operand(text)
    assert (operand.kind, operand.index, operand.count) == expected


@pytest.mark.parametrize(
    ("text", "value"), [("12", 12), ("-5", -5), ("0xff", 255), ("1.0", 1.0), ("-0.5", -0.5)]
)
def test_constants(text: str, value: float):
    operand = asm.parse_operand(text)
    assert operand.kind == "const"
    assert operand.value == value
    assert type(operand.value) is type(value)


@pytest.mark.parametrize(
    ("text", "negated", "absolute", "extended"),
    [
        ("-v2", True, False, False),
        ("|v2|", False, True, False),
        ("-|v2|", True, True, False),
        ("neg(v2)", True, False, False),
        ("abs(v2)", False, True, False),
        ("sext(v2)", False, False, True),
    ],
)
def test_marks(text: str, negated: bool, absolute: bool, extended: bool):
    operand = asm.parse_operand(text)
    assert (operand.kind, operand.index) == ("v", 2)
    assert (operand.negated, operand.absolute, operand.sign_extended) == (
        negated,
        absolute,
        extended,
    )


def test_modifiers():
    ins = asm.parse_instruction(
        "v_pk_fma_f32 v[0:1], v[2:3], s[4:5], 1.0 op_sel_hi:[1,0,0] neg_lo:[0,1,0] clamp"
    )
    assert [o.text for o in ins.operands] == ["v[0:1]", "v[2:3]", "s[4:5]", "1.0"]
    assert ins.modifiers == {"op_sel_hi": "[1,0,0]", "neg_lo": "[0,1,0]", "clamp": "1"}
    ins = asm.parse_instruction(
        "v_mov_b32_dpp v1, v2 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf"
    )
    assert (ins.opcode, ins.encoding) == ("v_mov_b32", "dpp")
    ins = asm.parse_instruction('ds_swizzle_b32 v1, v2 offset:swizzle(BITMASK_PERM, "01pip")')
    assert ins.modifiers == {"offset": 'swizzle(BITMASK_PERM, "01pip")'}
    ins = asm.parse_instruction("buffer_inv sc0 sc1")
    assert (ins.operands, ins.modifiers) == ([], {"sc0": "1", "sc1": "1"})


KERNEL = """
\t.amdgcn_target "amdgcn-amd-amdhsa--gfx950"
\t.file\t1 "/src" "kernel.py"
first:
\ts_endpgm
.Lfunc_end0:
second:                                 ; @second
; %bb.0:
\t.loc\t1 12 7
\ts_mov_b32 s0, 0                        ; a comment
.LBB1_1:                                ; %loop
\ts_cbranch_scc0 .LBB1_1
\t;;#ASMSTART
\ts_nop 0 // inline
\t;;#ASMEND
\ts_endpgm
.Lfunc_end1:
\t.set size, 16
\t.amdhsa_kernel first
\t\t.amdhsa_kernarg_size 8
\t.end_amdhsa_kernel
\t.amdhsa_kernel second
\t\t.amdhsa_kernarg_size size
\t.end_amdhsa_kernel
"""


def test_kernels_of_a_file():
    assert asm.kernel_names(KERNEL) == ["first", "second"]
    kernel = asm.parse(KERNEL, "second")
    assert (kernel.name, kernel.arch) == ("second", "gfx950")
    assert kernel.descriptor == {"kernarg_size": 16}
    assert [i.opcode for i in kernel.instructions] == [
        "s_mov_b32",
        "s_cbranch_scc0",
        "s_nop",
        "s_endpgm",
    ]
    assert kernel.labels == {".LBB1_1": 1}
    assert kernel.instructions[0].source == "kernel.py:12"
    assert KERNEL.split("\n")[kernel.instructions[0].line - 1].strip().startswith("s_mov_b32")


def test_bad_files():
    with pytest.raises(ValueError, match="name the kernel to run"):
        asm.parse(KERNEL)
    with pytest.raises(ValueError, match="no kernel 'third'"):
        asm.parse(KERNEL, "third")
    with pytest.raises(ValueError, match="no .amdgcn_target"):
        asm.parse(KERNEL.replace(".amdgcn_target", ".target"), "first")


def test_shapes_are_compiled_once(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A body that was compiled before, in this process or another, is not compiled again."""
    try:
        build.compiler()
    except build.NoCompiler as missing:
        pytest.skip(str(missing))
    build.runtime()
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "_functions", {})
    monkeypatch.setattr(build, "_loaded", set())
    first = build.functions(["return 41;", "return 42;"])
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert build.functions(["return 42;"]) == first[1:]
    monkeypatch.setattr(build, "_functions", {})
    monkeypatch.setattr(build, "_loaded", set())
    monkeypatch.setattr(build, "_compile", lambda source, target: pytest.fail("compiled again"))
    assert len(build.functions(["return 41;"])) == 1


def test_no_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GCNEMU_CC", "no-such-compiler")
    with pytest.raises(build.NoCompiler, match="no-such-compiler, which is not installed"):
        build.compiler()
