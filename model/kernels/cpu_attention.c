/* Causal grouped-query attention of tokens to all before them: one step's or a whole prompt's.

   A task is a tile of tokens with the heads that share its keys. It packs a block of keys and values for products in
   registers, and keeps of each row the largest score so far, the sum of the weights and the weighted values; where there
   are few tiles, each part of the keys is a task of its own. Blocks and parts have the same borders in every call, a row
   is summed by itself and in order: it has the same bits alone, in any company, wherever its prompt is cut and with any
   number of threads. Source: Dao et al. 2022 (arXiv 2205.14135), algorithm 1; 2023 (flash-decoding), for the parts. */
#include <math.h>

#include "cpu_linear.h"

enum {
    BLOCK = 256,            /* keys that are packed at a time */
    PART = 4 * BLOCK,       /* keys that are summed up before they are added to those before */
    ROWS = 6, FEW = 3,      /* multiplied at a time, and of a last few */
    WIDE = VL == 8 ? 2 : 4, /* vectors of results a row at a time: what the registers hold */
    TOKENS = 64,            /* of a tile, */
    FEWEST = 16,            /* or down to that few where there were less than */
    SHARES = 4,             /* tasks a thread; their sums of parts take at most */
    MOST_SUMS = 1 << 24,    /* floats */
};
#define LOWEST (-1e30f)

typedef struct {
    rows q, out;                 /* (m, h * p) */
    const int64_t *starts;       /* (num_sequences + 1,) rows */
    const int64_t *pasts;        /* (num_sequences,) keys before those of the rows themselves */
    const void **keys, **values; /* num_sequences times (past + rows, g, p) without gaps */
    int64_t kv_dtype, num_sequences, h, g, p, threads;
} attention_args;

INLINE int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

/* What products are made of: 32 bits that hold a float32, or two neighbours in bfloat16 where the processor multiplies
   these in pairs. */
typedef uint32_t unit;
typedef vi vi_any __attribute__((aligned(4), may_alias));
typedef vu vu_any __attribute__((aligned(4), may_alias));
#ifdef __AVX512BF16__
enum { PAIRS = 1 };
INLINE vf dot_pairs(vf sums, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b); }
#else
enum { PAIRS = 0 };
INLINE vf dot_pairs(vf sums, vu a, vu b) { return sums; }
#endif

/* Whether this is the fastest way here for many tokens: with AMX, oneDNN multiplies bf16 faster. */
int attention_pays(int64_t dtype) {
#ifdef __AMX_BF16__
    return dtype != BFLOAT16;
#else
    return 1;
#endif
}

/* Matrices of units whose columns are VL lanes: the next row is `step` units on, the next VL columns `next`. */
typedef struct {
    const unit *first;
    int64_t step, next;
} panels;

/* out[r] = out[r] * factors[r] + x[r] (units,) times n panels, for m rows; factors NULL: 0. m and n are constants. */
INLINE void multiply_tile(const unit *x, int64_t ldx, const unit *panel, panels of, int64_t units, float *out, int64_t ldout,
                          const float *factors, const int m, const int n, const int pairs) {
    vf sums[ROWS][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) sums[r][j] = splat(0.0f);
    for (int64_t u = 0; u < units; u++, panel += of.step) {
        vu columns[WIDE];
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) columns[j] = *(const vu_any *)(panel + j * of.next);
#pragma GCC unroll 8
        for (int r = 0; r < m; r++) {
            const vu row = x[r * ldx + u] - (vu){0};
#pragma GCC unroll 4
            for (int j = 0; j < n; j++)
                sums[r][j] = pairs ? dot_pairs(sums[r][j], columns[j], row) : fma_vf((vf)columns[j], (vf)row, sums[r][j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            vf_any *at = (vf_any *)(out + r * ldout + j * VL);
            *at = factors ? fma_vf(*at, splat(factors[r]), sums[r][j]) : sums[r][j];
        }
}

/* The same for `count` panels. */
INLINE void multiply(const unit *x, int64_t ldx, panels of, int64_t units, int64_t count, float *out, int64_t ldout,
                     const float *factors, const int m, const int pairs) {
    const unit *panel = of.first;
    for (; count >= WIDE; count -= WIDE, panel += WIDE * of.next, out += WIDE * VL)
        multiply_tile(x, ldx, panel, of, units, out, ldout, factors, m, WIDE, pairs);
    for (; count; count--, panel += of.next, out += VL)
        multiply_tile(x, ldx, panel, of, units, out, ldout, factors, m, 1, pairs);
}

/* Whether nothing in units first..end of `count` panels is NaN or infinite: 0 times these is 0. */
INLINE int all_finite(panels of, int64_t first, int64_t end, int64_t count, const int pairs) {
    const uint32_t exponent = 0x7f800000;
    vi strange = {0};
    for (int64_t u = first; u < end; u++)
        for (int64_t j = 0; j < count; j++) {
            const vu bits = *(const vu_any *)(of.first + u * of.step + j * of.next);
            strange |= (vi)((bits & exponent) == exponent);
            if (pairs) strange |= (vi)((bits << 16 & exponent) == exponent);
        }
    return !max_lanes(__builtin_convertvector(-strange, vf));
}

/* The same as `multiply` for one row and of it the first `visible` alone: the other one of the last pair is not read. */
static __attribute__((noinline, cold)) void multiply_row(const unit *x, panels of, int64_t visible, int64_t count,
                                                         float *out, float factor, int pairs) {
    for (int64_t j = 0; j < count; j++, out += VL) {
        vf sum = splat(0.0f);
        for (int64_t u = 0; u << pairs < visible; u++) {
            vu column = *(const vu_any *)(of.first + u * of.step + j * of.next);
            if (pairs && 2 * u + 1 == visible) column &= 0xffff;
            const vu row = x[u] - (vu){0};
            sum = pairs ? dot_pairs(sum, column, row) : fma_vf((vf)column, (vf)row, sum);
        }
        *(vf_any *)out = fma_vf(*(vf_any *)out, splat(factor), sum);
    }
}

/* As many units of row i as a vector holds, from column c on, of `left` columns; lanes beyond are 0. */
INLINE vi load_units(rows m, int64_t i, int64_t c, int64_t left, const int pairs) {
    if (!pairs) return (vi)load(m, i, c, left < VL ? (int)left : VL);
    const uint16_t *at = (const uint16_t *)m.data + i * m.stride + c;
    vi bits = {0};
    if (left >= 2 * VL) memcpy(&bits, at, sizeof bits);
    else memcpy(&bits, at, left * 2);
    return bits;
}

/* VL vectors -> the first lane of each, the second of each and so on. Every round puts the upper half of the vectors
   between the lanes of the lower one; after log2(VL) of them rows are columns. */
INLINE void transpose(vi *of) {
    const vi numbers = lane_numbers(), low = (numbers >> 1) + (numbers & 1) * VL;
#pragma GCC unroll 4
    for (int round = 1; round < VL; round *= 2) {
        vi next[VL];
#pragma GCC unroll 8
        for (int i = 0; i < VL / 2; i++) {
            next[2 * i] = pick(of[i], of[i + VL / 2], low);
            next[2 * i + 1] = pick(of[i], of[i + VL / 2], low + VL / 2);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) of[i] = next[i];
    }
}

/* Keys first..first + count as columns, a lane each; lanes beyond are 0. */
INLINE panels pack_keys(rows keys, int64_t first, int64_t count, int64_t column, int64_t p, unit *to, const int pairs) {
    const int64_t size = 1 + pairs, units = (p + pairs) / size;
    const panels packed = {to, VL, units * VL};
    for (int64_t k = 0; k < count; k += VL)
        for (int64_t u = 0; u < units; u += VL) {
            const int64_t wanted = units - u < VL ? units - u : VL;
            vi square[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++)
                square[i] = k + i < count ? load_units(keys, first + k + i, column + u * size, p - u * size, pairs)
                                          : (vi){0};
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++)
                if (i < wanted) *(vi_any *)(to + i * VL) = square[i];
            to += wanted * VL;
        }
    return packed;
}

/* Values first..first + count; in pairs of keys, of which the last may be one. Where nothing is to be changed they stay. */
INLINE panels pack_values(rows values, int64_t first, int64_t count, int64_t column, int64_t p, unit *to, const int pairs) {
    const int64_t size = 1 + pairs, next = BLOCK / size * VL;
    if (values.dtype == FLOAT32 && p % VL == 0)
        return (panels){(const unit *)values.data + first * values.stride + column, values.stride, VL};
    for (int64_t c = 0; c < p; c += VL) {
        const int lanes = p - c < VL ? (int)(p - c) : VL;
        for (int64_t k = 0; k < count; k += size) {
            vu bits = (vu)load(values, first + k, column + c, lanes);
            if (pairs) bits >>= 16;
            if (pairs && k + 1 < count) bits |= (vu)load(values, first + k + 1, column + c, lanes);
            *(vu_any *)(to + c / VL * next + k / size * VL) = bits;
        }
    }
    return (panels){to, VL, next};
}

/* A row's sums so far: its weighted values, a whole number of vectors, and a vector that begins with these two. */
enum { LARGEST, TOTAL };

/* What a thread works with. */
typedef struct {
    unit *q, *keys, *values; /* (rows, units of p); panels of a block */
    float *scores;           /* (ROWS, BLOCK) */
    unit *weights;           /* (ROWS, BLOCK) */
    float *sums, *part;      /* (rows, columns + VL), of all parts so far and of one */
} workspace;

/* Tokens first..last of a sequence with the heads of KV head `head`, and keys begin..end. */
typedef struct {
    int64_t sequence, head, first, last, begin, end;
    float *sums; /* where they stay until the other parts are there; NULL: they are all here */
} task;

/* Of scores, to powers of 2. */
INLINE float score_scale(int64_t p) { return LOG2_E / sqrtf((float)p); }

/* One row's scores (visible,) -> weights 2^(scale * (score - largest)), 0 up to `count`: at most 1, however large the
   scores. Returns what becomes of the sums so far. */
INLINE float weigh(const float *scores, int64_t visible, int64_t count, float scale, float *so_far, unit *weights,
                   const int pairs) {
    const rows of_scores = {(void *)scores, 0, FLOAT32}, of_weights = {weights, 0, pairs ? BFLOAT16 : FLOAT32};
    vf high = splat(LOWEST), sum = splat(0.0f);
    for (int64_t k = 0; k < visible; k += VL) {
        vf x = load(of_scores, 0, k, VL);
        for (int64_t lane = visible - k; lane < VL; lane++) x[lane] = LOWEST;
        high = select_vf(x > high, x, high);
    }
    const float before = so_far[LARGEST], now = fmaxf(before, max_lanes(high));
    for (int64_t k = 0; k < count; k += VL) {
        vf weight = splat(0.0f);
        if (k < visible) weight = exp2v((load(of_scores, 0, k, VL) - now) * scale);
        for (int64_t lane = k < visible ? visible - k : VL; lane < VL; lane++) weight[lane] = 0;
        sum += weight;
        store(of_weights, 0, k, VL, weight);
    }
    const float factor = exp2v(splat((before - now) * scale))[0];
    so_far[LARGEST] = now, so_far[TOTAL] = so_far[TOTAL] * factor + sum_lanes(sum);
    return factor;
}

/* m rows from `row` on against a block of `count` keys, of which visible[r] are row r's: what comes later has weight 0,
   and where that is not enough, since a value is no number, it is not read. */
INLINE void attend_rows(const workspace *w, panels keys, panels values, float *sums, int64_t row, int64_t count,
                        const int64_t *visible, int64_t p, const int m, const int pairs) {
    const int64_t units = (p + pairs) / (1 + pairs), columns = whole(p, VL), ld = columns + VL;
    const float scale = score_scale(p);
    float factors[ROWS];
    sums += row * ld;
    multiply(w->q + row * units, units, keys, units, (count + VL - 1) / VL, w->scores, BLOCK, NULL, m, pairs);
    int64_t fewest = count;
    for (int r = 0; r < m; r++) {
        factors[r] = weigh(w->scores + r * BLOCK, visible[r], count, scale, sums + r * ld + columns,
                           w->weights + r * BLOCK, pairs);
        fewest = visible[r] < fewest ? visible[r] : fewest;
    }
    const int64_t end = (count + pairs) / (1 + pairs);
    if (all_finite(values, fewest / (1 + pairs), end, columns / VL, pairs))
        multiply(w->weights, BLOCK, values, end, columns / VL, sums, ld, factors, m, pairs);
    else
        for (int r = 0; r < m; r++)
            multiply_row(w->weights + r * BLOCK, values, visible[r], columns / VL, sums + r * ld, factors[r], pairs);
}

/* The task's rows against keys begin..end. */
INLINE void attend_part(const attention_args *a, const task *t, const workspace *w, float *sums, int64_t begin,
                        int64_t end, const int pairs) {
    const int64_t s = t->sequence, p = a->p, heads = a->h / a->g, num_rows = (t->last - t->first) * heads;
    const int64_t columns = whole(p, VL), ld = columns + VL;
    const rows keys = {(void *)a->keys[s], a->g * p, a->kv_dtype};
    const rows values = {(void *)a->values[s], a->g * p, a->kv_dtype};
    memset(sums, 0, num_rows * ld * sizeof *sums);
    for (int64_t row = 0; row < num_rows; row++) sums[row * ld + columns + LARGEST] = LOWEST;
    for (; begin < end; begin += BLOCK) {
        const int64_t count = end - begin < BLOCK ? end - begin : BLOCK;
        const panels of_keys = pack_keys(keys, begin, count, t->head * p, p, w->keys, pairs);
        const panels of_values = pack_values(values, begin, count, t->head * p, p, w->values, pairs);
        for (int64_t row = 0; row < num_rows; row += ROWS) {
            int64_t visible[ROWS], most = 0;
            for (int64_t r = 0; r < ROWS; r++) {
                const int64_t own = row + r < num_rows ? row + r : num_rows - 1; /* beyond: nobody reads these */
                const int64_t seen = a->pasts[s] + t->first + own / heads + 1 - begin;
                visible[r] = seen < 0 ? 0 : seen < count ? seen : count;
                most = visible[r] > most ? visible[r] : most;
            }
            if (!most) continue;
            if (num_rows - row > FEW) attend_rows(w, of_keys, of_values, sums, row, most, visible, p, ROWS, pairs);
            else attend_rows(w, of_keys, of_values, sums, row, most, visible, p, FEW, pairs);
        }
    }
}

/* sums += those of the keys that follow. */
static void add_part(float *sums, const float *part, int64_t num_rows, int64_t p) {
    const int64_t columns = whole(p, VL);
    const float scale = score_scale(p);
    for (int64_t row = 0; row < num_rows; row++, sums += columns + VL, part += columns + VL) {
        float *old = sums + columns;
        const float *new = part + columns, largest = fmaxf(old[LARGEST], new[LARGEST]);
        const vf of_old = exp2v(splat((old[LARGEST] - largest) * scale));
        const vf of_new = exp2v(splat((new[LARGEST] - largest) * scale));
        old[LARGEST] = largest, old[TOTAL] = old[TOTAL] * of_old[0] + new[TOTAL] * of_new[0];
        for (int64_t c = 0; c < columns; c += VL)
            *(vf_any *)(sums + c) = fma_vf(*(vf_any *)(part + c), of_new, *(vf_any *)(sums + c) * of_old);
    }
}

static void write_out(const attention_args *a, const task *t, const float *sums) {
    const int64_t heads = a->h / a->g, p = a->p, columns = whole(p, VL);
    for (int64_t r = 0; r < (t->last - t->first) * heads; r++, sums += columns + VL)
        for (int64_t c = 0; c < p; c += VL)
            store(a->out, a->starts[t->sequence] + t->first + r / heads, (t->head * heads + r % heads) * p + c,
                  p - c < VL ? (int)(p - c) : VL, *(vf_any *)(sums + c) / sums[columns + TOTAL]);
}

INLINE void run_task(const attention_args *a, const task *t, const workspace *w, const int pairs) {
    const int64_t heads = a->h / a->g, p = a->p, size = 1 + pairs, units = (p + pairs) / size;
    const int64_t num_rows = (t->last - t->first) * heads;
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t u = 0; u < units; u += VL) {
            const int64_t row = a->starts[t->sequence] + t->first + r / heads, column = (t->head * heads + r % heads) * p;
            const vi of_q = load_units(a->q, row, column + u * size, p - u * size, pairs);
            memcpy(w->q + r * units + u, &of_q, (units - u < VL ? units - u : VL) * sizeof(unit));
        }
    for (int64_t begin = t->begin; begin < t->end; begin += PART) {
        float *to = t->sums ? t->sums : begin ? w->part : w->sums;
        attend_part(a, t, w, to, begin, t->end - begin < PART ? t->end : begin + PART, pairs);
        if (to == w->part) add_part(w->sums, w->part, num_rows, p);
    }
    if (!t->sums) write_out(a, t, w->sums);
}

/* Parts of the same rows stand one after the other, from that of the first keys on. */
static void join_parts(const attention_args *a, const task *t, const task *end) {
    const int64_t num_rows = (t->last - t->first) * (a->h / a->g);
    for (const task *next = t + 1; next < end && next->begin; next++)
        add_part(t->sums, next->sums, num_rows, a->p);
    write_out(a, t, t->sums);
}

static int64_t count_tiles(const attention_args *a, int64_t tokens) {
    int64_t tiles = 0;
    for (int64_t s = 0; s < a->num_sequences; s++) tiles += (a->starts[s + 1] - a->starts[s] + tokens - 1) / tokens;
    return tiles * a->g;
}

/* All there is to do, the longest of a sequence first; `split`: part by part, with `ld` floats for the sums of each.
   Returns how many tasks; tasks NULL: only that. */
static int64_t list_tasks(const attention_args *a, int64_t tokens, int split, task *tasks, float *sums, int64_t ld) {
    int64_t n = 0;
    for (int64_t s = 0; s < a->num_sequences; s++) {
        const int64_t m = a->starts[s + 1] - a->starts[s];
        for (int64_t first = (m - 1) / tokens * tokens; m && first >= 0; first -= tokens)
            for (int64_t head = 0; head < a->g; head++) {
                const int64_t last = first + tokens < m ? first + tokens : m, end = a->pasts[s] + last;
                for (int64_t begin = 0; begin < end; n++) {
                    const int64_t until = split && begin + PART < end ? begin + PART : end;
                    if (tasks) tasks[n] = (task){s, head, first, last, begin, until, split ? sums + n * ld : NULL};
                    begin = until;
                }
            }
    }
    return n;
}

static workspace new_workspace(int64_t num_rows, int64_t p) {
    const int64_t columns = whole(p, VL), sums = num_rows * (columns + VL);
    const int64_t counts[] = {num_rows * p, BLOCK * p, BLOCK * columns, ROWS * BLOCK, ROWS * BLOCK, sums, sums};
    int64_t all = 0;
    for (int i = 0; i < 7; i++) all += whole(counts[i], 16);
    uint32_t *next = aligned_alloc(64, all * sizeof *next), *parts[7];
    for (int i = 0; i < 7; next += whole(counts[i++], 16)) parts[i] = next;
    memset(parts[0], 0, counts[0] * sizeof(unit)); /* the rows beyond the last are read, though what comes of it is not */
    return (workspace){parts[0], parts[1], parts[2], (float *)parts[3], parts[4], (float *)parts[5], (float *)parts[6]};
}

void attention(const attention_args *a) {
    const int64_t p = a->p, wanted = SHARES * a->threads;
    const int pairs = PAIRS && a->q.dtype == BFLOAT16 && a->kv_dtype == BFLOAT16;
    int64_t longest = 1, tokens = TOKENS;
    for (int64_t s = 0; s < a->num_sequences; s++)
        longest = a->starts[s + 1] - a->starts[s] > longest ? a->starts[s + 1] - a->starts[s] : longest;
    while (tokens > FEWEST && count_tiles(a, tokens) < wanted) tokens /= 2;
    tokens = tokens < longest ? tokens : longest;
    const int64_t num_rows = whole(tokens * (a->h / a->g), ROWS), ld = num_rows * (whole(p, VL) + VL);
    const int split = count_tiles(a, tokens) < wanted && list_tasks(a, tokens, 1, NULL, NULL, ld) * ld <= MOST_SUMS;
    const int64_t n = list_tasks(a, tokens, split, NULL, NULL, ld);
    task *tasks = malloc(n * sizeof *tasks + (split ? n * ld * sizeof(float) : 0));
    list_tasks(a, tokens, split, tasks, (float *)(tasks + n), ld);
#pragma omp parallel num_threads(a->threads)
    {
        const workspace own = new_workspace(num_rows, p);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n; i++) {
            if (pairs) run_task(a, tasks + i, &own, 1);
            else run_task(a, tasks + i, &own, 0);
        }
        free(own.q);
        if (split)
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < n; i++)
                if (!tasks[i].begin) join_parts(a, tasks + i, tasks + n);
    }
    free(tasks);
}
