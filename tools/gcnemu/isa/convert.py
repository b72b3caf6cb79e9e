"""Conversions: ISA "VOP1", "VOP3A & VOP3B"; scaled ones are CDNA4's.

8-bit floats are FNUZ on gfx942 and OCP on gfx950: the same opcode reads the same byte as another
number. Round to nearest even. With MODE.FP16_OVFL too large a value becomes the largest finite one,
otherwise infinity or NaN.
"""

from __future__ import annotations

from gcnemu.asm import Unsupported
from gcnemu.emit import Shape
from gcnemu.isa.table import CDNA3, CDNA4, add, valu

VOP1, VOP2, VOP3 = "VOP1 Instructions", "VOP2 Instructions", "VOP3A & VOP3B Instructions"

for name, signature, expression in (
    ("v_cvt_f32_u32", "f32 u32", "(float)a"),
    ("v_cvt_f32_i32", "f32 i32", "(float)a"),
    ("v_cvt_u32_f32", "u32 f32", "f2u(a)"),
    ("v_cvt_i32_f32", "u32 f32", "f2i(a)"),
    ("v_cvt_rpi_i32_f32", "u32 f32", "f2i(floor((double)a + 0.5))"),
    ("v_cvt_flr_i32_f32", "u32 f32", "f2i(floorf(a))"),
    ("v_cvt_f32_f16", "f32 f16", "a"),
    ("v_cvt_f16_f32", "f16 f32", "a"),
    ("v_cvt_f16_u16", "f16 u16", "(float)a"),
    ("v_cvt_f16_i16", "f16 i16", "(float)a"),
    ("v_cvt_u16_f16", "u16 f16", "a > 65535 ? 65535 : f2u(a)"),
    ("v_cvt_i16_f16", "i16 f16", "a > 32767 ? 32767 : a < -32768 ? -32768 : (i32)f2i(a)"),
    ("v_cvt_f64_f32", "f64 f32", "a"),
    ("v_cvt_f64_i32", "f64 i32", "a"),
    ("v_cvt_f64_u32", "f64 u32", "a"),
    ("v_cvt_f32_f64", "f32 f64", "(float)a"),
    ("v_cvt_i32_f64", "u32 f64", "f2i(a)"),
    ("v_cvt_u32_f64", "u32 f64", "f2u(a)"),
    ("v_cvt_f32_ubyte0", "f32 u32", "(float)(a & 255)"),
    ("v_cvt_f32_ubyte1", "f32 u32", "(float)(a >> 8 & 255)"),
    ("v_cvt_f32_ubyte2", "f32 u32", "(float)(a >> 16 & 255)"),
    ("v_cvt_f32_ubyte3", "f32 u32", "(float)(a >> 24)"),
):
    valu(name, signature, expression, VOP1, family="convert")
valu("v_cvt_f32_bf16", "f32 bf16", "a", VOP1, archs=CDNA4, family="convert")
valu("v_cvt_pkrtz_f16_f32", "b32 f32 f32", "f2h_rtz(a) | f2h_rtz(b) << 16", VOP2, family="convert")
valu(
    "v_cvt_pk_f16_f32",
    "b32 f32 f32",
    "half(w, a) | half(w, b) << 16",
    VOP3,
    archs=CDNA4,
    family="convert",
)
valu(
    "v_cvt_pk_bf16_f32", "b32 f32 f32", "f2b(a) | f2b(b) << 16", VOP3, archs=CDNA4, family="convert"
)


def _format(shape: Shape, name: str) -> str:
    """The run time's name of `fp8` or `bf8` on this target."""
    return f"FMT_{name.upper()}" + ("_FNUZ" if shape.arch in CDNA3 else "")


def _loop(body: str, writes: str) -> str:
    return f"u32 out[64], high[64]; for (int l = 0; l < 64; l++) {{ {body} }} {writes}return NEXT;"


def _to_fp8_pair(shape: Shape) -> str:
    """Two floats into one half of the destination; op_sel[2] picks it, the other half stays."""
    fmt = _format(shape, shape.ins.opcode.split("_")[3])
    d = shape.vgpr(0)
    a, b = (shape.value(o, "f32") for o in shape.operands[1:3])
    at = 16 * _last(shape.vector("op_sel", 3, 0))
    return _loop(
        f"u32 o = to_small_float({a}, {fmt}, w->overflow) | to_small_float({b}, {fmt}, w->overflow) << 8; "
        f"out[l] = (w->v[{d}][l] & ~(0xffffu << {at})) | o << {at};",
        f"put(w, {d}, out, ex); ",
    )


def _last(values: list[int]) -> int:
    return values[-1]


add("v_cvt_pk_fp8_f32 v_cvt_pk_bf8_f32", "convert", VOP3, _to_fp8_pair)


def _from_fp8(shape: Shape) -> str:
    """One byte of the source: the lowest, or by SDWA another."""
    fmt = _format(shape, shape.ins.opcode.split("_")[3])
    d = shape.vgpr(0)
    raw = _sdwa_source(shape)
    return _loop(f"out[l] = U(small_float({raw} & 255, {fmt}));", f"put(w, {d}, out, ex); ")


def _sdwa_source(shape: Shape) -> str:
    raw = shape.bits(shape.operands[1])
    if shape.ins.encoding == "sdwa":
        raw = shape.sdwa_source(shape.operands[1], "src0_sel", raw)
        if shape.take("dst_sel", "DWORD") != "DWORD":
            raise Unsupported("dst_sel")
        shape.take("dst_unused")
    return raw


add("v_cvt_f32_fp8 v_cvt_f32_bf8", "convert", VOP1, _from_fp8)


def _from_fp8_pair(shape: Shape) -> str:
    """Two bytes: the lower half of the source, or by SDWA or op_sel the upper."""
    fmt = _format(shape, shape.ins.opcode.split("_")[4])
    d = shape.vgpr(0)
    raw = f"({_sdwa_source(shape)} >> {16 * shape.vector('op_sel', 2, 0)[0]})"
    return _loop(
        f"const u32 a = {raw}; out[l] = U(small_float(a & 255, {fmt})); "
        f"high[l] = U(small_float(a >> 8 & 255, {fmt}));",
        f"put(w, {d}, out, ex); put(w, {d} + 1, high, ex); ",
    )


add("v_cvt_pk_f32_fp8 v_cvt_pk_f32_bf8", "convert", VOP1, _from_fp8_pair)


# --- CDNA4 conversions with a power-of-two scale: the exponent field of a float operand ---
_SCALE = "const float scale = e8m0((u32)({0}) >> 23 & 255); "


def _scaled_from_small(shape: Shape) -> str:
    """Two codes times the scale; op_sel picks the byte (FP4) or the half (8-bit floats)."""
    words = shape.ins.opcode.split("_")  # v cvt scalef32 pk TO FROM
    to, source = words[4], words[5]
    fmt, bits = f"FMT_{source.upper()}", 4 if source == "fp4" else 8
    d = shape.vgpr(0)
    halves = shape.vector("op_sel", 4, 0)
    if halves[2] or halves[3]:
        raise Unsupported("op_sel of the destination")
    at = 8 * (halves[0] + 2 * halves[1]) if bits == 4 else 16 * halves[0]
    raw, scale = shape.bits(shape.operands[1]), shape.bits(shape.operands[2])
    body = (
        f"const u32 a = {raw} >> {at}; {_SCALE.format(scale)}"
        f"const float x = small_float(a & {(1 << bits) - 1}, {fmt}) * scale; "
        f"const float y = small_float(a >> {bits} & {(1 << bits) - 1}, {fmt}) * scale; "
    )
    if to == "f32":
        body += "out[l] = U(x); high[l] = U(y);"
        return _loop(body, f"put(w, {d}, out, ex); put(w, {d} + 1, high, ex); ")
    encode = {"f16": "half(w, ", "bf16": "f2b("}[to]
    return _loop(body + f"out[l] = {encode}x) | {encode}y) << 16;", f"put(w, {d}, out, ex); ")


def _scaled_to_small(shape: Shape) -> str:
    """Two values divided by the scale; op_sel picks the byte (FP4) or the half that is written."""
    words = shape.ins.opcode.split("_")
    to, source = words[4], words[5]
    fmt, bits = f"FMT_{to.upper()}", 4 if to == "fp4" else 8
    d = shape.vgpr(0)
    if source == "f32":
        x, y = (shape.value(o, "f32") for o in shape.operands[1:3])
        scale = shape.bits(shape.operands[3])
    else:
        x, y = (shape.value(shape.operands[1], source, half=h) for h in (0, 1))
        scale = shape.bits(shape.operands[2])
    # The destination's bit follows those of the sources; FP4 always has two, the third and fourth.
    halves = shape.vector("op_sel", 4 if bits == 4 else len(shape.operands), 0)
    at = 8 * (halves[2] + 2 * halves[3]) if bits == 4 else 16 * halves[-1]
    if any(halves[: 2 if bits == 4 else -1]):
        raise Unsupported("op_sel of a source")
    width = 2 * bits
    return _loop(
        f"{_SCALE.format(scale)}u32 o = to_small_float((float)((double){x} / scale), {fmt}, w->overflow) "
        f"| to_small_float((float)((double){y} / scale), {fmt}, w->overflow) << {bits}; "
        f"out[l] = (w->v[{d}][l] & ~({(1 << width) - 1:#x}u << {at})) | o << {at};",
        f"put(w, {d}, out, ex); ",
    )


for small in ("fp8", "bf8", "fp4"):
    for big in ("f32", "f16", "bf16"):
        add(f"v_cvt_scalef32_pk_{big}_{small}", "convert", VOP3, _scaled_from_small, CDNA4)
        add(f"v_cvt_scalef32_pk_{small}_{big}", "convert", VOP3, _scaled_to_small, CDNA4)
