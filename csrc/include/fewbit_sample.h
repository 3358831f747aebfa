/* SPDX-License-Identifier: Apache-2.0
 *
 * Which token comes next: one draw from each row of logits. */
#ifndef FEWBIT_SAMPLE_H
#define FEWBIT_SAMPLE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One row of logits and how to draw from it. In this order:
 *
 *   1. bias      logit[t] += bias[t]
 *   2. penalties of tokens seen, in the prompt or the text: logit / repetition where positive, else logit * repetition
 *                (Keskar et al. 2019); then logit -= frequency * counts[t] + presence * (counts[t] > 0)
 *   3. temperature 0: the largest logit, of equals the lowest token, and nothing more. Else logit /= temperature
 *   4. top_k     the k largest stay; 0: all. Of equals the lower token goes first, here and below
 *   5. top_p     of these, p = softmax: the fewest largest whose sum reaches top_p stay (Holtzman et al. 2019)
 *   6. min_p     those with p >= min_p * (the largest p) stay
 *   7. the token in whose share of the rest, tokens in order, u * (sum of the rest) falls.
 *
 * u in [0, 1) is the first 53 bits of Philox4x32-10 (Salmon et al. 2011) with key `seed` and counter (position, branch):
 * a draw depends on its own row and these three numbers, on nothing beside it.
 *
 * p is computed in float32 within a relative error of 2^-21, sums in float64. */
typedef struct {
  float* logits; /* (vocabulary), overwritten */
  int64_t vocabulary;
  float temperature, top_p, min_p, repetition, frequency, presence;
  int64_t top_k;
  const int32_t* seen;   /* (seen_count) different tokens of the prompt and the text */
  const int32_t* counts; /* (seen_count) how often each is in the text */
  int64_t seen_count;
  const int32_t* biased; /* (bias_count) different tokens */
  const float* bias;     /* (bias_count) */
  int64_t bias_count;
  uint64_t seed, position;
  uint32_t branch;
} fewbit_draw;

/* tokens: (count). A token is -1 where a logit is NaN or +infinity, or all are -infinity. */
int fewbit_sample(const fewbit_draw* draws, int64_t count, int32_t* tokens, int32_t threads);

/* What a model thinks of its tokens, from one row of logits (vocabulary): tokens (count) are the likeliest, of equals the
 * lower first, and the natural logarithm of the probability of token t is logits[t] - *log_sum, the sum of exponentials
 * being computed in float64. *log_sum is NaN, and tokens are -1, where fewbit_sample would give -1. */
int fewbit_likeliest(const float* logits, int64_t vocabulary, int64_t count, int32_t* tokens, double* log_sum);

#ifdef __cplusplus
}
#endif
#endif
