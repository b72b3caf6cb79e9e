/* Memory with its checks, formats, matrix instructions and the scheduler. Compiled once. */
#include "gcn.h"
#include <stdlib.h>

/* ---- findings: one record per (kind, instruction), with a count ---- */
void report(Wave *w, u32 kind, u32 lane, u64 address, u32 size) {
  Group *g = w->g;
  u32 pc = PC;
  for (u32 i = 0; i < g->n_findings; i++)
    if (g->findings[i].kind == kind && g->findings[i].pc == pc) { g->findings[i].count++; return; }
  if (g->n_findings >= g->max_findings) return;
  Finding *f = &g->findings[g->n_findings++];
  *f = (Finding){kind, pc, w->id, lane, address, size, {g->id[0], g->id[1], g->id[2]}, 1};
}

/* ---- global memory: every access must lie inside one live tensor ---- */
static int allowed(Wave *w, u32 lane, u64 a, u32 n, int write) {
  Group *g = w->g;
  Range *r = &g->ranges[g->last_range];
  if (g->n_ranges && a >= r->lo && a + n <= r->hi && !(write && r->read_only)) return 1;
  i32 lo = 0, hi = (i32)g->n_ranges - 1;
  while (lo <= hi) {
    i32 mid = (lo + hi) / 2; r = &g->ranges[mid];
    if (a < r->lo) hi = mid - 1;
    else if (a >= r->hi) lo = mid + 1;
    else {
      if (a + n > r->hi) break;
      if (write && r->read_only) { report(w, GLOBAL_READ_ONLY, lane, a, n); return 0; }
      g->last_range = mid; return 1;
    }
  }
  report(w, GLOBAL_OUTSIDE, lane, a, n); return 0;
}

static void journal(Wave *w, u64 a, u32 n) {
  Group *g = w->g;
  if (!(g->options & JOURNAL)) return;
  if (g->n_writes == g->max_writes) {
    g->max_writes = g->max_writes ? 2 * g->max_writes : 4096;
    g->writes = realloc(g->writes, g->max_writes * sizeof(Write));
  }
  Write *x = &g->writes[g->n_writes++]; x->address = a; x->size = n; memcpy(x->old, (void *)a, n);
}

int global_read(Wave *w, u32 lane, u64 a, void *to, u32 n) {
  if (allowed(w, lane, a, n, 0)) { memcpy(to, (void *)a, n); return 1; }
  for (u32 i = 0; i < n; i += 4) memcpy((u8 *)to + i, &w->g->poison, n - i < 4 ? n - i : 4);
  return 0; }
int global_write(Wave *w, u32 lane, u64 a, const void *from, u32 n) {
  if (!allowed(w, lane, a, n, 1)) return 0;
  journal(w, a, n); memcpy((void *)a, from, n); return 1; }
void *global_atomic(Wave *w, u32 lane, u64 a, u32 n) {
  if (!allowed(w, lane, a, n, 1)) return 0;
  journal(w, a, n); return (void *)a; }
void roll_back(Group *g) { /* undo every journalled store, latest first */
  for (u64 i = g->n_writes; i-- > 0;) memcpy((void *)g->writes[i].address, g->writes[i].old, g->writes[i].size); }
void free_journal(Group *g) { free(g->writes); g->writes = 0; g->n_writes = g->max_writes = 0; }

/* ---- LDS ---- */
static int lds_inside(Wave *w, u32 lane, u32 a, u32 n) {
  if ((u64)a + n <= w->g->lds_size) return 1;
  report(w, LDS_OUTSIDE, lane, a, n); return 0; }
/* A race: two waves touch the same bytes between two barriers, one of them writing something else. */
static void touch(Wave *w, u32 lane, u32 a, u32 n, int write, int atomic, const u8 *data) {
  Group *g = w->g;
  if (!(g->options & RACES)) return;
  u8 me = w->id + 1;
  for (u32 i = a; i < a + n; i++) {
    Shadow *s = &g->shadow[i];
    if (s->epoch != g->epoch) *s = (Shadow){g->epoch, 0, 0, 0};
    int other_wrote = s->writer && s->writer != me && !(atomic && s->atomic);
    int other_read = s->reader && s->reader != me && !(atomic && s->atomic);
    if (write) { /* writing what is there already is harmless: compilers store replicated values */
      int same = data && g->lds[i] == data[i - a];
      if ((other_wrote || other_read) && !same) report(w, LDS_RACE, lane, a, n);
      s->writer = s->writer && s->writer != me ? 255 : me;
      s->atomic = atomic;
    } else if (other_wrote) report(w, LDS_RACE, lane, a, n);
    if (!write || atomic) s->reader = s->reader && s->reader != me ? 255 : me;
  }
}
/* Reading where an LDS-DMA, of any wave, has not landed. */
static void early(Wave *w, u32 lane, u32 a, u32 n) {
  for (u32 k = 0; k < w->g->n_waves; k++) {
    Queue *q = &w->g->waves[k].vm;
    for (u32 i = 0; i < q->n; i++) {
      Pending *p = &q->p[(q->head + i) & 63];
      if (p->target != P_LDS || a >= p->lds_hi || a + n <= p->lds_lo) continue;
      for (int l = 0; l < LANES; l++)
        if (p->lanes >> l & 1 && p->lds[l] < a + n && a < p->lds[l] + p->size) {
          report(w, DMA_WITHOUT_WAIT, lane, a, n); return; }
    } }
}
void lds_read(Wave *w, u32 lane, u32 a, void *to, u32 n) {
  if (!lds_inside(w, lane, a, n)) { memset(to, 0, n); return; }
  if (w->g->n_dma) early(w, lane, a, n);
  touch(w, lane, a, n, 0, 0, 0); memcpy(to, w->g->lds + a, n); }
void lds_write(Wave *w, u32 lane, u32 a, const void *from, u32 n) {
  if (!lds_inside(w, lane, a, n)) return;
  touch(w, lane, a, n, 1, 0, from); memcpy(w->g->lds + a, from, n); }
void *lds_atomic(Wave *w, u32 lane, u32 a, u32 n) {
  if (!lds_inside(w, lane, a, n)) return 0;
  touch(w, lane, a, n, 1, 1, 0); return w->g->lds + a; }

void *scratch_at(Wave *w, u32 lane, i64 offset, u32 n) {
  static u8 nowhere[16];
  if (offset < 0 || (u64)offset + n > w->scratch_size) { report(w, SCRATCH_OUTSIDE, lane, (u64)offset, n); return nowhere; }
  return w->scratch + (u64)lane * w->scratch_size + offset; }

/* ---- data that lands later (ISA "Data dependency resolution": VM_CNT, LGKM_CNT) ---- */
static void land(Wave *w, Pending *p) {
  if (p->target == P_LDS) {
    u32 pc = w->pc; w->pc = p->pc + 1;
    for (int l = 0; l < LANES; l++) if (p->lanes >> l & 1) lds_write(w, l, p->lds[l], p->data[l], p->size);
    w->pc = pc; w->g->n_dma--;
  } else if (p->target == P_SGPR) memcpy(&w->s[p->dst], p->data, p->size);
  else if (p->target == P_VGPR) for (int l = 0; l < LANES; l++) {
    if (!(p->lanes >> l & 1)) continue;
    const u8 *d = p->data[l]; u32 *v = &w->v[p->dst][l]; u16 h; memcpy(&h, d, 2);
    switch (p->form) {
      case F_DWORDS: for (u32 i = 0; i < p->size / 4; i++) memcpy(&w->v[p->dst + i][l], d + 4 * i, 4); break;
      case F_U8: *v = *d; break;
      case F_I8: *v = (u32)(i32)(i8)*d; break;
      case F_U16: *v = h; break;
      case F_I16: *v = (u32)(i32)(i16)h; break;
      case F_D16: *v = (*v & 0xffff0000u) | (p->size == 1 ? *d : h); break;
      case F_D16_HI: *v = (*v & 0xffffu) | (u32)(p->size == 1 ? *d : h) << 16; break;
      case F_D16_I8: *v = (*v & 0xffff0000u) | (u16)(i16)(i8)*d; break;
      case F_D16_I8_HI: *v = (*v & 0xffffu) | (u32)(u16)(i16)(i8)*d << 16; break;
    }
  }
}
static void wait_for(Wave *w, Queue *q, u32 keep) {
  while (q->n > keep) { Pending *p = &q->p[q->head & 63]; land(w, p); q->head++; q->n--; } }
void wait_vm(Wave *w, u32 keep) { wait_for(w, &w->vm, keep); }
void wait_lgkm(Wave *w, u32 keep) { /* scalar loads return out of order: only 0 waits for them */
  if (keep) for (u32 i = 0; i < w->lgkm.n; i++) if (w->lgkm.p[(w->lgkm.head + i) & 63].target == P_SGPR) return;
  wait_for(w, &w->lgkm, keep); }
Pending *pending(Wave *w, Queue *q, u32 target, u32 form, u32 dst, u32 size) {
  if (q->n >= 63) wait_for(w, q, 62);
  Pending *p = &q->p[(q->head + q->n) & 63];
  p->target = target; p->form = form; p->size = size; p->dst = dst; p->lanes = 0; p->pc = PC; q->n++;
  return p; }
void count_only(Wave *w, Queue *q) { pending(w, q, P_NOTHING, 0, 0, 0); }
/* Call when a Pending is filled in. Until it lands, its registers hold the poison. */
void landed(Wave *w, Queue *q, Pending *p) {
  if (p->target == P_LDS) {
    w->g->n_dma++; p->lds_lo = ~0u; p->lds_hi = 0;
    for (int l = 0; l < LANES; l++) if (p->lanes >> l & 1) {
      if (p->lds[l] < p->lds_lo) p->lds_lo = p->lds[l];
      if (p->lds[l] + p->size > p->lds_hi) p->lds_hi = p->lds[l] + p->size; } }
  if (!(w->g->options & LATE)) { wait_for(w, q, 0); return; }
  u32 poison = w->g->poison;
  if (p->target == P_SGPR) for (u32 i = 0; i < p->size / 4u; i++) w->s[p->dst + i] = poison;
  if (p->target == P_VGPR) for (int l = 0; l < LANES; l++) if (p->lanes >> l & 1) {
    if (p->form == F_DWORDS) for (u32 i = 0; i < p->size / 4u; i++) w->v[p->dst + i][l] = poison;
    else if (p->form == F_D16 || p->form == F_D16_I8) w->v[p->dst][l] = (w->v[p->dst][l] & 0xffff0000u) | (poison & 0xffff);
    else if (p->form == F_D16_HI || p->form == F_D16_I8_HI) w->v[p->dst][l] = (w->v[p->dst][l] & 0xffff) | (poison & 0xffff0000u);
    else w->v[p->dst][l] = poison; } }

/* ---- small floats ---- */
/* Exponent bits, mantissa bits, bias, kind: 0 all codes finite, 1 one NaN magnitude (e4m3fn),
 * 2 IEEE infinities and NaN (e5m2), 3 NaN is 0x80 and there is no -0 (fnuz). */
static const struct { u32 e, m; int bias; u32 kind; } FORMATS[] = {
  [FMT_FP8] = {4, 3, 7, 1}, [FMT_BF8] = {5, 2, 15, 2}, [FMT_FP8_FNUZ] = {4, 3, 8, 3}, [FMT_BF8_FNUZ] = {5, 2, 16, 3},
  [FMT_FP6] = {2, 3, 1, 0}, [FMT_BF6] = {3, 2, 3, 0}, [FMT_FP4] = {2, 1, 1, 0} };
static float decode(u32 code, u32 fmt) {
  u32 e = FORMATS[fmt].e, m = FORMATS[fmt].m, kind = FORMATS[fmt].kind;
  u32 sign = code >> (e + m) & 1, exp = code >> m & ((1u << e) - 1), man = code & ((1u << m) - 1), top = (1u << e) - 1;
  if (kind == 3 && sign && !exp && !man) return NAN;
  if (kind == 1 && exp == top && man == (1u << m) - 1) return NAN;
  if (kind == 2 && exp == top) return man ? NAN : sign ? -INFINITY : INFINITY;
  float f = exp ? ldexpf((float)((1u << m) + man), (int)exp - FORMATS[fmt].bias - (int)m)
                : ldexpf((float)man, 1 - FORMATS[fmt].bias - (int)m);
  return sign ? -f : f; }
static float TABLE[FMT_FP4 + 1][256];
void prepare(void) {
  for (u32 f = FMT_FP8; f <= FMT_FP4; f++) {
    u32 codes = 1u << (1 + FORMATS[f].e + FORMATS[f].m);
    for (u32 c = 0; c < codes; c++) TABLE[f][c] = decode(c, f); } }
float small_float(u32 code, u32 fmt) { return TABLE[fmt][code]; }
/* Round to nearest even; too large: the largest value if saturating, else NaN or infinity. */
u32 to_small_float(float f, u32 fmt, int saturate) {
  u32 kind = FORMATS[fmt].kind, bits = FORMATS[fmt].e + FORMATS[fmt].m, sign = (U(f) >> 31) << bits;
  u32 top = (1u << bits) - 1; /* all ones of the magnitude */
  u32 largest = kind == 1 ? top - 1 : kind == 2 ? top - (1u << FORMATS[fmt].m) : top;
  u32 nan = kind == 3 ? 1u << bits : kind == 0 ? sign | largest : sign | top;
  u32 over = saturate || kind == 0 ? sign | largest : kind == 2 ? sign | (largest + 1) : nan;
  if (isnan(f)) return nan;
  if (isinf(f)) return kind == 2 && !saturate ? sign | (largest + 1) : over;
  /* units of the last place: exact in double */
  double a = fabs((double)f); int e; frexp(a, &e);
  int least = 1 - FORMATS[fmt].bias; /* exponent of the smallest normal number */
  int exponent = a == 0 || e - 1 < least ? least : e - 1;
  double units = rint(ldexp(a, (int)FORMATS[fmt].m - exponent));
  u32 code = ((u32)(exponent - least) << FORMATS[fmt].m) + (u32)units; /* a carry moves into the exponent */
  if (exponent - least > 64 || code > largest) return over;
  if (kind == 3 && code == 0) return 0;
  return sign | code; }

/* ---- matrix instructions (ISA "Matrix Arithmetic Instructions") ----
 * Lane l holds, of A, row l % m and the group's share of k, group l / m (within a block); of B
 * likewise with column for row. Register r of D in lane l is row (l / 16) * 4 + r for 16x16, row
 * 8 * (r / 4) + 4 * (l / 32) + r % 4 for 32x32, row r (of 4) for 4x4; column l % m. */
static float element(const u8 *p, u32 k, u32 fmt) {
  u32 x = 0; u16 h;
  switch (fmt) {
    case FMT_F32: memcpy(&x, p + 4 * k, 4); return F(x);
    case FMT_F16: memcpy(&h, p + 2 * k, 2); return h2f(h);
    case FMT_BF16: memcpy(&h, p + 2 * k, 2); return b2f(h);
    case FMT_FP4: return TABLE[fmt][p[k / 2] >> 4 * (k & 1) & 15];
    case FMT_FP6: case FMT_BF6: { u32 bit = 6 * k; x = (p[bit / 8] | (u32)p[bit / 8 + 1] << 8) >> bit % 8; return TABLE[fmt][x & 63]; }
    default: return TABLE[fmt][p[k]];
  } }
static const u32 BITS[] = {32, 16, 16, 8, 8, 8, 8, 6, 6, 4};
static u32 row_of(u32 m, u32 r, u32 l) { return m == 16 ? l / 16 * 4 + r : m == 32 ? 8 * (r / 4) + 4 * (l / 32) + r % 4 : r; }

/* Unpack one operand into x[block][row][k]. Layout 1 (f8f6f4 with 8-bit data): a lane's first 16
 * values are k = 16 g.., the others k/2 + 16 g... */
static void unpack(Wave *w, u32 m, u32 k, u32 blocks, u32 fmt, u32 reg, u32 split, float *x) {
  u32 groups = LANES / (m * blocks), share = k / groups, dwords = (share * BITS[fmt] + 31) / 32;
  for (u32 l = 0; l < LANES; l++) {
    u8 raw[40] = {0};
    for (u32 i = 0; i < dwords; i++) memcpy(raw + 4 * i, &w->v[reg + i][l], 4);
    u32 row = l % m, block = l / m % blocks, group = l / (m * blocks);
    for (u32 i = 0; i < share; i++) {
      u32 at = group * share + i;
      if (split) at = i < 16 ? group * 16 + i : k / 2 + group * 16 + i - 16;
      x[(block * m + row) * k + at] = element(raw, i, fmt);
    } } }
void mfma(Wave *w, u32 m, u32 k, u32 blocks, u32 fmt_a, u32 fmt_b, u32 d, u32 a, u32 b, const u32 *c,
          u32 layout, const u32 *scale_a, const u32 *scale_b, u32 byte_a, u32 byte_b) {
  static __thread float A[64 * 128], B[64 * 128]; static __thread u32 out[32][LANES];
  float sa[LANES][4], sb[LANES][4];
  unpack(w, m, k, blocks, fmt_a, a, layout & 1, A); unpack(w, m, k, blocks, fmt_b, b, layout & 2, B);
  if (scale_a) for (u32 l = 0; l < LANES; l++) { /* lane l scales row l % m, k-block l / m */
    sa[l % m][l / m] = e8m0(scale_a[l] >> 8 * byte_a & 255);
    sb[l % m][l / m] = e8m0(scale_b[l] >> 8 * byte_b & 255); }
  u32 per_block = m * m / LANES ? m * m / LANES : 1, lanes_per_block = m == 4 ? 4 : LANES;
  for (u32 block = 0; block < blocks; block++)
    for (u32 r = 0; r < (m == 4 ? 4 : per_block); r++)
      for (u32 l = 0; l < lanes_per_block; l++) {
        u32 lane = m == 4 ? block * 4 + l : l, reg = m == 4 ? r : block * per_block + r;
        u32 i = row_of(m, r, lane), j = lane % m;
        const float *x = A + (block * m + i) * k, *y = B + (block * m + j) * k;
        double sum = 0;
        if (scale_a) for (u32 q = 0; q < k / 32; q++) {
          double part = 0;
          for (u32 n = 0; n < 32; n++) part += (double)x[q * 32 + n] * y[q * 32 + n];
          sum += part * sa[i][q] * sb[j][q]; }
        else for (u32 n = 0; n < k; n++) sum += (double)x[n] * y[n];
        out[reg][lane] = U((float)(sum + (double)F(c[reg * LANES + lane]))); }
  u32 regs = m == 4 ? 4 : blocks * per_block;
  for (u32 r = 0; r < regs; r++) memcpy(w->v[d + r], out[r], sizeof out[r]);
}
void mfma_i8(Wave *w, u32 m, u32 k, u32 blocks, u32 d, u32 a, u32 b, const u32 *c) {
  static __thread i8 A[64 * 128], B[64 * 128]; static __thread u32 out[32][LANES];
  u32 groups = LANES / (m * blocks), share = k / groups;
  for (u32 l = 0; l < LANES; l++) {
    u32 row = l % m, block = l / m % blocks, group = l / (m * blocks);
    for (u32 i = 0; i < share; i++) {
      A[(block * m + row) * k + group * share + i] = (i8)(w->v[a + i / 4][l] >> 8 * (i % 4));
      B[(block * m + row) * k + group * share + i] = (i8)(w->v[b + i / 4][l] >> 8 * (i % 4)); } }
  u32 per_block = m * m / LANES ? m * m / LANES : 1;
  for (u32 block = 0; block < blocks; block++)
    for (u32 r = 0; r < (m == 4 ? 4 : per_block); r++)
      for (u32 l = 0; l < (m == 4 ? 4u : LANES); l++) {
        u32 lane = m == 4 ? block * 4 + l : l, reg = m == 4 ? r : block * per_block + r;
        u32 i = row_of(m, r, lane), j = lane % m, sum = c[reg * LANES + lane];
        for (u32 n = 0; n < k; n++) sum += (u32)(A[(block * m + i) * k + n] * B[(block * m + j) * k + n]);
        out[reg][lane] = sum; }
  u32 regs = m == 4 ? 4 : blocks * per_block;
  for (u32 r = 0; r < regs; r++) memcpy(w->v[d + r], out[r], sizeof out[r]);
}

/* ---- running a launch ---- */
/* Orders: 0 waves forward, each to its next barrier; 1 backward; 2.. interleaved, a few
 * instructions at a time, seeded by the order. */
static u32 random_next(u64 *state) { *state = *state * 6364136223846793005ull + 1442695040888963407ull; return (u32)(*state >> 33); }
static int advance(Wave *w, const Ins *program, u64 steps, u64 *spent) {
  u64 n = 0; int r = NEXT;
  while (r == NEXT && n++ < steps) { const Ins *i = &program[w->pc++]; r = i->fn(w, i); }
  *spent += n; return r; }
static void begin(Wave *w, const Wave *start, Group *g, u32 id, u32 threads, const u32 *block, u32 user_sgprs,
                  u32 ids_on, u8 *scratch, u32 scratch_size) {
  for (u32 i = 0; i < SGPRS; i++) w->s[i] = g->poison;
  memcpy(w->s, start->s, user_sgprs * 4);
  u32 k = user_sgprs;
  for (u32 d = 0; d < 3; d++) if (ids_on >> d & 1) w->s[k++] = g->id[d];
  w->scc = 0; w->pc = 0; w->id = id; w->g = g; w->overflow = start->overflow;
  w->vm.head = w->vm.n = w->lgkm.head = w->lgkm.n = 0;
  u32 here = threads - LANES * id; if (here > LANES) here = LANES; w->lanes = here;
  EXEC = here == LANES ? ~0ull : (1ull << here) - 1; VCC = 0;
  for (u32 r = 0; r < VGPRS; r++) for (u32 l = 0; l < LANES; l++) w->v[r][l] = g->poison;
  for (u32 l = 0; l < LANES; l++) { /* packed work-item ids: x, y, z in ten bits each */
    u32 t = LANES * id + l;
    w->v[0][l] = t % block[0] | (t / block[0] % block[1]) << 10 | (t / (block[0] * block[1])) << 20; }
  w->scratch = scratch + (u64)id * LANES * scratch_size; w->scratch_size = scratch_size;
  for (u64 i = 0; i + 4 <= (u64)LANES * scratch_size; i += 4) memcpy(w->scratch + i, &g->poison, 4);
}
static int run_group(Wave *waves, u32 n, const Ins *program, Group *g, u32 order) {
  u8 done[64] = {0}, waiting[64] = {0}; u32 left = n; u64 seed = order * 0x9e3779b97f4a7c15ull + 1, spent = 0;
  g->waves = waves; g->n_waves = n; g->n_dma = 0;
  while (left) {
    u32 moved = 0;
    for (u32 q = 0; q < n; q++) {
      u32 i = order == 1 ? n - 1 - q : order >= 2 ? random_next(&seed) % n : q;
      if (done[i] || waiting[i]) continue;
      u64 steps = order >= 2 ? 1 + random_next(&seed) % 24 : 1u << 20;
      int r = advance(&waves[i], program, steps, &spent);
      moved = 1;
      if (r < 0) return r;
      if (r == ENDED) { done[i] = 1; left--; }
      if (r == AT_BARRIER) waiting[i] = 1;
      if (r == NEXT && order < 2) q--; /* on with the same wave */
      if (spent > g->budget) return LOST;
    }
    u32 free_waves = 0;
    for (u32 i = 0; i < n; i++) free_waves += !done[i] && !waiting[i];
    if (!free_waves) { memset(waiting, 0, sizeof waiting); g->epoch++; }
    else if (!moved && order < 2) return LOST;
  }
  return NEXT; }
int launch(const Wave *start, const Ins *program, Group *g, const u32 *grid, const u32 *block, u32 user_sgprs,
           u32 ids_on, u32 order, u8 *scratch, u32 scratch_size) {
  u32 threads = block[0] * block[1] * block[2], n = (threads + LANES - 1) / LANES;
  Wave *waves = malloc(sizeof(Wave) * n); u64 groups = (u64)grid[0] * grid[1] * grid[2]; int result = NEXT;
  for (u64 t = 0; t < groups && result == NEXT; t++) {
    u64 at = order == 1 ? groups - 1 - t : t; /* a launch must not depend on the order of workgroups */
    g->id[0] = at % grid[0]; g->id[1] = at / grid[0] % grid[1]; g->id[2] = at / ((u64)grid[0] * grid[1]);
    for (u32 i = 0; i + 4 <= g->lds_size; i += 4) memcpy(g->lds + i, &g->poison, 4);
    g->epoch++;
    for (u32 i = 0; i < n; i++) begin(&waves[i], start, g, i, threads, block, user_sgprs, ids_on, scratch, scratch_size);
    result = run_group(waves, n, program, g, order);
  }
  free(waves); return result; }
/* For the instruction tests: run the program on a given state, no scheduling. */
int single(Wave *w, const Ins *program, u32 steps) {
  u64 spent = 0; w->g->waves = w; w->g->n_waves = 1; w->g->n_dma = 0; return advance(w, program, steps, &spent); }
u64 sizes(u32 which) { return which == 0 ? sizeof(Wave) : which == 1 ? sizeof(Group) : which == 2 ? sizeof(Ins) : which == 3 ? sizeof(Finding) : sizeof(Write); }
