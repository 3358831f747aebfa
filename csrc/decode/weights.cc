// SPDX-License-Identifier: Apache-2.0
#include "decode/weights.h"

#include <math.h>

#include "core/dtypes.h"
#include "core/kernel.h"
#include "core/products.h"

namespace fewbit {
namespace {

constexpr int64_t kRows = 32;         // of a dense matrix that a thread takes at a time
constexpr int64_t kSmall = 1 << 17;   // multiply-adds below which a second thread costs more than it brings

int multiply_tiled(const Means& means, const Product* products, int32_t count, fewbit_input x) {
  std::vector<fewbit_output>& outputs = *means.outputs;
  outputs.clear();
  for (int32_t i = 0; i < count; i++) {
    const Product& product = products[i];
    const fewbit_weight& w = *product.weight;
    for (int64_t part = 0, row = 0; part < w.parts; row += w.tiled[part++].rows)
      outputs.push_back({&w.tiled[part], w.bias ? w.bias + row : nullptr, product.y + row, product.y_stride});
  }
  const fewbit_weight& first = *products[0].weight;
  x.scale = first.x_scale, x.zero = first.x_zero;
  return fewbit_linear_many(outputs.data(), static_cast<int32_t>(outputs.size()), &x, first.x_block, FEWBIT_FLOAT32,
                            first.isa, means.threads);
}

void multiply_dense(const Means& means, const Product& product, const fewbit_input& x) {
  const fewbit_weight& w = *product.weight;
  const DenseTask task = {w.dense, w.dtype, w.rows, w.columns, x.tokens, static_cast<const float*>(x.data),
                          x.stride, w.bias, product.y, product.y_stride};
  const int32_t threads = w.rows * w.columns * x.tokens < kSmall ? 1 : means.threads;
  spread(ceil_div(w.rows, kRows), threads, [&](int64_t unit) {
    means.steps->dense(task, unit * kRows, least(unit * kRows + kRows, w.rows));
  });
}

// What x, (columns), becomes; spare, (columns), is for mixing.
void rewrite_token(const Steps& steps, const fewbit_rewrite* rewrites, int64_t count, int64_t columns, const float* x,
                   float* out, float* spare) {
  for (int64_t i = 0; i < count; i++, x = out) {
    const fewbit_rewrite& step = rewrites[i];
    float* scaled = step.order > 1 ? spare : out;
    steps.scale(x, step.factor, columns, scaled);
    steps.hadamard(scaled, step.block, columns);
    if (step.order > 1) steps.mix(spare, step.matrix, step.order, step.block, out);
  }
}

bool sensible(const fewbit_rewrite& step, int64_t columns) {
  if (!step.factor || step.block < 1 || (step.block & (step.block - 1)) || columns % step.block) return false;
  return step.order == 1 || (step.order > 1 && step.matrix && columns / step.block == step.order);
}

// x, (tokens, columns), as the matrix wants it.
const float* rewrite(const Means& means, const fewbit_weight& w, const float* x, int64_t x_stride, int64_t tokens) {
  float* out = room_for(means.rewritten, 2 * tokens * w.columns);  // the second half is for mixing
  spread(tokens, threads_for(means, tokens), [&](int64_t token) {
    float* to = out + token * w.columns;
    rewrite_token(*means.steps, w.rewrite, w.rewrites, w.columns, x + token * x_stride, to, to + tokens * w.columns);
  });
  return out;
}

// The same without rounding inputs first.
int multiply_rounded(const Means& means, const Product* products, int32_t count, const fewbit_input& x) {
  const Product& first = products[0];
  const fewbit_weight& w = *first.weight;
  switch (w.kind) {
    case FEWBIT_TILED: return multiply_tiled(means, products, count, x);
    case FEWBIT_CODEBOOK:
      return fewbit_vector_linear(&w.codebook, &x, w.bias, first.y, first.y_stride, FEWBIT_FLOAT32, w.isa,
                                  means.threads);
    case FEWBIT_BYTE_CODEBOOK:
      return fewbit_vector_linear_int8(w.bytes, w.x_block, &x, w.bias, first.y, first.y_stride, FEWBIT_FLOAT32, w.isa,
                                       means.threads);
    case FEWBIT_ROW_TABLES:
      return fewbit_row_linear(w.row_tables, &x, w.bias, first.y, first.y_stride, FEWBIT_FLOAT32, w.isa, means.threads);
    case FEWBIT_ROW_LEVELS:
      return fewbit_row_linear_int8(w.row_levels, &x, w.bias, first.y, first.y_stride, FEWBIT_FLOAT32, w.isa,
                                    means.threads);
    case FEWBIT_DENSE: multiply_dense(means, first, x); return FEWBIT_OK;
    default: return FEWBIT_BAD_ARGUMENT;
  }
}

}  // namespace

bool together(const fewbit_weight& a, const fewbit_weight& b) {
  return a.kind == FEWBIT_TILED && b.kind == FEWBIT_TILED && a.isa == b.isa && a.x_block == b.x_block &&
         a.rewrite == b.rewrite && a.rounding == b.rounding && a.x_scale == b.x_scale && a.x_zero == b.x_zero;
}

int multiply_matrices(const Means& means, const Product* products, int32_t count, const fewbit_input& x) {
  const fewbit_weight& w = *products[0].weight;
  if (!w.rounding) return multiply_rounded(means, products, count, x);
  const Room room(means.rooms, x.tokens * w.columns);
  spread(x.tokens, threads_for(means, x.tokens), [&](int64_t token) {
    means.steps->round(*w.rounding, static_cast<const float*>(x.data) + token * x.stride, w.columns,
                       room.data() + token * w.columns);
  });
  return multiply_rounded(means, products, count, {room.data(), x.tokens, w.columns, 1, FEWBIT_FLOAT32});
}

int multiply(const Means& means, const Product* products, int32_t count, const float* x, int64_t x_stride,
             int64_t tokens) {
  fewbit_input input = {x, tokens, x_stride, 1, FEWBIT_FLOAT32};
  const fewbit_rewrite* done = nullptr;
  for (int32_t begin = 0, end; begin < count; begin = end) {
    end = begin + 1;
    const Product& first = products[begin];
    if (first.weight->rewrite != done) {
      done = first.weight->rewrite;
      input.data = done ? rewrite(means, *first.weight, x, x_stride, tokens) : x;
      input.stride = done ? first.weight->columns : x_stride;
    }
    while (end < count && together(*first.weight, *products[end].weight)) end++;
    const int code =
        end - begin > 1 ? multiply_matrices(means, &first, end - begin, input) : onto(means, first, input, false);
    if (code != FEWBIT_OK) return code;
  }
  return FEWBIT_OK;
}

int look_up(const fewbit_weight& weight, int64_t row, float scale, std::vector<float>* scratch, float* out) {
  const int64_t columns = weight.columns;
  if (weight.kind == FEWBIT_DENSE) {
    const fewbit_input table = {weight.dense, weight.rows, columns, 1, weight.dtype};
    const float* values = floats(table, row, 0, columns, out);
    for (int64_t k = 0; k < columns; k++) out[k] = values[k] * scale;
    return FEWBIT_OK;
  }
  if (weight.kind == FEWBIT_ROW_TABLES) {
    const int code = fewbit_row_decode(weight.row_tables, row, row + 1, out, columns, weight.isa, 1);
    for (int64_t k = 0; k < columns; k++) out[k] *= scale;
    return code;
  }
  const fewbit_matrix* part = weight.tiled;
  if (weight.kind == FEWBIT_TILED)
    while (row >= part->rows) row -= part++->rows;
  const int64_t tile = weight.kind == FEWBIT_TILED ? 16 : 8 * weight.codebook.dim, at = row / tile;
  scratch->resize(static_cast<size_t>(tile * columns));
  float* decoded = scratch->data();
  const int code = weight.kind == FEWBIT_TILED
                       ? fewbit_decode(part, at, at + 1, decoded, tile, float_isa(weight.isa), 1)
                       : fewbit_vector_decode(&weight.codebook, at, at + 1, decoded, tile, weight.isa, 1);
  for (int64_t k = 0; k < columns; k++) out[k] = decoded[k * tile + row % tile] * scale;
  return code;
}

namespace {

bool has_parts(const fewbit_weight& w) {
  int64_t rows = 0;
  for (int64_t part = 0; part < w.parts && w.tiled && rows < w.rows; rows += w.tiled[part++].rows)
    if (!well_formed(w.tiled[part]) || w.tiled[part].columns != w.columns) return false;
  return rows == w.rows;
}

// Whether what rounds the inputs of a matrix, itself or its kernel, can.
bool rounds(const fewbit_weight& w) {
  if (!(w.x_scale >= 0.0f && w.x_scale < INFINITY) || w.x_zero < 0 || w.x_zero > 255) return false;
  const fewbit_rounding* r = w.rounding;
  return !r || (r->bits >= 2 && r->bits <= 8 && r->block >= 1 && r->scale >= 0.0f && r->scale < INFINITY);
}

template <class Stored>
bool fits(const Stored* stored, const fewbit_weight& w) {
  return stored && stored->rows == w.rows && stored->columns == w.columns && stored->codes;
}

}  // namespace

bool has_rows(const fewbit_weight& w) {
  return w.kind == FEWBIT_TILED || w.kind == FEWBIT_CODEBOOK || w.kind == FEWBIT_DENSE || w.kind == FEWBIT_ROW_TABLES;
}

bool has_shape(const fewbit_weight& w, int64_t rows, int64_t columns, bool may_be_absent) {
  if (w.kind == FEWBIT_ABSENT) return may_be_absent;
  for (int64_t i = 0; i < w.rewrites; i++)
    if (!sensible(w.rewrite[i], columns)) return false;
  if (w.rows != rows || w.columns != columns || !rounds(w)) return false;
  switch (w.kind) {
    case FEWBIT_TILED: return has_parts(w);
    case FEWBIT_CODEBOOK: return fits(&w.codebook, w);
    case FEWBIT_DENSE: return w.dense && known_dtype(w.dtype);
    case FEWBIT_BYTE_CODEBOOK: return fits(w.bytes, w);
    case FEWBIT_ROW_TABLES: return fits(w.row_tables, w);
    case FEWBIT_ROW_LEVELS: return fits(w.row_levels, w);
    case FEWBIT_SPARSE: return w.sparse && w.sparse->rows == rows && w.sparse->columns == columns && w.sparse->start;
    default: return has_terms(w);
  }
}

}  // namespace fewbit

extern "C" int fewbit_rewrite_tokens(const fewbit_rewrite* rewrites, int64_t count, const float* x, int64_t tokens,
                                     int64_t columns, float* out, int32_t isa, int32_t threads) {
  using namespace fewbit;
  const Steps* steps = steps_of(isa);
  if (!steps || !rewrites || count < 1 || !x || !out || tokens < 0 || columns < 1 || threads < 1)
    return FEWBIT_BAD_ARGUMENT;
  for (int64_t i = 0; i < count; i++)
    if (!sensible(rewrites[i], columns)) return FEWBIT_BAD_ARGUMENT;
  const int64_t few = 8, units = ceil_div(tokens, few);
  spread(units, tokens < few ? 1 : thread_count(threads), [&](int64_t unit) {
    std::vector<float> spare(static_cast<size_t>(columns));
    for (int64_t token = unit * few; token < least(unit * few + few, tokens); token++)
      rewrite_token(*steps, rewrites, count, columns, x + token * columns, out + token * columns, spare.data());
  });
  return FEWBIT_OK;
}
