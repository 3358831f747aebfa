// SPDX-License-Identifier: Apache-2.0
// The state of a decoder, and the parts of a block. All activations are (rows, ...) float32, a row being a token.
#pragma once

#include <vector>

#include "decode/cache.h"
#include "decode/weights.h"

namespace fewbit {

enum : int64_t { kChunk = 128 };  // rows that go through the blocks together: at most

// Memory that grows to what the widest pass needs, and is used again.
struct Scratch {
  std::vector<float> x, normed, qkv, attended, wide, narrow, out, cosines, sines, row, rewritten;
  std::vector<float> shares, gathered, expert_out;
  std::vector<fewbit_output> outputs;
  Rooms rooms;
};

// Consecutive rows of one sequence.
struct Run {
  int64_t sequence, position, row, count;  // position of the first
  bool places;  // whether each head's keys and values are put in their places by the one unit that sees them
  std::vector<const uint8_t*> blocks;
  std::vector<uint8_t> closed;
};

// Rows of a run whose queries go through the keys together, for one head of keys and some of the heads that share it.
struct Unit {
  const Run* run;
  int64_t kv_head, head, heads, row, count;
};

struct Pass {
  std::vector<Run> runs;
  std::vector<Unit> units;
  std::vector<int32_t> tokens;            // (rows)
  std::vector<int64_t> positions;         // (rows)
  std::vector<int64_t> wanted, outputs;   // rows whose logits are, and which rows of the logits these become
  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }
};

// out, (rows, hidden), = the MLP or the experts of a block, of x (rows, hidden).
int feed_forward(const fewbit_model& model, const fewbit_block& block, const Means& means, const float* x, int64_t rows,
                 Scratch* scratch, float* out);

}  // namespace fewbit

struct fewbit_decoder {
  fewbit_model model;
  const fewbit::Steps& steps;
  fewbit::Cache cache;
  fewbit::Scratch scratch;
  fewbit::Pass pass;
};
