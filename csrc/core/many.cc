// SPDX-License-Identifier: Apache-2.0
// fewbit_linear and its kin: checks, and the cut of many matrices into runs that share their activations.
#include <math.h>

#include "core/dtypes.h"
#include "core/kernel.h"
#include "core/pool.h"
#include "core/products.h"
#include "fewbit.h"

namespace fewbit {
namespace {

bool sensible(const fewbit_output& output, const fewbit_matrix* first, const fewbit_input& x, int64_t x_block,
              const Products& products) {
  const fewbit_matrix* w = output.matrix;
  return w && well_formed(*w) && w->columns == first->columns && products.sensible(*w, x_block) &&
         (x.tokens == 0 || output.y) && (x.tokens <= 1 || output.y_stride >= w->rows);
}

}  // namespace

bool well_formed(const fewbit_matrix& w) {
  return fewbit_tile16_bytes(w.rows, w.columns, w.bits) > 0 && w.block > 0 && w.block <= w.columns && w.codes && w.scale &&
         (w.arranged == 0 || (w.arranged == 1 && (w.bits == 1 || w.bits == 3)));
}

bool known_dtype(int32_t dtype) { return dtype >= FEWBIT_FLOAT32 && dtype <= FEWBIT_FLOAT16; }

bool well_formed(const fewbit_input& x) {
  return known_dtype(x.dtype) && x.tokens >= 0 && x.step >= 0 && (x.tokens == 0 || x.data) &&
         (x.tokens <= 1 || x.stride >= 0) && x.scale >= 0 && x.scale < INFINITY && x.zero >= 0 && x.zero <= 255;
}

int32_t float_isa(int32_t isa) {
  if (isa & (FEWBIT_AVX512VNNI | FEWBIT_AVX512VBMI | FEWBIT_AVX512VPOPCNT | FEWBIT_AVX512BF16)) return FEWBIT_AVX512;
  if (isa == FEWBIT_AVXVNNI) return FEWBIT_AVX2;
  return isa == FEWBIT_NEONDOT || isa == FEWBIT_NEONI8MM ? FEWBIT_NEON : isa;
}

fewbit_input tokens_of(const fewbit_input& x, int64_t token, int64_t tokens) {
  fewbit_input part = x;
  part.data = static_cast<const char*>(x.data) + token * x.stride * bytes_of(x.dtype);
  part.tokens = x.tokens - token < tokens ? x.tokens - token : tokens;
  return part;
}

void* rows_of(const fewbit_output& output, int32_t dtype, int64_t token) {
  return static_cast<char*>(output.y) + token * output.y_stride * bytes_of(dtype);
}

}  // namespace fewbit

extern "C" int fewbit_linear_many(const fewbit_output* outputs, int32_t count, const fewbit_input* x, int64_t x_block,
                                  int32_t y_dtype, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!outputs || count < 1 || !x || x_block < FEWBIT_INT24 || threads < 1 || !well_formed(*x) ||
      !known_dtype(y_dtype))
    return FEWBIT_BAD_ARGUMENT;
  const Products& products = x_block == FEWBIT_SIGNS ? sign_products : x_block ? segment_products : float_products;
  if (x_block == FEWBIT_BFLOAT16S && x->dtype != FEWBIT_BFLOAT16) return FEWBIT_BAD_ARGUMENT;
  for (int32_t i = 0; i < count; i++)
    if (!sensible(outputs[i], outputs[0].matrix, *x, x_block, products)) return FEWBIT_BAD_ARGUMENT;
  for (int32_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && end - begin < kMostShared; end++)
      if (!products.shared(*outputs[begin].matrix, *outputs[end].matrix, x_block)) break;
    const int code = products.run(outputs + begin, end - begin, *x, x_block, y_dtype, isa, thread_count(threads));
    if (code != FEWBIT_OK) return code;
  }
  return FEWBIT_OK;
}

namespace {

// One matrix, float32 on both sides.
int linear(const fewbit_matrix* matrix, int64_t x_block, const float* x, int64_t x_stride, int64_t tokens,
           const float* bias, float* y, int64_t y_stride, int32_t isa, int32_t threads) {
  const fewbit_output output = {matrix, bias, y, y_stride};
  const fewbit_input input = {x, tokens, x_stride, 1, FEWBIT_FLOAT32};
  return fewbit_linear_many(&output, 1, &input, x_block, FEWBIT_FLOAT32, isa, threads);
}

}  // namespace

extern "C" int fewbit_linear(const fewbit_matrix* matrix, const float* x, int64_t x_stride, int64_t tokens,
                             const float* bias, float* y, int64_t y_stride, int32_t isa, int32_t threads) {
  return linear(matrix, 0, x, x_stride, tokens, bias, y, y_stride, isa, threads);
}

extern "C" int fewbit_linear_int8(const fewbit_matrix* matrix, int64_t x_block, const float* x, int64_t x_stride,
                                  int64_t tokens, const float* bias, float* y, int64_t y_stride, int32_t isa,
                                  int32_t threads) {
  if (x_block < 1) return FEWBIT_BAD_ARGUMENT;
  return linear(matrix, x_block, x, x_stride, tokens, bias, y, y_stride, isa, threads);
}

extern "C" int fewbit_linear_xnor(const fewbit_matrix* matrix, const float* x, int64_t x_stride, int64_t tokens,
                                  const float* bias, float* y, int64_t y_stride, int32_t isa, int32_t threads) {
  return linear(matrix, FEWBIT_SIGNS, x, x_stride, tokens, bias, y, y_stride, isa, threads);
}
