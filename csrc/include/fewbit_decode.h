/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A decoder of transformer blocks over the kernels of fewbit.h: token ids in, logits out. The model is described once, by
 * the structs below, whose arrays the caller keeps alive; nothing is copied. All arithmetic between the matrices is
 * float32.
 *
 *   x = embedding_scale * embedding[token]
 *   each block:  x += after_attention(output(attention(norm(x))));  x += after_mlp(mlp(norm(x)))
 *   logits = logit_cap * tanh(head(norm(x)) * logit_scale / logit_cap)
 *
 *   norm(x)      = x / sqrt(mean(x^2) + eps) * weight
 *   attention    = softmax(cap(query_scale q k^T) over the positions p of a window, t - window < p <= t) v, where q and k
 *                  are normed head by head where there is a weight for that, then rotated
 *   mlp(x)       = down(act(gate x) * up x), or the sum over the experts that the router chose of their share of it
 */
#ifndef FEWBIT_DECODE_H
#define FEWBIT_DECODE_H

#include "fewbit.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a matrix is stored as: one of fewbit.h, numbers, or other matrices, its terms. */
enum {
  FEWBIT_ABSENT = 0,
  FEWBIT_TILED = 1,
  FEWBIT_CODEBOOK = 2,
  FEWBIT_DENSE = 3,
  FEWBIT_BYTE_CODEBOOK = 4,
  FEWBIT_ROW_TABLES = 5,
  FEWBIT_ROW_LEVELS = 6,
  FEWBIT_SPARSE = 7,
  FEWBIT_SUM = 8,      /* diag(row_scale) (term + term + ...) diag(column_scale), terms being added in their order */
  FEWBIT_PRODUCT = 9,  /* left diag(middle) right, the terms being right (rank, columns), then left (rows, rank) */
  FEWBIT_COLUMNS = 10, /* terms side by side: column k of that is column order[k] of the matrix */
  FEWBIT_OUTLIERS = 11 /* the same matrix twice: the second term multiplies the activations of at least `threshold`, the
                          first one all others */
};
/* The activation of the gate. */
enum { FEWBIT_SILU = 0, FEWBIT_GELU_TANH = 1, FEWBIT_GELU = 2 };
/* What keys and values are kept in; the first three are the types of activations. */
enum { FEWBIT_KV_INT8 = 3, FEWBIT_KV_INT4 = 4 };

/* A step of what activations go through before they are multiplied: x * factor, then every `block` of them (a power of
 * two) times Sylvester's Hadamard matrix; block 1: no more than the product. With order > 1 there are order * block
 * columns, and those of equal place in their blocks are multiplied by `matrix` then. */
typedef struct {
  const float* factor; /* (columns) */
  int64_t block;
  const float* matrix; /* (order, order), or NULL where order is 1 */
  int64_t order;
} fewbit_rewrite;

/* out = what x, (tokens, columns), becomes by `count` steps in their order; out is not x. */
int fewbit_rewrite_tokens(const fewbit_rewrite* rewrites, int64_t count, const float* x, int64_t tokens,
                          int64_t columns, float* out, int32_t isa, int32_t threads);

/* Integers that activations are rounded to before a kernel of floats multiplies them: with s a scale and z a zero,
 *
 *   x becomes s * (q - z),  q = clamp(round_half_even(x / s + z), 0, top),  top = 2^bits - 1
 *
 * `scale` 0: s is found for each `block` columns of a token, as the formats int{bits}/g{block} of fewbit.formats do it;
 * symmetric s = float16(2 clip max|x| / top), z = 2^(bits - 1); else s = float16((high - low) / top), z = round(-low / s)
 * of low = clip min(x, 0) and high = clip max(x, 0); the quotient between 2^-24 and 65504. Any other `scale`: it and
 * `zero` are those of all tokens. A block with NaN or infinity becomes NaN. */
typedef struct {
  int32_t bits;      /* 2 to 8 */
  int32_t symmetric;
  int64_t block;     /* at least 1 */
  float clip;
  float scale;
  int32_t zero;
  int32_t reserved;
} fewbit_rounding;

/* A matrix that rows of activations are multiplied by: y = rewritten x w^T + bias. Neighbours (q, k, v; gate, up) whose
 * `rewrite` is the same pointer share what it makes. Of terms, only the matrix that they are terms of is rewritten. */
typedef struct fewbit_weight fewbit_weight;
struct fewbit_weight {
  int32_t kind;
  int32_t isa;            /* of the kernel: one bit of fewbit_caps() */
  int32_t dtype;          /* of FEWBIT_DENSE */
  int32_t x_zero;         /* of FEWBIT_TILED, with x_scale: zero and scale of fewbit_input */
  int64_t rows, columns;
  int64_t x_block;        /* of FEWBIT_TILED, as in fewbit_linear_many; never FEWBIT_BFLOAT16S */
  const fewbit_matrix* tiled; /* (parts): neighbouring rows, one below the other; more than one where they have tables
                                 of their own */
  int64_t parts;
  fewbit_vectors codebook;
  const void* dense;      /* (rows, columns) */
  const float* bias;      /* (rows) or NULL */
  const fewbit_rewrite* rewrite; /* (rewrites), in their order */
  int64_t rewrites;
  const fewbit_rounding* rounding; /* of what one matrix is multiplied by; NULL: it is not, or the kernel rounds */
  const fewbit_byte_vectors* bytes;     /* of FEWBIT_BYTE_CODEBOOK, with x_block */
  const fewbit_row_tables* row_tables;  /* of FEWBIT_ROW_TABLES */
  const fewbit_row_levels* row_levels;  /* of FEWBIT_ROW_LEVELS */
  const fewbit_sparse* sparse;          /* of FEWBIT_SPARSE */
  const fewbit_weight* term;            /* (terms) */
  int64_t terms;
  const float* row_scale;               /* (rows) of FEWBIT_SUM, or NULL for ones */
  const float* column_scale;            /* (columns) likewise */
  const float* middle;                  /* (rank) of FEWBIT_PRODUCT, or NULL for ones */
  const int32_t* order;                 /* (columns) of FEWBIT_COLUMNS: each column once */
  float x_scale;
  float threshold;                      /* of FEWBIT_OUTLIERS */
};

/* y = rewritten x w^T + bias, x (tokens, columns), y (tokens, rows), as the decoder computes it. What a token gives depends
 * neither on the others nor on `threads`. Terms are added in float32, one after the other: the error is the sum of theirs,
 * and 2^-24 of the magnitudes for each addition and each scale. isa: of all that is not a matrix product. */
int fewbit_weight_multiply(const fewbit_weight* weight, const float* x, int64_t tokens, float* y, int32_t isa,
                           int32_t threads);

/* Where `up` is absent, `gate` has the rows of both. */
typedef struct {
  fewbit_weight gate, up, down;
} fewbit_mlp;

/* Of positions: pair (i, i + pairs) of a head turns by position * frequency[i]; cos and sin are multiplied by `scale`. */
typedef struct {
  int64_t pairs;
  const float* frequency;
  float scale;
  int32_t reserved;
} fewbit_rope;

typedef struct {
  /* (hidden) each, the second and the fourth may be NULL. */
  const float *norm, *norm_after, *mlp_norm, *mlp_norm_after;
  const float *q_norm, *k_norm; /* (head_dim) or NULL */
  int64_t window;               /* positions that a token sees, itself included; 0: all */
  int32_t rope;                 /* index into the model's */
  int32_t experts;              /* 0: `mlp` is used */
  int32_t normalise;            /* whether the weights of the chosen experts are divided by their sum */
  int32_t reserved;
  fewbit_weight q, k, v, o;
  fewbit_mlp mlp;               /* also the expert that all tokens share, where there are others */
  fewbit_weight router;         /* (experts, hidden) */
  fewbit_weight shared_gate;    /* (1, hidden): the shared expert is multiplied by its sigmoid; may be absent */
  const fewbit_mlp* expert;     /* (experts) */
} fewbit_block;

typedef struct {
  int64_t bytes; /* sizeof(fewbit_model): that both sides mean the same */
  int64_t hidden, heads, kv_heads, head_dim, vocabulary, layers, ropes, experts_per_token;
  float eps, query_scale, attention_cap, logit_cap, logit_scale, embedding_scale; /* caps: 0 for none */
  int32_t activation;
  int32_t isa; /* of all that is not a matrix product */
  const fewbit_rope* rope;
  const fewbit_block* block; /* (layers) */
  const float* norm;
  fewbit_weight embedding, head;
} fewbit_model;

/* Tokens to be appended to a sequence. */
typedef struct {
  int64_t sequence, count;
  const int32_t* tokens;
} fewbit_part;

typedef struct fewbit_decoder fewbit_decoder;

/* Codes of 1 to 8 bits as they lie in a file, each row a string of bits counted from the lowest of the first byte, rows
 * ceil(columns * bits / 8) bytes apart: codes (rows, columns) one byte each. */
int fewbit_fields_unpack(const uint8_t* packed, int64_t rows, int64_t columns, int32_t bits, uint8_t* codes,
                         int32_t threads);

/* kv: what keys and values are kept in. sequences: how many there are, numbered from 0, all empty at first. The model is
 * copied, its arrays are not. NULL in `out` unless FEWBIT_OK is returned. */
int fewbit_decoder_new(const fewbit_model* model, int32_t kv, int64_t sequences, fewbit_decoder** out);
void fewbit_decoder_free(fewbit_decoder* decoder);

/* Appends the parts, each to its sequence, at most one a sequence; logits: (parts, vocabulary) after the last token of
 * each, or, where `every` is not 0, (tokens of all parts, vocabulary) after every token. Long parts go through in chunks.
 * What a sequence gives does not depend on the others, nor on how its tokens are cut into calls and chunks. After an
 * error nothing is appended. */
int fewbit_decoder_feed(fewbit_decoder* decoder, const fewbit_part* parts, int64_t count, int32_t every, float* logits,
                        int32_t threads);

int64_t fewbit_decoder_length(const fewbit_decoder* decoder, int64_t sequence);

/* Makes `to` the first `length` positions of `from`; both may be the same sequence. Full blocks of positions are shared,
 * not copied. */
int fewbit_decoder_keep(fewbit_decoder* decoder, int64_t from, int64_t to, int64_t length);

/* Bytes that keys and values take. */
int64_t fewbit_decoder_bytes(const fewbit_decoder* decoder);

#ifdef __cplusplus
}
#endif
#endif
