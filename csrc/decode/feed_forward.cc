// SPDX-License-Identifier: Apache-2.0
// The half of a block that sees one token at a time: a gated MLP, or several of which a router chooses.
#include <string.h>

#include "decode/decoder.h"

namespace fewbit {
namespace {

int gated(const fewbit_model& model, const fewbit_mlp& mlp, const Means& means, const float* x, int64_t rows,
          Scratch* scratch, float* out) {
  const int64_t inner = mlp.down.columns;
  float* wide = room_for(&scratch->wide, rows * 2 * inner);
  float* narrow = room_for(&scratch->narrow, rows * inner);
  const Product up[] = {{&mlp.gate, wide, 2 * inner}, {&mlp.up, wide + inner, 2 * inner}};
  const int code = multiply(means, up, mlp.up.kind == FEWBIT_ABSENT ? 1 : 2, x, model.hidden, rows);
  if (code != FEWBIT_OK) return code;
  spread(rows, threads_for(means, rows), [&](int64_t row) {
    const float* gates = wide + row * 2 * inner;
    means.steps->gate(model.activation, gates, gates + inner, inner, narrow + row * inner);
  });
  const Product down = {&mlp.down, out, model.hidden};
  return multiply(means, &down, 1, narrow, inner, rows);
}

// The weights of the `chosen` largest of `count` stay, the others become 0; of equal ones the first.
void keep_largest(float* shares, int64_t count, int64_t chosen, bool normalise) {
  std::vector<bool> taken(static_cast<size_t>(count));
  float total = 0.0f;
  for (int64_t c = 0; c < chosen; c++) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; e++)
      if (!taken[static_cast<size_t>(e)] && (best < 0 || shares[e] > shares[best])) best = e;
    taken[static_cast<size_t>(best)] = true;
    total += shares[best];
  }
  for (int64_t e = 0; e < count; e++)
    shares[e] = !taken[static_cast<size_t>(e)] ? 0.0f : normalise ? shares[e] / total : shares[e];
}

// out += the share of each chosen expert times what it makes, expert by expert in their order.
int experts(const fewbit_model& model, const fewbit_block& block, const Means& means, const float* x, int64_t rows,
            Scratch* scratch, float* out) {
  const int64_t count = block.experts, hidden = model.hidden;
  float* shares = room_for(&scratch->shares, rows * count);
  const Product router = {&block.router, shares, count};
  int code = multiply(means, &router, 1, x, hidden, rows);
  if (code != FEWBIT_OK) return code;
  for (int64_t row = 0; row < rows; row++) {
    means.steps->softmax(shares + row * count, count);
    keep_largest(shares + row * count, count, model.experts_per_token, block.normalise);
  }
  float* gathered = room_for(&scratch->gathered, rows * hidden);
  float* made = room_for(&scratch->expert_out, rows * hidden);
  for (int64_t e = 0; e < count; e++) {
    int64_t some = 0;
    for (int64_t row = 0; row < rows; row++)
      if (shares[row * count + e] != 0.0f)
        memcpy(gathered + some++ * hidden, x + row * hidden, static_cast<size_t>(hidden) * sizeof(float));
    if (!some) continue;
    if ((code = gated(model, block.expert[e], means, gathered, some, scratch, made)) != FEWBIT_OK) return code;
    for (int64_t row = 0, at = 0; row < rows; row++)
      if (const float share = shares[row * count + e]; share != 0.0f)
        means.steps->add_share(out + row * hidden, share, made + at++ * hidden, hidden);
  }
  return FEWBIT_OK;
}

// out += the expert that all tokens share, times the sigmoid of its gate where it has one.
int shared_expert(const fewbit_model& model, const fewbit_block& block, const Means& means, const float* x,
                  int64_t rows, Scratch* scratch, float* out) {
  float* made = room_for(&scratch->expert_out, rows * model.hidden);
  int code = gated(model, block.mlp, means, x, rows, scratch, made);
  if (code != FEWBIT_OK) return code;
  float* shares = room_for(&scratch->shares, rows * 2);
  memset(shares, 0, static_cast<size_t>(rows * 2) * sizeof(float));
  if (block.shared_gate.kind != FEWBIT_ABSENT) {
    const Product gate = {&block.shared_gate, shares, 2};
    if ((code = multiply(means, &gate, 1, x, model.hidden, rows)) != FEWBIT_OK) return code;
  }
  for (int64_t row = 0; row < rows; row++) {
    float share = 1.0f;
    if (block.shared_gate.kind != FEWBIT_ABSENT) {  // the sigmoid is the first of the softmax of (z, 0)
      means.steps->softmax(shares + row * 2, 2);
      share = shares[row * 2];
    }
    means.steps->add_share(out + row * model.hidden, share, made + row * model.hidden, model.hidden);
  }
  return FEWBIT_OK;
}

}  // namespace

int feed_forward(const fewbit_model& model, const fewbit_block& block, const Means& means, const float* x, int64_t rows,
                 Scratch* scratch, float* out) {
  if (!block.experts) return gated(model, block.mlp, means, x, rows, scratch, out);
  memset(out, 0, static_cast<size_t>(rows * model.hidden) * sizeof(float));
  const int code = experts(model, block, means, x, rows, scratch, out);
  if (code != FEWBIT_OK || block.mlp.gate.kind == FEWBIT_ABSENT) return code;
  return shared_expert(model, block, means, x, rows, scratch, out);
}

}  // namespace fewbit
