"""Lane-wise floating point: ISA sections "VOP1", "VOP2", "VOP3A & VOP3B".

Transcendental instructions are correctly rounded here; hardware is allowed about one unit in the
last place. Denormals are kept (the float mode that compute kernels run in; launch.py checks it).
"""

from __future__ import annotations

from gcnemu.asm import Unsupported
from gcnemu.emit import Shape
from gcnemu.isa.table import CDNA4, add, valu

VOP1, VOP2, VOP3 = "VOP1 Instructions", "VOP2 Instructions", "VOP3A & VOP3B Instructions"

for name, expression in {
    "v_add_f32": "a + b",
    "v_sub_f32": "a - b",
    "v_subrev_f32": "b - a",
    "v_mul_f32": "a * b",
    "v_mul_legacy_f32": "a == 0 || b == 0 ? 0.0f : a * b",
    "v_max_f32": "max_f32(w, a, b)",
    "v_min_f32": "min_f32(w, a, b)",
}.items():
    valu(name, "f32 f32 f32", expression, VOP2)
valu("v_fmac_f32", "f32 f32 f32 f32", "fmaf(a, b, c)", VOP2, accumulate=True)
# fmaak: constant last; fmamk: constant in the middle. LLVM prints the operands in that order.
valu("v_fmaak_f32", "f32 f32 f32 f32", "fmaf(a, b, c)", VOP2)
valu("v_fmamk_f32", "f32 f32 f32 f32", "fmaf(a, b, c)", VOP2)

for name, expression in {
    "v_fma_f32": "fmaf(a, b, c)",
    "v_max3_f32": "max_f32(w, max_f32(w, a, b), c)",
    "v_min3_f32": "min_f32(w, min_f32(w, a, b), c)",
    "v_med3_f32": "med3_f32(w, a, b, c)",
}.items():
    valu(name, "f32 f32 f32 f32", expression, VOP3)
valu("v_maximum3_f32", "f32 f32 f32 f32", "maximum(maximum(a, b), c)", VOP3, archs=CDNA4)
valu("v_minimum3_f32", "f32 f32 f32 f32", "minimum(minimum(a, b), c)", VOP3, archs=CDNA4)
valu("v_ldexp_f32", "f32 f32 i32", "ldexpf(a, b)", VOP3)

for name, expression in {
    "v_exp_f32": "(float)exp2((double)a)",
    "v_log_f32": "(float)log2((double)a)",
    "v_rcp_f32": "(float)(1.0 / a)",
    "v_rcp_iflag_f32": "(float)(1.0 / a)",
    "v_rsq_f32": "(float)(1.0 / sqrt((double)a))",
    "v_sqrt_f32": "sqrtf(a)",
    "v_floor_f32": "floorf(a)",
    "v_ceil_f32": "ceilf(a)",
    "v_trunc_f32": "truncf(a)",
    "v_rndne_f32": "rintf(a)",
    # Below 1 also where a - floor(a) rounds up to it.
    "v_fract_f32": "fminf(a - floorf(a), 0x1.fffffep-1f) + (isfinite(a) ? 0.0f : NAN)",
    "v_sin_f32": "(float)sin((double)a * 6.283185307179586)",  # the argument is in revolutions
    "v_cos_f32": "(float)cos((double)a * 6.283185307179586)",
    "v_frexp_mant_f32": "({ int e; isfinite(a) ? frexpf(a, &e) : a; })",
}.items():
    valu(name, "f32 f32", expression, VOP1)
valu("v_frexp_exp_i32_f32", "i32 f32", "({ int e = 0; if (isfinite(a)) frexpf(a, &e); e; })", VOP1)

# --- half precision ---
for name, expression in {
    "v_add_f16": "a + b",
    "v_sub_f16": "a - b",
    "v_subrev_f16": "b - a",
    "v_mul_f16": "a * b",
    "v_max_f16": "max_f32(w, a, b)",
    "v_min_f16": "min_f32(w, a, b)",
}.items():
    valu(name, "f16 f16 f16", expression, VOP2)
valu("v_ldexp_f16", "f16 f16 i16", "ldexpf(a, b)", VOP2)
for name, expression in {
    "v_exp_f16": "(float)exp2((double)a)",
    "v_log_f16": "(float)log2((double)a)",
    "v_rcp_f16": "1.0f / a",
    "v_rsq_f16": "(float)(1.0 / sqrt((double)a))",
    "v_sqrt_f16": "sqrtf(a)",
    "v_floor_f16": "floorf(a)",
    "v_ceil_f16": "ceilf(a)",
    "v_trunc_f16": "truncf(a)",
    "v_rndne_f16": "rintf(a)",
}.items():
    valu(name, "f16 f16", expression, VOP1)


def _fma_f16(shape: Shape) -> str:
    """One rounding: the product and sum are exact in double but for its own last bit."""
    from gcnemu.isa.table import emit_valu

    code = emit_valu(
        shape, "f16", ["f16", "f16", "f16"], "(float)fma((double)a, b, c)", keep_high=True
    )
    plain = "float d = (float)fma((double)a, b, c); "
    if "d *=" in code or "clamp01" in code:
        return code
    return code.replace(plain, "double d = fma((double)a, b, c); ").replace(
        "half(w, d)", "half_d(w, d)"
    )


add("v_fma_f16", "vector", VOP3, _fma_f16)
valu("v_max3_f16", "f16 f16 f16 f16", "max_f32(w, max_f32(w, a, b), c)", VOP3, keep_high=True)
valu("v_min3_f16", "f16 f16 f16 f16", "min_f32(w, min_f32(w, a, b), c)", VOP3, keep_high=True)
valu("v_med3_f16", "f16 f16 f16 f16", "med3_f32(w, a, b, c)", VOP3, keep_high=True)

# --- double precision ---
for name, expression in {
    "v_add_f64": "a + b",
    "v_mul_f64": "a * b",
    "v_max_f64": "isnan(a) ? b : isnan(b) ? a : a == 0 && b == 0 ? (signbit(a) ? b : a) : fmax(a, b)",
    "v_min_f64": "isnan(a) ? b : isnan(b) ? a : a == 0 && b == 0 ? (signbit(a) ? a : b) : fmin(a, b)",
}.items():
    valu(name, "f64 f64 f64", expression, VOP3)
valu("v_fma_f64", "f64 f64 f64 f64", "fma(a, b, c)", VOP3)
valu("v_fmac_f64", "f64 f64 f64 f64", "fma(a, b, c)", VOP2, accumulate=True)
valu("v_ldexp_f64", "f64 f64 i32", "ldexp(a, b)", VOP3)
for name, expression in {
    "v_rcp_f64": "1.0 / a",
    "v_rsq_f64": "1.0 / sqrt(a)",
    "v_sqrt_f64": "sqrt(a)",
    "v_floor_f64": "floor(a)",
    "v_ceil_f64": "ceil(a)",
    "v_trunc_f64": "trunc(a)",
    "v_rndne_f64": "rint(a)",
}.items():
    valu(name, "f64 f64", expression, VOP1)


# --- division (V_DIV_SCALE, V_DIV_FMAS, V_DIV_FIXUP) ---
def _div_scale(shape: Shape) -> str:
    """Scales numerator or denominator out of the denormal range; VCC marks what FMAS undoes."""
    d, sd = shape.vgpr(0), shape.sgpr(1)
    a, b, c = (shape.value(o, "f32") for o in shape.operands[2:5])
    return f"""u32 out[64]; u64 scaled = 0;
for (int l = 0; l < 64; l++) {{
  const float a = {a}, b = {b}, c = {c}; float d = a; int e, f;
  frexpf(b, &e); frexpf(c, &f);
  const double q = (double)c / b; const int den = a == b, flag_bit = 1;
  const int tiny_q = q != 0 && fabs(q) < 0x1p-126, tiny_r = fabs(1.0 / b) < 0x1p-126;
  int flag = 0;
  if (b == 0 || c == 0) d = NAN;
  else if (isnan(b) || isnan(c) || isinf(b) || isinf(c)) d = a;
  else if (f - e >= 96) {{ flag = flag_bit; if (den) d = ldexpf(a, 64); }}
  else if (fabsf(b) < 0x1p-126f) d = ldexpf(a, 64);
  else if (tiny_r && tiny_q) {{ flag = flag_bit; if (den) d = ldexpf(a, -64); }}
  else if (tiny_r) d = ldexpf(a, -64);
  else if (tiny_q) {{ flag = flag_bit; if (!den) d = ldexpf(a, 64); }}
  else if (f + 126 <= 23) d = ldexpf(a, 64);
  out[l] = U(d); if (flag && (ex >> l & 1)) scaled |= 1ull << l;
}}
put(w, {d}, out, ex); set64(w, {sd}, scaled); return NEXT;"""


add("v_div_scale_f32", "vector", VOP3, _div_scale)
valu(
    "v_div_fmas_f32",
    "f32 f32 f32 f32",
    "(VCC >> l & 1) ? ldexpf(fmaf(a, b, c), fabsf(c) >= 2.0f ? 64 : -64) : fmaf(a, b, c)",
    VOP3,
)
_FIXUP = (
    "({ u32 sign = (U(b) ^ U(c)) & 0x80000000u; float r;"
    " if (isnan(c)) r = quiet(c); else if (isnan(b)) r = quiet(b);"
    " else if ((b == 0 && c == 0) || (isinf(b) && isinf(c))) r = F(0xffc00000u);"
    " else if (b == 0 || isinf(c)) r = F(sign | 0x7f800000u);"
    " else if (isinf(b) || c == 0) r = F(sign);"
    " else if (ilogbf(c) - ilogbf(b) < -150) r = F(sign);"  # underflow
    " else if (isnan(a)) r = F(sign | 0x7f800000u);"  # the quotient overflowed on its way
    " else r = F((U(a) & 0x7fffffffu) | sign); r; })"
)
valu("v_div_fixup_f32", "f32 f32 f32 f32", _FIXUP, VOP3)
_NO_UNDERFLOW = _FIXUP.replace(" else if (ilogbf(c) - ilogbf(b) < -150) r = F(sign);", "")
valu("v_div_fixup_f16", "f16 f16 f16 f16", _NO_UNDERFLOW, VOP3, keep_high=True)


# --- V_FMA_MIX: each source f32, or a half of a register as f16 ---
def _fma_mix(shape: Shape) -> str:
    name = shape.ins.opcode
    d = shape.vgpr(0)
    wide, low = shape.vector("op_sel_hi", 3, 0), shape.vector("op_sel", 3, 0)
    neg, absolute = shape.vector("neg_lo", 3, 0), shape.vector("neg_hi", 3, 0)
    body = ""
    for k, operand in enumerate(shape.operands[1:4]):
        if neg[k]:
            operand.negated = not operand.negated
        operand.absolute |= bool(absolute[k])
        value = shape.value(operand, "f16" if wide[k] else "f32", half=low[k])
        body += f"const float {'abc'[k]} = {value}; "
    if name == "v_fma_mix_f32":
        body += "float d = fmaf(a, b, c); " + ("d = clamp01(d); " if shape.flag("clamp") else "")
        bits = "U(d)"
    else:
        body += "double d = fma((double)a, b, c); " + (
            "d = clamp01d(d); " if shape.flag("clamp") else ""
        )
        high = name == "v_fma_mixhi_f16"
        bits = f"(w->v[{d}][l] & {0xFFFF if high else 0xFFFF0000:#x}u) | half_d(w, d) << {16 if high else 0}"
    if len(shape.operands) != 4:
        raise Unsupported("operands")
    return f"u32 out[64]; for (int l = 0; l < 64; l++) {{ {body}out[l] = {bits}; }} put(w, {d}, out, ex); return NEXT;"


add("v_fma_mix_f32 v_fma_mixlo_f16 v_fma_mixhi_f16", "vector", "VOP3P Instructions", _fma_mix)
