// SPDX-License-Identifier: Apache-2.0
// Matrices that are made of others: each term adds its product onto the same float32 result, none is ever written out.
#include <string.h>

#include <new>

#include "core/products.h"
#include "decode/weights.h"

namespace fewbit {
namespace {

constexpr int kMostDepth = 8;  // of terms within terms

fewbit_input input_of(const float* x, int64_t tokens, int64_t columns) {
  return {x, tokens, columns, 1, FEWBIT_FLOAT32};
}

const float* token_of(const fewbit_input& x, int64_t token) {
  return static_cast<const float*>(x.data) + token * x.stride;
}

// work(token) for all tokens.
template <class W>
void each(const Means& means, int64_t tokens, W&& work) {
  spread(tokens, threads_for(means, tokens), [&](int64_t token) { work(token); });
}

// y = factor * x, token by token, (tokens, count).
void scale_tokens(const Means& means, const fewbit_input& x, const float* factor, int64_t count, float* y,
                  int64_t y_stride) {
  each(means, x.tokens,
       [&](int64_t token) { means.steps->scale(token_of(x, token), factor, count, y + token * y_stride); });
}

// What `make` writes to where it is told to, (tokens, rows) as far apart as it is told: on y, or added to y.
template <class M>
int place(const Means& means, const Product& product, int64_t tokens, bool add, M&& make) {
  if (!add) return make(product.y, product.y_stride);
  const int64_t rows = product.weight->rows;
  const Room made(means.rooms, tokens * rows);
  const int code = make(made.data(), rows);
  if (code != FEWBIT_OK) return code;
  each(means, tokens, [&](int64_t token) {
    means.steps->add(product.y + token * product.y_stride, made.data() + token * rows, rows);
  });
  return FEWBIT_OK;
}

int sparse(const Means& means, const Product& product, const fewbit_input& x, bool add) {
  const fewbit_weight& w = *product.weight;
  for (int64_t token = 0; token < x.tokens && !add; token++)
    memset(product.y + token * product.y_stride, 0, static_cast<size_t>(w.rows) * sizeof(float));
  return fewbit_sparse_add(w.sparse, &x, product.y, product.y_stride, w.isa, means.threads);
}

// `count` terms that one call computes: all but one that y may begin with beside it, and added in their order.
int neighbours(const Means& means, const Product& product, const fewbit_weight* term, int32_t count,
               const fewbit_input& x, bool add) {
  const int64_t rows = product.weight->rows, apart = x.tokens * rows;
  const Room room(means.rooms, count * apart);
  std::vector<Product> products;
  for (int32_t i = 0; i < count; i++) products.push_back({&term[i], room.data() + i * apart, rows});
  if (!add) products[0] = {term, product.y, product.y_stride};
  const int code = multiply_matrices(means, products.data(), count, x);
  if (code != FEWBIT_OK) return code;
  each(means, x.tokens, [&](int64_t token) {
    for (int32_t i = add ? 0 : 1; i < count; i++)
      means.steps->add(product.y + token * product.y_stride, room.data() + i * apart + token * rows, rows);
  });
  return FEWBIT_OK;
}

// Terms of x, which has been scaled.
int terms(const Means& means, const Product& product, const fewbit_input& x, bool add) {
  const fewbit_weight& w = *product.weight;
  for (int64_t begin = 0, end; begin < w.terms; begin = end, add = true) {
    const fewbit_weight* term = &w.term[begin];
    for (end = begin + 1; end < w.terms && together(*term, w.term[end]);) end++;
    const int code = end - begin > 1
                         ? neighbours(means, product, term, static_cast<int32_t>(end - begin), x, add)
                         : onto(means, {term, product.y, product.y_stride}, x, add);
    if (code != FEWBIT_OK) return code;
  }
  return FEWBIT_OK;
}

int scaled_sum(const Means& means, const Product& product, const fewbit_input& x, bool add) {
  const fewbit_weight& w = *product.weight;
  if (!w.row_scale) return terms(means, product, x, add);
  return place(means, product, x.tokens, add, [&](float* y, int64_t y_stride) {
    const int code = terms(means, {&w, y, y_stride}, x, false);
    if (code == FEWBIT_OK)
      scale_tokens(means, {y, x.tokens, y_stride, 1, FEWBIT_FLOAT32}, w.row_scale, w.rows, y, y_stride);
    return code;
  });
}

int sum(const Means& means, const Product& product, const fewbit_input& x, bool add) {
  const fewbit_weight& w = *product.weight;
  if (!w.column_scale) return scaled_sum(means, product, x, add);
  const Room scaled(means.rooms, x.tokens * w.columns);
  scale_tokens(means, x, w.column_scale, w.columns, scaled.data(), w.columns);
  return scaled_sum(means, product, input_of(scaled.data(), x.tokens, w.columns), add);
}

int low_rank(const Means& means, const Product& product, const fewbit_input& x, bool add) {
  const fewbit_weight &w = *product.weight, &right = w.term[0], &left = w.term[1];
  const Room room(means.rooms, x.tokens * right.rows);
  const int code = onto(means, {&right, room.data(), right.rows}, x, false);
  if (code != FEWBIT_OK) return code;
  const fewbit_input inner = input_of(room.data(), x.tokens, right.rows);
  if (w.middle) scale_tokens(means, inner, w.middle, right.rows, room.data(), right.rows);
  return onto(means, {&left, product.y, product.y_stride}, inner, add);
}

int columns(const Means& means, const Product& product, const fewbit_input& x, bool add) {
  const fewbit_weight& w = *product.weight;
  const Room room(means.rooms, x.tokens * w.columns);
  each(means, x.tokens, [&](int64_t token) {
    const float* from = token_of(x, token);
    float* to = room.data() + token * w.columns;
    for (int64_t k = 0; k < w.columns; k++) to[k] = from[w.order[k]];
  });
  fewbit_input beside = input_of(room.data(), x.tokens, w.columns);
  for (int64_t i = 0, first = 0; i < w.terms; first += w.term[i++].columns) {
    beside.data = room.data() + first;
    const int code = onto(means, {&w.term[i], product.y, product.y_stride}, beside, add || i);
    if (code != FEWBIT_OK) return code;
  }
  return FEWBIT_OK;
}

// Where no activation is large, the second term is not read.
int outliers(const Means& means, const Product& product, const fewbit_input& x, bool add) {
  const fewbit_weight& w = *product.weight;
  const Room small(means.rooms, x.tokens * w.columns), large(means.rooms, x.tokens * w.columns);
  bool any = false;
  for (int64_t token = 0; token < x.tokens; token++) {
    const int64_t at = token * w.columns;
    any |= means.steps->split(token_of(x, token), w.threshold, w.columns, small.data() + at, large.data() + at);
  }
  return place(means, product, x.tokens, add, [&](float* y, int64_t y_stride) {
    const int code = onto(means, {&w.term[0], y, y_stride}, input_of(small.data(), x.tokens, w.columns), false);
    if (code != FEWBIT_OK || !any) return code;
    return onto(means, {&w.term[1], y, y_stride}, input_of(large.data(), x.tokens, w.columns), true);
  });
}

int without_bias(const Means& means, const Product& product, const fewbit_input& x, bool add) {
  switch (product.weight->kind) {
    case FEWBIT_SPARSE: return sparse(means, product, x, add);
    case FEWBIT_SUM: return sum(means, product, x, add);
    case FEWBIT_PRODUCT: return low_rank(means, product, x, add);
    case FEWBIT_COLUMNS: return columns(means, product, x, add);
    case FEWBIT_OUTLIERS: return outliers(means, product, x, add);
    default: return FEWBIT_BAD_ARGUMENT;
  }
}

bool is_order(const fewbit_weight& w) {
  std::vector<bool> seen(static_cast<size_t>(w.columns));
  for (int64_t k = 0; k < w.columns; k++) {
    if (w.order[k] < 0 || w.order[k] >= w.columns || seen[static_cast<size_t>(w.order[k])]) return false;
    seen[static_cast<size_t>(w.order[k])] = true;
  }
  return true;
}

int64_t depth_of(const fewbit_weight& w, int64_t most) {
  int64_t deepest = 0;
  for (int64_t i = 0; i < w.terms && w.term && most > 0; i++) {
    const int64_t depth = depth_of(w.term[i], most - 1);
    deepest = depth > deepest ? depth : deepest;
  }
  return deepest + 1;
}

}  // namespace

int onto(const Means& means, const Product& product, const fewbit_input& x, bool add) {
  const fewbit_weight& w = *product.weight;
  if (w.kind < FEWBIT_SPARSE)
    return place(means, product, x.tokens, add, [&](float* y, int64_t y_stride) {
      const Product one = {&w, y, y_stride};
      return multiply_matrices(means, &one, 1, x);
    });
  const int code = without_bias(means, product, x, add);
  if (code == FEWBIT_OK && w.bias)
    each(means, x.tokens,
         [&](int64_t token) { means.steps->add(product.y + token * product.y_stride, w.bias, w.rows); });
  return code;
}

bool has_terms(const fewbit_weight& w) {
  if (w.terms < 1 || !w.term || depth_of(w, kMostDepth) > kMostDepth) return false;
  const bool pair = w.kind == FEWBIT_PRODUCT || w.kind == FEWBIT_OUTLIERS;
  if ((pair && w.terms != 2) || (w.kind == FEWBIT_OUTLIERS && !(w.threshold > 0.0f))) return false;
  for (int64_t i = 0; i < w.terms; i++)
    if (w.term[i].rows < 1 || w.term[i].columns < 1 || w.term[i].rewrite) return false;
  if (w.kind == FEWBIT_PRODUCT)
    return has_shape(w.term[0], w.term[0].rows, w.columns, false) &&
           has_shape(w.term[1], w.rows, w.term[0].rows, false);
  if (w.kind == FEWBIT_COLUMNS && (!w.order || !is_order(w))) return false;
  int64_t columns = 0;
  for (int64_t i = 0; i < w.terms; columns += w.term[i++].columns) {
    const int64_t wide = w.kind == FEWBIT_COLUMNS ? w.term[i].columns : w.columns;
    if (!has_shape(w.term[i], w.rows, wide, false)) return false;
  }
  if (w.kind == FEWBIT_COLUMNS) return columns == w.columns;
  return w.kind == FEWBIT_SUM || w.kind == FEWBIT_OUTLIERS;
}

}  // namespace fewbit

extern "C" int fewbit_weight_multiply(const fewbit_weight* weight, const float* x, int64_t tokens, float* y,
                                      int32_t isa, int32_t threads) {
  using namespace fewbit;
  const Steps* steps = steps_of(isa);
  if (!steps || !weight || !x || !y || tokens < 0 || threads < 1) return FEWBIT_BAD_ARGUMENT;
  try {
    if (weight->rows < 1 || weight->columns < 1 || !has_shape(*weight, weight->rows, weight->columns, false))
      return FEWBIT_BAD_ARGUMENT;
    std::vector<float> rewritten;
    std::vector<fewbit_output> outputs;
    Rooms rooms;
    const Means means = {steps, thread_count(threads), &rewritten, &outputs, &rooms};
    const Product product = {weight, y, weight->rows};
    return multiply(means, &product, 1, x, weight->columns, tokens);
  } catch (const std::bad_alloc&) {
    return FEWBIT_NO_MEMORY;
  }
}
