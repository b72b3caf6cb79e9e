/* State of a wave and of its workgroup, and the helpers that instruction bodies call.
 *
 * An emulated program is an array of `Ins`: a function per instruction *shape* (opcode, operand
 * kinds, modifiers) and the operands' register numbers and constants. Shapes are compiled by gcc
 * from bodies that isa/ writes; everything heavy (memory checks, MFMA) lives in run.c, compiled once.
 */
#ifndef GCN_H
#define GCN_H
#include <math.h>
#include <stdint.h>
#include <string.h>

/* One prefix for the symbols that the dynamic linker sees. */
#define report gcn_report
#define global_read gcn_global_read
#define global_write gcn_global_write
#define global_atomic gcn_global_atomic
#define lds_read gcn_lds_read
#define lds_write gcn_lds_write
#define lds_atomic gcn_lds_atomic
#define scratch_at gcn_scratch_at
#define pending gcn_pending
#define landed gcn_landed
#define wait_vm gcn_wait_vm
#define wait_lgkm gcn_wait_lgkm
#define count_only gcn_count_only
#define mfma gcn_mfma
#define mfma_i8 gcn_mfma_i8
#define small_float gcn_small_float
#define to_small_float gcn_to_small_float
#define prepare gcn_prepare
#define roll_back gcn_roll_back
#define free_journal gcn_free_journal
#define launch gcn_launch
#define single gcn_single
#define sizes gcn_sizes

typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
typedef int8_t i8; typedef int16_t i16; typedef int32_t i32; typedef int64_t i64;

enum { LANES = 64, VGPRS = 512 /* 256 architectural, then 256 accumulation */, SGPRS = 128 };
enum { S_VCC = 106, S_M0 = 124, S_EXEC = 126 };

/* What an instruction returns: go on, or why the wave stops. */
enum { NEXT = 0, AT_BARRIER = 1, ENDED = 2, TRAPPED = -1, LOST = -2 };

/* Kinds of finding; checks.py names and explains them. */
enum {
  GLOBAL_OUTSIDE = 1, LDS_OUTSIDE = 2, LDS_RACE = 3, SCRATCH_OUTSIDE = 4, GLOBAL_READ_ONLY = 5,
  BUFFER_READ_ZERO = 6, BUFFER_WRITE_DROPPED = 7, BAD_RESOURCE = 8, DMA_WITHOUT_WAIT = 9,
};

/* Run options. */
enum { LATE = 1 /* loads land when s_waitcnt says so */, RACES = 2, JOURNAL = 4 };

typedef struct Wave Wave;
typedef struct Ins Ins;
struct Ins { int (*fn)(Wave *, const Ins *); u32 r[8]; u64 x[8]; };

typedef struct { u64 lo, hi; u32 id, read_only; } Range;
typedef struct { u32 kind, pc, wave, lane; u64 address; u32 size, group[3]; u64 count; } Finding;
/* Who touched a byte of LDS since the last barrier: wave + 1, 0 for nobody, 255 for several. */
typedef struct { u32 epoch; u8 writer, reader, atomic; } Shadow;
typedef struct { u64 address; u32 size; u8 old[16]; } Write;

/* A memory operation whose data has not landed. */
enum { P_NOTHING = 0, P_VGPR = 1, P_LDS = 2, P_SGPR = 3 };
enum { F_DWORDS = 0, F_U8, F_I8, F_U16, F_I16, F_D16, F_D16_HI, F_D16_I8, F_D16_I8_HI };
typedef struct { u8 target, form; u16 size; u32 dst, pc; u64 lanes; u32 lds_lo, lds_hi, lds[LANES]; u8 data[LANES][16]; } Pending;
typedef struct { u32 head, n; Pending p[64]; } Queue;

typedef struct {
  u8 *lds; u32 lds_size; u32 epoch; Shadow *shadow;
  Range *ranges; u32 n_ranges, last_range;
  Finding *findings; u32 n_findings, max_findings;
  Write *writes; u64 n_writes, max_writes;
  u32 options, poison; u64 clock; u32 id[3]; u32 ieee;
  u64 budget; /* instructions of one workgroup; beyond it the run is given up */
  Wave *waves; u32 n_waves, n_dma;
} Group;

struct Wave {
  u32 v[VGPRS][LANES];
  u32 s[SGPRS];
  u32 scc, pc, id, lanes;
  u32 overflow; /* MODE.FP16_OVFL: too large a half or 8-bit float becomes the largest finite one */
  u8 *scratch; u32 scratch_size;
  Group *g;
  Queue vm, lgkm;
};

#define EXEC (*(u64 *)&w->s[S_EXEC])
#define VCC (*(u64 *)&w->s[S_VCC])
#define PC (w->pc - 1)

/* ---- run.c ---- */
void report(Wave *w, u32 kind, u32 lane, u64 address, u32 size);
int global_read(Wave *w, u32 lane, u64 address, void *to, u32 size);
int global_write(Wave *w, u32 lane, u64 address, const void *from, u32 size);
void *global_atomic(Wave *w, u32 lane, u64 address, u32 size);
void lds_read(Wave *w, u32 lane, u32 address, void *to, u32 size);
void lds_write(Wave *w, u32 lane, u32 address, const void *from, u32 size);
void *lds_atomic(Wave *w, u32 lane, u32 address, u32 size);
void *scratch_at(Wave *w, u32 lane, i64 offset, u32 size);
Pending *pending(Wave *w, Queue *q, u32 target, u32 form, u32 dst, u32 size);
void landed(Wave *w, Queue *q, Pending *p);
void wait_vm(Wave *w, u32 keep);
void wait_lgkm(Wave *w, u32 keep);
void count_only(Wave *w, Queue *q);
void mfma(Wave *w, u32 m, u32 k, u32 blocks, u32 fmt_a, u32 fmt_b, u32 d, u32 a, u32 b, const u32 *c,
          u32 layout, const u32 *scale_a, const u32 *scale_b, u32 byte_a, u32 byte_b);
void mfma_i8(Wave *w, u32 m, u32 k, u32 blocks, u32 d, u32 a, u32 b, const u32 *c);

/* ---- bits ---- */
static inline float F(u32 x) { float f; memcpy(&f, &x, 4); return f; }
static inline u32 U(float f) { u32 x; memcpy(&x, &f, 4); return x; }
static inline double D(u64 x) { double f; memcpy(&f, &x, 8); return f; }
static inline u64 UD(double f) { u64 x; memcpy(&x, &f, 8); return x; }
static inline u32 s32(Wave *w, u32 r) { return w->s[r]; }
static inline u64 s64(Wave *w, u32 r) { u64 x; memcpy(&x, &w->s[r], 8); return x; }
static inline void set64(Wave *w, u32 r, u64 x) { memcpy(&w->s[r], &x, 8); }
static inline u64 v64(Wave *w, u32 r, int l) { return w->v[r][l] | (u64)w->v[r + 1][l] << 32; }
static inline u32 reverse32(u32 x) { u32 r = 0; for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i); return r; }
static inline u64 reverse64(u64 x) { return (u64)reverse32((u32)x) << 32 | reverse32((u32)(x >> 32)); }
static inline u32 bfe_u(u32 a, u32 at, u32 n) { at &= 31; n &= 31; return n ? a >> at & ((1u << n) - 1) : 0; }
static inline u32 bfe_i(u32 a, u32 at, u32 n) { /* sign of the field's top bit, or of a's if cut off */
  at &= 31; n &= 31; if (!n) return 0;
  if (at + n >= 32) return (u32)((i32)a >> at);
  return (u32)((i32)(a << (32 - at - n)) >> (32 - n)); }

/* ---- half precision: round to nearest even, subnormals kept ---- */
static inline float h2f(u32 h) {
  u32 s = (h & 0x8000u) << 16, e = h >> 10 & 31, m = h & 0x3ff;
  if (e == 31) return F(s | 0x7f800000u | m << 13);
  if (e) return F(s | (e + 112) << 23 | m << 13);
  float f = (float)m * 5.9604644775390625e-8f; return F(U(f) | s); }
static inline u32 f2h(float f) {
  u32 x = U(f), s = x >> 16 & 0x8000u, a = x & 0x7fffffffu;
  if (a > 0x7f800000u) return s | 0x7e00u | (a >> 13 & 0x1ff);
  if (a >= 0x477ff000u) return s | 0x7c00u;                        /* from 65520 on: infinity */
  if (a < 0x38800000u) return s | (u32)rintf(F(a) * 16777216.0f);   /* subnormal: units of 2^-24 */
  a += 0xfffu + (a >> 13 & 1); return s | ((a - 0x38000000u) >> 13); }
static inline u32 f2h_rtz(float f) {
  u32 x = U(f), s = x >> 16 & 0x8000u, a = x & 0x7fffffffu;
  if (a > 0x7f800000u) return s | 0x7e00u | (a >> 13 & 0x1ff);
  if (a == 0x7f800000u) return s | 0x7c00u;
  if (a >= 0x47800000u) return s | 0x7bffu;
  if (a < 0x38800000u) return s | (u32)truncf(F(a) * 16777216.0f);
  return s | ((a - 0x38000000u) >> 13); }
static inline u32 d2h(double d) { /* one rounding from double: by way of a float rounded to odd */
  float f = (float)d; u32 x = U(f);
  if (!isnan(d) && !isinf(f) && (double)f != d) {
    if (fabs((double)f) > fabs(d)) x--;   /* truncated */
    x |= 1; }
  return f2h(F(x)); }
/* Results of half-precision instructions: FP16_OVFL clamps overflow, but not infinite operands. */
static inline u32 half(Wave *w, float f) {
  u32 h = f2h(f); return w->overflow && (h & 0x7fff) == 0x7c00 && isfinite(f) ? h - 1 : h; }
static inline u32 half_d(Wave *w, double d) {
  u32 h = d2h(d); return w->overflow && (h & 0x7fff) == 0x7c00 && isfinite(d) ? h - 1 : h; }
static inline float b2f(u32 b) { return F(b << 16); }
static inline u32 f2b(float f) {
  u32 x = U(f); if ((x & 0x7fffffffu) > 0x7f800000u) return x >> 16 | 0x40;
  return (x + 0x7fff + (x >> 16 & 1)) >> 16; }

/* ---- 8-, 6- and 4-bit floats ---- */
enum { FMT_F32, FMT_F16, FMT_BF16, FMT_FP8, FMT_BF8, FMT_FP8_FNUZ, FMT_BF8_FNUZ, FMT_FP6, FMT_BF6, FMT_FP4 };
float small_float(u32 code, u32 fmt);
u32 to_small_float(float f, u32 fmt, int saturate);
static inline float e8m0(u32 e) { return e == 255 ? NAN : ldexpf(1.0f, (int)e - 127); }

/* ---- arithmetic with AMD's corner cases ---- */
static inline float quiet(float a) { return F(U(a) | 0x400000u); }
static inline int signalling(float a) { return isnan(a) && !(U(a) & 0x400000u); }
static inline float max_f32(Wave *w, float a, float b) {
  if (w->g->ieee && signalling(a)) return quiet(a);
  if (w->g->ieee && signalling(b)) return quiet(b);
  if (isnan(a)) return b; if (isnan(b)) return a;
  if (a == 0 && b == 0) return signbit(a) ? b : a;
  return a > b ? a : b; }
static inline float min_f32(Wave *w, float a, float b) {
  if (w->g->ieee && signalling(a)) return quiet(a);
  if (w->g->ieee && signalling(b)) return quiet(b);
  if (isnan(a)) return b; if (isnan(b)) return a;
  if (a == 0 && b == 0) return signbit(a) ? a : b;
  return a < b ? a : b; }
static inline float maximum(float a, float b) { /* IEEE 754-2019: NaN wins */
  if (isnan(a)) return quiet(a); if (isnan(b)) return quiet(b);
  if (a == 0 && b == 0) return signbit(a) ? b : a;
  return a > b ? a : b; }
static inline float minimum(float a, float b) {
  if (isnan(a)) return quiet(a); if (isnan(b)) return quiet(b);
  if (a == 0 && b == 0) return signbit(a) ? a : b;
  return a < b ? a : b; }
static inline float med3_f32(Wave *w, float a, float b, float c) {
  if (isnan(a) || isnan(b) || isnan(c)) return min_f32(w, min_f32(w, a, b), c);
  float top = max_f32(w, max_f32(w, a, b), c);
  if (top == a) return max_f32(w, b, c);
  if (top == b) return max_f32(w, a, c);
  return max_f32(w, a, b); }
static inline float clamp01(float x) { return isnan(x) ? 0.0f : x <= 0 ? 0.0f : x > 1 ? 1.0f : x; } /* DX10_CLAMP */
static inline double clamp01d(double x) { return isnan(x) ? 0.0 : x <= 0 ? 0.0 : x > 1 ? 1.0 : x; }
static inline u32 f2i(double f) { /* toward zero, saturating, NaN to 0 */
  if (isnan(f)) return 0; if (f >= 2147483647.0) return 0x7fffffffu; if (f <= -2147483648.0) return 0x80000000u;
  return (u32)(i32)f; }
static inline u32 f2u(double f) {
  if (isnan(f) || f <= 0) return 0; if (f >= 4294967295.0) return 0xffffffffu; return (u32)f; }
static inline u32 class_f32(u32 x) { u32 e = x >> 23 & 255, m = x & 0x7fffff, s = x >> 31;
  if (e == 255) return m ? (m >> 22 ? 2 : 1) : s ? 4 : 512;
  return e == 0 ? (m ? (s ? 16 : 128) : s ? 32 : 64) : s ? 8 : 256; }
static inline u32 class_f16(u32 x) { u32 e = x >> 10 & 31, m = x & 0x3ff, s = x >> 15 & 1;
  if (e == 31) return m ? (m >> 9 ? 2 : 1) : s ? 4 : 512;
  return e == 0 ? (m ? (s ? 16 : 128) : s ? 32 : 64) : s ? 8 : 256; }
static inline u32 class_f64(u64 x) { u64 e = x >> 52 & 2047, m = x << 12 >> 12, s = x >> 63;
  if (e == 2047) return m ? (m >> 51 ? 2 : 1) : s ? 4 : 512;
  return e == 0 ? (m ? (s ? 16 : 128) : s ? 32 : 64) : s ? 8 : 256; }
static inline u32 perm(u32 a, u32 b, u32 sel) { /* V_PERM_B32: a holds bytes 7..4, b bytes 3..0 */
  u64 d = (u64)a << 32 | b; u32 r = 0;
  for (int i = 0; i < 4; i++) { u32 k = sel >> (8 * i) & 255, x;
    if (k < 8) x = d >> (8 * k) & 255;
    else if (k < 12) x = d >> ((k - 8) * 16 + 15) & 1 ? 255 : 0;
    else x = k == 12 ? 0 : 255;
    r |= x << (8 * i); }
  return r; }
static inline u32 bitop3(u32 a, u32 b, u32 c, u32 table) { u32 r = 0;
  for (u32 i = 0; i < 8; i++) if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r; }

/* ---- lanes ---- */
static inline void put(Wave *w, u32 r, const u32 *from, u64 lanes) {
  if (lanes == ~0ull) { memcpy(w->v[r], from, sizeof w->v[r]); return; }
  for (int l = 0; l < LANES; l++) if (lanes >> l & 1) w->v[r][l] = from[l]; }
/* Source lane of a DPP control, -1 where there is none. */
enum { DPP_QUAD, DPP_ROW_SHL, DPP_ROW_SHR, DPP_ROW_ROR, DPP_WAVE_SHL, DPP_WAVE_ROL, DPP_WAVE_SHR, DPP_WAVE_ROR,
       DPP_MIRROR, DPP_HALF_MIRROR, DPP_BCAST15, DPP_BCAST31, DPP_NEWBCAST };
static inline int dpp_source(u32 control, u32 arg, int l) {
  int row = l & ~15, at = l & 15, n = (int)arg;
  switch (control) {
    case DPP_QUAD: return (l & ~3) | (arg >> (2 * (l & 3)) & 3);
    case DPP_ROW_SHL: return at + n > 15 ? -1 : row | (at + n);
    case DPP_ROW_SHR: return at - n < 0 ? -1 : row | (at - n);
    case DPP_ROW_ROR: return row | ((at - n) & 15);
    case DPP_WAVE_SHL: return l == 63 ? -1 : l + 1;
    case DPP_WAVE_ROL: return (l + 1) & 63;
    case DPP_WAVE_SHR: return l - 1;
    case DPP_WAVE_ROR: return (l - 1) & 63;
    case DPP_MIRROR: return row | (15 - at);
    case DPP_HALF_MIRROR: return (l & ~7) | (7 - (l & 7));
    case DPP_BCAST15: return l < 16 ? -1 : row - 1;
    case DPP_BCAST31: return l < 32 ? -1 : 31;
    case DPP_NEWBCAST: return row | n;
  }
  return -1; }

/* ---- buffer resources (V#, ISA "Buffer Resource Descriptor") ---- */
typedef struct { u64 base; u32 stride, records; } Resource;
static inline Resource resource(Wave *w, u32 s) {
  Resource r = {(u64)w->s[s] | (u64)(w->s[s + 1] & 0xffff) << 32, w->s[s + 1] >> 16 & 0x3fff, w->s[s + 2]};
  if (w->s[s + 1] >> 31 || w->s[s + 3] >> 23 & 1) report(w, BAD_RESOURCE, 0, r.base, 0); /* swizzle, add_tid */
  return r; }
/* Is the element at byte `offset` (index `index`) inside? Raw buffers: bytes; structured: records. */
static inline int in_range(const Resource *r, u32 offset, u32 index, u32 soffset, u32 size, int idxen) {
  if (r->stride && idxen) return index < r->records;
  return (u64)offset + soffset + size <= r->records; }
#endif
