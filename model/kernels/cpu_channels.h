/* The scan and the convolution as a whole, and one block of channels of one sequence. See cpu.c. */
#pragma once
#include "cpu.h"

typedef struct {
    rows u, delta, z, out; /* (tokens, e) */
    rows B, C;             /* (tokens, n), float32 */
    vec A;                 /* (e, n), or its negative's logarithm where A_is_log */
    vec D;                 /* (e,) */
    vec bias;              /* (e,), with it delta is softplus(delta + bias); or NULL */
    const int64_t *starts; /* (num_sequences + 1,) rows */
    float **states;        /* num_sequences times (e, n) */
    float *trail;          /* (tokens, e, n) the state behind each token, and `states` stay as they are; or NULL */
    int64_t A_is_log, num_sequences, e, n, threads;
} scan_args;

typedef struct {
    rows x, out;           /* (tokens, e) */
    vec weight;            /* (e, w) */
    vec bias;              /* (e,) or NULL */
    const int64_t *starts; /* (num_sequences + 1,) rows */
    void **states;         /* num_sequences times (e, w - 1), the last w - 1 inputs, oldest first */
    void *trail;           /* (tokens, e, w - 1) as in scan_args */
    int64_t state_dtype, num_sequences, e, w, threads;
} conv_args;

/* Channels c..c + VL (or up to the last) of one sequence. */
void scan_block(const scan_args *a, int64_t sequence, int64_t c);
void conv_block(const conv_args *a, int64_t sequence, int64_t c);
