// SPDX-License-Identifier: Apache-2.0
// The forward pass of fewbit_decode.h: rows of all sequences go through the blocks together, at most kChunk at a time.
#include "decode/decoder.h"

#include <math.h>
#include <string.h>

#include <memory>
#include <new>

#include "core/products.h"

namespace fewbit {

const Steps* steps_of(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (float_isa(isa)) {
    case FEWBIT_SERIAL: return &decode_steps_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return &decode_steps_avx2;
    case FEWBIT_AVX512: return &decode_steps_avx512;
#elif defined(__aarch64__)
    case FEWBIT_NEON: return &decode_steps_neon;
#endif
    default: return nullptr;
  }
}

const Steps& best_steps() {
  for (const int32_t isa : {FEWBIT_AVX512, FEWBIT_AVX2, FEWBIT_NEON})
    if (const Steps* steps = steps_of(isa)) return *steps;
  return decode_steps_serial;
}

namespace {

constexpr int64_t kSmallAttention = 1 << 15;  // keys times dimensions below which one thread is as fast

// Cosines and sines of every row, (ropes, rows, pairs of the widest).
void turn(fewbit_decoder* d, int64_t pairs) {
  const int64_t rows = d->pass.rows();
  float* cosines = room_for(&d->scratch.cosines, d->model.ropes * rows * pairs);
  float* sines = room_for(&d->scratch.sines, d->model.ropes * rows * pairs);
  for (int64_t r = 0; r < d->model.ropes; r++) {
    const fewbit_rope& rope = d->model.rope[r];
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = 0; i < rope.pairs; i++) {
        const float angle = static_cast<float>(d->pass.positions[static_cast<size_t>(row)]) * rope.frequency[i];
        const int64_t at = (r * rows + row) * pairs + i;
        cosines[at] = cosf(angle) * rope.scale, sines[at] = sinf(angle) * rope.scale;
      }
  }
}

int64_t most_pairs(const fewbit_model& model) {
  int64_t most = 0;
  for (int64_t r = 0; r < model.ropes; r++) most = model.rope[r].pairs > most ? model.rope[r].pairs : most;
  return most;
}

// One head of keys of a row, and the queries that share it, are normed and rotated; keys and values go to the cache.
void place_head(fewbit_decoder* d, const fewbit_block& block, int64_t layer, const Run& run, int64_t row,
                int64_t kv_head) {
  const fewbit_model& m = d->model;
  const Steps& steps = d->steps;
  const fewbit_rope& rope = m.rope[block.rope];
  const int64_t dim = m.head_dim, group = m.heads / m.kv_heads;
  float* q = d->scratch.qkv.data() + row * (m.heads + 2 * m.kv_heads) * dim;
  float *key = q + (m.heads + kv_head) * dim, *value = key + m.kv_heads * dim;
  const int64_t at = (block.rope * d->pass.rows() + row) * most_pairs(m);
  const auto turned = [&](float* head, const float* weight) {
    if (weight) steps.norm(head, weight, m.eps, dim, head);
    steps.rotate(head, rope.pairs, d->scratch.cosines.data() + at, d->scratch.sines.data() + at);
  };
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) turned(q + h * dim, block.q_norm);
  turned(key, block.k_norm);
  const int64_t position = run.position + row - run.row;
  steps.append(d->cache.open(), d->cache.place(run.sequence, position, layer, kv_head), position % kBlock, key, value);
}

// The first head that a unit reads, as AttentionTask wants it; null of a unit of many rows, which reads little beside what
// it computes.
const uint8_t* first_head(const fewbit_decoder* d, const fewbit_block& block, int64_t layer, const Unit& unit) {
  const Run& run = *unit.run;
  if (!run.places) return nullptr;
  const int64_t seen = block.window && run.position >= block.window ? run.position - block.window + 1 : 0;
  const auto at = static_cast<size_t>(seen / kBlock);
  const int64_t head = layer * d->model.kv_heads + unit.kv_head;
  return run.blocks[at] + head * (run.closed[at] ? d->cache.closed() : d->cache.open()).bytes;
}

// Fetches where a unit will write its key and its value: a line for every other dimension.
void fetch_place(fewbit_decoder* d, int64_t layer, const Unit& unit) {
  const Run& run = *unit.run;
  if (!run.places) return;
  const HeadLayout& open = d->cache.open();
  const int64_t position = run.position + unit.row - run.row, tile = position % kBlock / kTile;
  const uint8_t* head = d->cache.place(run.sequence, position, layer, unit.kv_head);
  for (int64_t at = 0; at < open.key_tile; at += 64) __builtin_prefetch(head + tile * open.key_tile + at, 1);
  const uint8_t* value = head + open.values + tile * open.value_tile + position % kTile * (open.value_tile / kTile);
  for (int64_t at = 0; at < open.value_tile / kTile; at += 64) __builtin_prefetch(value + at, 1);
}

// `next`: the unit that this thread is likely to take after it, or null.
void attend_unit(fewbit_decoder* d, const fewbit_block& block, int64_t layer, const Unit& unit, const Unit* next) {
  const fewbit_model& m = d->model;
  const int64_t dim = m.head_dim, width = (m.heads + 2 * m.kv_heads) * dim;
  const Run& run = *unit.run;
  if (run.places) place_head(d, block, layer, run, unit.row, unit.kv_head);
  Query queries[kQueries];
  int64_t count = 0;
  for (int64_t row = unit.row; row < unit.row + unit.count; row++)
    for (int64_t h = unit.head; h < unit.head + unit.heads; h++)
      queries[count++] = {d->scratch.qkv.data() + row * width + h * dim,
                          d->scratch.attended.data() + (row * m.heads + h) * dim, run.position + row - run.row};
  const int64_t head = layer * m.kv_heads + unit.kv_head;
  const HeadLayout &open = d->cache.open(), &closed = d->cache.closed();
  const uint8_t* ahead = next ? first_head(d, block, layer, *next) : nullptr;
  if (next) fetch_place(d, layer, *next);
  d->steps.attend({open, closed, run.blocks.data(), run.closed.data(), head * open.bytes, head * closed.bytes, queries,
                   count, block.window, m.query_scale, m.attention_cap, ahead});
}

// attended = softmax(q k^T) v of every row.
int attention(fewbit_decoder* d, const Means& means, const fewbit_block& block, int64_t layer, const float* x) {
  const fewbit_model& m = d->model;
  const int64_t rows = d->pass.rows(), dim = m.head_dim, width = (m.heads + 2 * m.kv_heads) * dim;
  float* qkv = room_for(&d->scratch.qkv, rows * width);
  room_for(&d->scratch.attended, rows * m.heads * dim);
  const Product products[] = {{&block.q, qkv, width},
                              {&block.k, qkv + m.heads * dim, width},
                              {&block.v, qkv + (m.heads + m.kv_heads) * dim, width}};
  const int code = multiply(means, products, 3, x, m.hidden, rows);
  if (code != FEWBIT_OK) return code;
  int64_t seen = 0;
  for (const Run& run : d->pass.runs) {
    if (!run.places)
      spread(run.count, threads_for(means, run.count), [&](int64_t i) {
        for (int64_t h = 0; h < m.kv_heads; h++) place_head(d, block, layer, run, run.row + i, h);
      });
    seen += (run.position + run.count) * run.count * m.heads * dim;
  }
  const std::vector<Unit>& units = d->pass.units;
  const int32_t threads = seen < kSmallAttention ? 1 : means.threads;
  spread(static_cast<int64_t>(units.size()), threads, [&](int64_t i) {
    const size_t at = static_cast<size_t>(i), next = at + 1;
    attend_unit(d, block, layer, units[at], next < units.size() ? &units[next] : nullptr);
  });
  return FEWBIT_OK;
}

// Rows `kept` of memory (rows, width) move to its beginning; they ascend.
void gather(float* memory, int64_t width, const std::vector<int64_t>& kept) {
  for (size_t i = 0; i < kept.size(); i++)
    memmove(memory + static_cast<int64_t>(i) * width, memory + kept[i] * width,
            static_cast<size_t>(width) * sizeof(float));
}

// x += y, y normed first where there is a weight for that.
void join(const fewbit_decoder* d, const Means& means, const float* weight, float* x, float* y, int64_t rows) {
  const int64_t hidden = d->model.hidden;
  spread(rows, threads_for(means, rows), [&](int64_t row) {
    if (weight) d->steps.norm(y + row * hidden, weight, d->model.eps, hidden, y + row * hidden);
    d->steps.add(x + row * hidden, y + row * hidden, hidden);
  });
}

void norm_rows(const fewbit_decoder* d, const Means& means, const float* weight, const float* x, int64_t rows,
               float* out) {
  const int64_t hidden = d->model.hidden;
  spread(rows, threads_for(means, rows), [&](int64_t row) {
    d->steps.norm(x + row * hidden, weight, d->model.eps, hidden, out + row * hidden);
  });
}

// One block; of the last one, what follows attention is computed for the wanted rows alone. Returns their number in `rows`.
int run_block(fewbit_decoder* d, const Means& means, int64_t layer, int64_t* rows) {
  const fewbit_model& m = d->model;
  const fewbit_block& block = m.block[layer];
  const int64_t hidden = m.hidden, width = m.heads * m.head_dim;
  float *x = d->scratch.x.data(), *normed = d->scratch.normed.data(), *out = d->scratch.out.data();
  norm_rows(d, means, block.norm, x, *rows, normed);
  int code = attention(d, means, block, layer, normed);
  if (code != FEWBIT_OK) return code;
  if (layer + 1 == m.layers) {
    *rows = static_cast<int64_t>(d->pass.wanted.size());
    gather(x, hidden, d->pass.wanted);
    gather(d->scratch.attended.data(), width, d->pass.wanted);
    if (!*rows) return FEWBIT_OK;
  }
  const Product output = {&block.o, out, hidden};
  if ((code = multiply(means, &output, 1, d->scratch.attended.data(), width, *rows)) != FEWBIT_OK) return code;
  join(d, means, block.norm_after, x, out, *rows);
  norm_rows(d, means, block.mlp_norm, x, *rows, normed);
  code = feed_forward(m, block, means, normed, *rows, &d->scratch, out);
  if (code == FEWBIT_OK) join(d, means, block.mlp_norm_after, x, out, *rows);
  return code;
}

int run_pass(fewbit_decoder* d, const Means& means, float* logits) {
  const fewbit_model& m = d->model;
  int64_t rows = d->pass.rows();
  float* x = room_for(&d->scratch.x, rows * m.hidden);
  room_for(&d->scratch.normed, rows * m.hidden);
  room_for(&d->scratch.out, rows * m.hidden);
  int code = FEWBIT_OK;
  for (int64_t row = 0; row < rows && code == FEWBIT_OK; row++)
    code = look_up(m.embedding, d->pass.tokens[static_cast<size_t>(row)], m.embedding_scale, &d->scratch.row,
                   x + row * m.hidden);
  turn(d, most_pairs(m));
  for (int64_t layer = 0; layer < m.layers && code == FEWBIT_OK; layer++) code = run_block(d, means, layer, &rows);
  if (code != FEWBIT_OK || !rows) return code;
  float* normed = d->scratch.normed.data();
  norm_rows(d, means, m.norm, x, rows, normed);
  // Wanted rows come in the order of the parts, so that those of the logits follow one another.
  float* first = logits + d->pass.outputs[0] * m.vocabulary;
  const Product head = {&m.head, first, m.vocabulary};
  if ((code = multiply(means, &head, 1, normed, m.hidden, rows)) != FEWBIT_OK) return code;
  if (m.logit_cap != 0.0f || m.logit_scale != 1.0f)
    for (int64_t row = 0; row < rows; row++)
      d->steps.cap(first + row * m.vocabulary, m.logit_scale, m.logit_cap, m.vocabulary);
  return FEWBIT_OK;
}

// Units of attention: as many rows of a run and heads of queries as go through the keys together.
void divide(const fewbit_model& m, Pass* pass) {
  const int64_t group = m.heads / m.kv_heads, heads = least(group, kQueries), rows = kQueries / heads;
  pass->units.clear();
  for (const Run& run : pass->runs)
    for (int64_t row = 0; row < run.count; row += rows)
      for (int64_t h = 0; h < m.kv_heads; h++)
        for (int64_t first = 0; first < group; first += heads)
          pass->units.push_back({&run, h, h * group + first, least(heads, group - first), run.row + row,
                                 least(rows, run.count - row)});
}

// The next rows of the parts, of which `done` tokens have gone through; where there is one that has not, true. Parts are
// taken in their order.
bool next_pass(fewbit_decoder* d, const fewbit_part* parts, int64_t count, bool every, std::vector<int64_t>* done) {
  Pass& pass = d->pass;
  pass.runs.clear(), pass.tokens.clear(), pass.positions.clear(), pass.wanted.clear(), pass.outputs.clear();
  const int64_t group = d->model.heads / d->model.kv_heads;
  int64_t tokens = 0;  // of the parts before
  for (int64_t p = 0; p < count && pass.rows() < kChunk; tokens += parts[p++].count) {
    const int64_t before = (*done)[static_cast<size_t>(p)], left = parts[p].count - before;
    if (!left) continue;
    const int64_t some = d->cache.room(parts[p].sequence, least(left, kChunk - pass.rows()));
    const int64_t position = d->cache.length(parts[p].sequence);
    pass.runs.push_back({parts[p].sequence, position, pass.rows(), some, some == 1 && group <= kQueries, {}, {}});
    for (int64_t i = 0; i < some; i++) {
      if (every || i + 1 == left) {
        pass.wanted.push_back(pass.rows());
        pass.outputs.push_back(every ? tokens + before + i : p);
      }
      pass.tokens.push_back(parts[p].tokens[before + i]);
      pass.positions.push_back(position + i);
    }
    (*done)[static_cast<size_t>(p)] += some;
    if (some < left) break;  // logits of a pass follow one another: no later part ends before this one
  }
  for (Run& run : pass.runs) {
    d->cache.reserve(run.sequence, run.count);
    d->cache.list(run.sequence, &run.blocks, &run.closed);
  }
  divide(d->model, &pass);
  return !pass.runs.empty();
}

int feed(fewbit_decoder* d, const fewbit_part* parts, int64_t count, bool every, float* logits, const Means& means) {
  std::vector<int64_t> done(static_cast<size_t>(count));
  while (next_pass(d, parts, count, every, &done)) {
    const int code = run_pass(d, means, logits);
    if (code != FEWBIT_OK) return code;
    for (const Run& run : d->pass.runs) d->cache.advance(run.sequence, run.count);
  }
  return FEWBIT_OK;
}

bool sensible(const fewbit_model& m, const fewbit_mlp& mlp, bool may_be_absent) {
  if (mlp.gate.kind == FEWBIT_ABSENT) return may_be_absent;
  const int64_t inner = mlp.down.columns, rows = mlp.up.kind == FEWBIT_ABSENT ? 2 * inner : inner;
  return inner > 0 && has_shape(mlp.down, m.hidden, inner, false) && has_shape(mlp.gate, rows, m.hidden, false) &&
         has_shape(mlp.up, inner, m.hidden, true);
}

bool sensible(const fewbit_model& m, const fewbit_block& b) {
  const int64_t width = m.heads * m.head_dim, kv_width = m.kv_heads * m.head_dim;
  if (!b.norm || !b.mlp_norm || b.window < 0 || b.rope < 0 || b.rope >= m.ropes || b.experts < 0) return false;
  if (!has_shape(b.q, width, m.hidden, false) || !has_shape(b.k, kv_width, m.hidden, false) ||
      !has_shape(b.v, kv_width, m.hidden, false) || !has_shape(b.o, m.hidden, width, false) ||
      !sensible(m, b.mlp, b.experts > 0))
    return false;
  if (!b.experts) return true;
  if (!b.expert || m.experts_per_token < 1 || m.experts_per_token > b.experts ||
      !has_shape(b.router, b.experts, m.hidden, false) || !has_shape(b.shared_gate, 1, m.hidden, true))
    return false;
  for (int64_t e = 0; e < b.experts; e++)
    if (!sensible(m, b.expert[e], false)) return false;
  return true;
}

bool sensible(const fewbit_model& m) {
  if (m.bytes != static_cast<int64_t>(sizeof m) || m.hidden < 1 || m.heads < 1 || m.kv_heads < 1 || m.layers < 1 ||
      m.heads % m.kv_heads || m.head_dim < 1 || m.head_dim > kMostHeadDim || m.vocabulary < 1 || m.ropes < 1 || !m.norm ||
      !m.rope || !m.block)
    return false;
  if (!has_shape(m.embedding, m.vocabulary, m.hidden, false) || !has_rows(m.embedding) ||
      !has_shape(m.head, m.vocabulary, m.hidden, false))
    return false;
  for (int64_t r = 0; r < m.ropes; r++)
    if (m.rope[r].pairs < 0 || 2 * m.rope[r].pairs > m.head_dim || !m.rope[r].frequency) return false;
  for (int64_t layer = 0; layer < m.layers; layer++)
    if (!sensible(m, m.block[layer])) return false;
  return true;
}

bool is_sequence(const fewbit_decoder* d, int64_t sequence) {
  return d && sequence >= 0 && sequence < d->cache.sequences();
}

bool sensible(const fewbit_decoder* d, const fewbit_part* parts, int64_t count) {
  for (int64_t p = 0; p < count; p++) {
    if (!is_sequence(d, parts[p].sequence) || parts[p].count < 1 || !parts[p].tokens) return false;
    for (int64_t i = 0; i < p; i++)
      if (parts[i].sequence == parts[p].sequence) return false;
    for (int64_t i = 0; i < parts[p].count; i++)
      if (parts[p].tokens[i] < 0 || parts[p].tokens[i] >= d->model.vocabulary) return false;
  }
  return true;
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_decoder_new(const fewbit_model* model, int32_t kv, int64_t sequences, fewbit_decoder** out) {
  using namespace fewbit;
  if (!out) return FEWBIT_BAD_ARGUMENT;
  *out = nullptr;
  try {
    if (!model || !sensible(*model) || kv < FEWBIT_FLOAT32 || kv > FEWBIT_KV_INT4 || sequences < 1)
      return FEWBIT_BAD_ARGUMENT;
    const Steps* steps = steps_of(model->isa);
    if (!steps) return FEWBIT_NO_KERNEL;
    Cache cache(*steps, kv, model->layers, model->kv_heads, model->head_dim, sequences);
    *out = new fewbit_decoder{*model, *steps, std::move(cache), {}, {}};
  } catch (const std::bad_alloc&) {
    return FEWBIT_NO_MEMORY;
  }
  return FEWBIT_OK;
}

extern "C" void fewbit_decoder_free(fewbit_decoder* decoder) { delete decoder; }

extern "C" int fewbit_decoder_feed(fewbit_decoder* decoder, const fewbit_part* parts, int64_t count, int32_t every,
                                   float* logits, int32_t threads) {
  using namespace fewbit;
  if (!decoder || !parts || count < 1 || !logits || threads < 1 || !sensible(decoder, parts, count))
    return FEWBIT_BAD_ARGUMENT;
  int code = FEWBIT_NO_MEMORY;
  std::vector<int64_t> lengths;
  try {
    for (int64_t p = 0; p < count; p++) lengths.push_back(decoder->cache.length(parts[p].sequence));
    Scratch& scratch = decoder->scratch;
    code = feed(decoder, parts, count, every != 0, logits,
                {&decoder->steps, thread_count(threads), &scratch.rewritten, &scratch.outputs, &scratch.rooms});
  } catch (const std::bad_alloc&) {
  }
  if (code != FEWBIT_OK)
    for (size_t p = 0; p < lengths.size(); p++)
      decoder->cache.keep(parts[p].sequence, parts[p].sequence, lengths[p]);
  return code;
}

extern "C" int64_t fewbit_decoder_length(const fewbit_decoder* decoder, int64_t sequence) {
  return fewbit::is_sequence(decoder, sequence) ? decoder->cache.length(sequence) : -1;
}

extern "C" int fewbit_decoder_keep(fewbit_decoder* decoder, int64_t from, int64_t to, int64_t length) {
  using namespace fewbit;
  if (!is_sequence(decoder, from) || !is_sequence(decoder, to) || length < 0 || length > decoder->cache.length(from))
    return FEWBIT_BAD_ARGUMENT;
  try {
    decoder->cache.keep(from, to, length);
  } catch (const std::bad_alloc&) {
    return FEWBIT_NO_MEMORY;
  }
  return FEWBIT_OK;
}

extern "C" int64_t fewbit_decoder_bytes(const fewbit_decoder* decoder) { return decoder ? decoder->cache.bytes() : 0; }
