// SPDX-License-Identifier: Apache-2.0
// The decoder's steps against double precision under every instruction set, and a whole decoder of dense matrices: cut in
// pieces, forked and cut back it must give the same bits. Buffers have exactly the size they need.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "core/dtypes.h"
#include "decode/steps.h"

namespace {

using fewbit::HeadLayout;
using fewbit::Query;
using fewbit::Steps;
using fewbit::kBlock;

typedef std::vector<float> Floats;

int failures = 0;
std::mt19937 generator(11);

Floats random_floats(int64_t count, float width) {
  std::normal_distribution<float> normal(0, width);
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

void expect(bool good, const char* what, int64_t detail) {
  if (good) return;
  failures++;
  printf("decode: %s, %lld\n", what, static_cast<long long>(detail));
}

void near(float found, double expected, double tolerance, const char* what, int64_t detail) {
  if (fabs(static_cast<double>(found) - expected) <= tolerance) return;
  failures++;
  printf("decode: %s, %lld: %.9g instead of %.9g\n", what, static_cast<long long>(detail), static_cast<double>(found),
         expected);
}

void check_norm(const Steps& steps, int64_t count) {
  const Floats x = random_floats(count, 3), weight = random_floats(count, 1);
  Floats out(x.size());
  steps.norm(x.data(), weight.data(), 1e-5f, count, out.data());
  double square = 0;
  for (float value : x) square += static_cast<double>(value) * value;
  const double factor = 1 / sqrt(square / static_cast<double>(count) + 1e-5);
  for (size_t i = 0; i < x.size(); i++)
    near(out[i], x[i] * factor * weight[i], 1e-6 * fabs(x[i] * factor * weight[i]), "norm", count);
}

void check_functions(const Steps& steps, int64_t count) {
  const Floats gates = random_floats(count, 6), up = random_floats(count, 2);
  Floats out(gates.size());
  for (int32_t activation = 0; activation < 3; activation++) {
    steps.gate(activation, gates.data(), up.data(), count, out.data());
    for (size_t i = 0; i < gates.size(); i++) {
      const double g = gates[i], cube = 0.044715 * g * g * g;
      const double act = activation == FEWBIT_SILU        ? g / (1 + exp(-g))
                         : activation == FEWBIT_GELU_TANH ? 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + cube)))
                                                          : 0.5 * g * (1 + erf(g / sqrt(2.0)));
      // Where the Gaussian's tail is small, so is 1 + erf, of numbers that were rounded to 2^-24.
      near(out[i], act * up[i], (3e-6 * fabs(act) + 2e-7 * fabs(g)) * fabs(up[i]), "gate", activation);
    }
  }
  out = gates;
  steps.cap(out.data(), 0.5f, 7.0f, count);
  for (size_t i = 0; i < gates.size(); i++) near(out[i], 7 * tanh(gates[i] * 0.5 / 7), 3e-6, "cap", count);
  out = gates;
  steps.softmax(out.data(), count);
  double most = gates[0], total = 0;
  for (float gate : gates) most = fmax(most, gate);
  for (float gate : gates) total += exp(gate - most);
  for (size_t i = 0; i < gates.size(); i++) near(out[i], exp(gates[i] - most) / total, 2e-6, "softmax", count);
}

void check_largest(const Steps& steps, int64_t count) {
  Floats x = random_floats(count, 1);
  for (size_t at = 0; at < x.size(); at++) {
    const float before = x[at];
    x[at] = 9;
    expect(steps.largest(x.data(), count) == 9, "largest", count);
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      x[at] = bad;
      expect(isnan(steps.largest(x.data(), count)), "largest of what is not finite", count);
    }
    x[at] = before;
  }
  for (float& value : x) value = -1;
  expect(steps.largest(x.data(), count) == -1, "largest of equals", count);
}

// Against double precision, and the same bits as without vectors: a seed gives one text everywhere.
void check_draw(const Steps& steps, int64_t count) {
  const Floats x = random_floats(count, 20);
  const float most = steps.largest(x.data(), count), temperature = 0.7f;
  const fewbit::Candidate last = {x[x.size() / 2], static_cast<int32_t>(count / 2)};
  Floats found = x, serial = x;
  steps.shares(found.data(), count, most, temperature, last);
  fewbit::decode_steps_serial.shares(serial.data(), count, most, temperature, last);
  expect(found == serial, "shares, beside serial", count);
  for (size_t i = 0; i < x.size(); i++) {
    const double exact = x[i] < last.value ? 0 : exp((static_cast<double>(x[i]) - most) / temperature);
    near(found[i], exact, 1e-5 * exact + 1e-37, "shares", count);
  }
  expect(steps.sum(found.data(), count) == fewbit::decode_steps_serial.sum(serial.data(), count), "sum", count);
  const fewbit::Candidate worst = {found[0], 0};
  steps.cut(found.data(), count, 1e-3f, worst);
  for (size_t i = 0; i < x.size(); i++) {
    const bool stays = (serial[i] > worst.value || i == 0) && serial[i] >= 1e-3f;
    expect(found[i] == (stays ? serial[i] : 0), "cut", count);
  }
}

void check_turns(const Steps& steps, int64_t pairs) {
  const Floats x = random_floats(2 * pairs + 3, 1), angle = random_floats(pairs, 9);
  Floats out = x, cosines, sines;
  for (float a : angle) cosines.push_back(cosf(a)), sines.push_back(sinf(a));
  steps.rotate(out.data(), pairs, cosines.data(), sines.data());
  for (size_t i = 0; i < angle.size(); i++) {
    const double a = x[i], b = x[i + angle.size()], c = cosines[i], s = sines[i];
    near(out[i], a * c - b * s, 1e-6 * (fabs(a) + fabs(b)), "rotate", pairs);
    near(out[i + angle.size()], b * c + a * s, 1e-6 * (fabs(a) + fabs(b)), "rotate", pairs);
  }
  for (size_t i = 2 * angle.size(); i < x.size(); i++) expect(out[i] == x[i], "rotate beyond the pairs", pairs);
}

void check_hadamard(const Steps& steps, int64_t block) {
  const int64_t count = 3 * block;
  const Floats x = random_floats(count, 1);
  Floats out = x;
  steps.hadamard(out.data(), block, count);
  for (int64_t j = 0; j < count; j++) {
    double sum = 0;
    for (int64_t i = 0; i < block; i++)
      sum += (__builtin_popcountll(static_cast<unsigned long long>(i & j % block)) % 2 ? -1.0 : 1.0) *
             x[static_cast<size_t>(j / block * block + i)];
    near(out[static_cast<size_t>(j)], sum, 1e-5 * static_cast<double>(block), "hadamard", block);
  }
}

void check_mix(const Steps& steps, int64_t order, int64_t block) {
  const Floats x = random_floats(order * block, 1), matrix = random_floats(order * order, 1);
  Floats out(x.size(), 7.0f);
  steps.mix(x.data(), matrix.data(), order, block, out.data());
  for (int64_t to = 0; to < order; to++)
    for (int64_t i = 0; i < block; i++) {
      double sum = 0;
      for (int64_t from = 0; from < order; from++)
        sum += static_cast<double>(x[static_cast<size_t>(from * block + i)]) *
               matrix[static_cast<size_t>(from * order + to)];
      near(out[static_cast<size_t>(to * block + i)], sum, 1e-5 * static_cast<double>(order), "mix", order);
    }
}

void check_dense(const Steps& steps, int32_t dtype, int64_t rows, int64_t columns, int64_t tokens) {
  const Floats w = random_floats(rows * columns, 1), x = random_floats(tokens * columns, 1);
  const Floats bias = random_floats(rows, 1);
  std::vector<uint8_t> stored(static_cast<size_t>(rows * columns * fewbit::bytes_of(dtype)));
  for (int64_t i = 0; i < rows * columns; i++)
    fewbit::write_float(stored.data(), dtype, i, w[static_cast<size_t>(i)]);
  Floats y(static_cast<size_t>(tokens * rows));
  steps.dense({stored.data(), dtype, rows, columns, tokens, x.data(), columns, bias.data(), y.data(), rows}, 0, rows);
  Floats row(static_cast<size_t>(columns));
  for (int64_t r = 0; r < rows; r++) {
    const fewbit_input table = {stored.data(), rows, columns, 1, dtype};
    const float* weight = fewbit::floats(table, r, 0, columns, row.data());
    for (int64_t t = 0; t < tokens; t++) {
      double sum = bias[static_cast<size_t>(r)], magnitude = fabs(sum);
      for (int64_t c = 0; c < columns; c++) {
        const double product = static_cast<double>(weight[c]) * x[static_cast<size_t>(t * columns + c)];
        sum += product, magnitude += fabs(product);
      }
      near(y[static_cast<size_t>(t * rows + r)], sum, 1e-6 * magnitude, "dense", columns);
    }
  }
}

// What a codec keeps of x, (positions, dim) of keys or of values: the definition in steps.h and attention.h.
Floats kept(int32_t kv, const Floats& x, int64_t dim) {
  Floats out = x;
  const int32_t dtype = kv > FEWBIT_FLOAT16 ? FEWBIT_FLOAT16 : kv;
  float buffer[1];
  for (float& value : out) {
    uint8_t bytes[4];
    fewbit::write_float(bytes, dtype, 0, value);
    const fewbit_input one = {bytes, 1, 1, 1, dtype};
    value = *fewbit::floats(one, 0, 0, 1, buffer);
  }
  if (kv <= FEWBIT_FLOAT16) return out;
  const float most = kv == FEWBIT_KV_INT8 ? 127.0f : 7.0f;
  for (size_t first = 0; first < out.size(); first += static_cast<size_t>(dim)) {
    float largest = 0;
    for (int64_t d = 0; d < dim; d++) largest = fmaxf(largest, fabsf(out[first + static_cast<size_t>(d)]));
    const float scale = fewbit::from_float16(fewbit::to_float16(fmaxf(largest / most, ldexpf(1, -24))));
    for (int64_t d = 0; d < dim; d++) {
      float& value = out[first + static_cast<size_t>(d)];
      value = scale * fmaxf(fminf(nearbyintf(value / scale), most), -most);
    }
  }
  return out;
}

// Queries at positions around `length` against `length` positions, whole blocks of them codes where kv has these.
void check_attention(const Steps& steps, int32_t kv, int64_t dim, int64_t length, int64_t window, float cap) {
  const HeadLayout closed = fewbit::layout_of(kv, dim);
  const HeadLayout open = fewbit::layout_of(kv > FEWBIT_FLOAT16 ? FEWBIT_FLOAT16 : kv, dim);
  const Floats keys = random_floats(length * dim, 1), values = random_floats(length * dim, 1);
  const int64_t blocks = (length + kBlock - 1) / kBlock;
  std::vector<std::vector<uint8_t>> memory;
  std::vector<const uint8_t*> addresses;
  std::vector<uint8_t> is_closed;
  for (int64_t b = 0; b < blocks; b++) {
    std::vector<uint8_t> block(static_cast<size_t>(open.bytes));
    for (int64_t p = b * kBlock; p < length && p < (b + 1) * kBlock; p++)
      steps.append(open, block.data(), p % kBlock, keys.data() + p * dim, values.data() + p * dim);
    is_closed.push_back(kv > FEWBIT_FLOAT16 && (b + 1) * kBlock <= length);
    if (is_closed.back()) {
      std::vector<uint8_t> codes(static_cast<size_t>(closed.bytes)), again(block.size());
      steps.close(open, block.data(), closed, codes.data());
      steps.reopen(closed, codes.data(), open, again.data());
      block = codes;
      steps.close(open, again.data(), closed, codes.data());
      if (kv == FEWBIT_KV_INT4) expect(codes == block, "codes of reopened codes", dim);
    }
    memory.push_back(block);
  }
  for (const auto& block : memory) addresses.push_back(block.data());
  const Floats coded_keys = kept(kv, keys, dim), coded_values = kept(kv, values, dim);
  const Floats exact_keys = kept(open.kv, keys, dim), exact_values = kept(open.kv, values, dim);
  const int64_t count = length < 7 ? length : 7;
  const Floats q = random_floats(count * dim, 1);
  Floats out(q.size());
  std::vector<Query> queries;
  for (int64_t i = 0; i < count; i++)
    queries.push_back({q.data() + i * dim, out.data() + i * dim, length - count + i});
  const float scale = 1 / sqrtf(static_cast<float>(dim));
  fewbit::AttentionTask task = {open, closed, addresses.data(), is_closed.data(), 0, 0, queries.data(), count, window,
                                scale, cap, nullptr};
  task.next = addresses.back();  // what is fetched early is nothing that results depend on
  steps.attend(task);
  for (int64_t i = 0; i < count; i++) {
    const int64_t last = queries[static_cast<size_t>(i)].position;
    const int64_t first = window && last >= window ? last - window + 1 : 0;
    std::vector<double> sum(static_cast<size_t>(dim));
    double total = 0;
    for (int64_t p = first; p <= last; p++) {
      const bool coded = is_closed[static_cast<size_t>(p / kBlock)];
      const float *key = (coded ? coded_keys : exact_keys).data() + p * dim;
      const float *value = (coded ? coded_values : exact_values).data() + p * dim;
      double score = 0;
      for (int64_t d = 0; d < dim; d++) score += static_cast<double>(q[static_cast<size_t>(i * dim + d)]) * key[d];
      score *= scale;
      const double weight = exp(cap != 0 ? cap * tanh(score / cap) : score);
      total += weight;
      for (int64_t d = 0; d < dim; d++) sum[static_cast<size_t>(d)] += weight * value[d];
    }
    for (int64_t d = 0; d < dim; d++)
      near(out[static_cast<size_t>(i * dim + d)], sum[static_cast<size_t>(d)] / total, 1e-5, "attention", kv);
  }
}

void check_steps(const Steps& steps) {
  for (int64_t count : {1, 7, 16, 31, 97, 576}) {
    check_norm(steps, count), check_functions(steps, count);
    check_largest(steps, count), check_draw(steps, count);
  }
  for (int64_t pairs : {1, 4, 33}) check_turns(steps, pairs);
  for (int64_t block : {1, 2, 8, 64}) {
    check_hadamard(steps, block);
    for (int64_t order : {12, 7}) check_mix(steps, order, block);
  }
  for (int32_t dtype = FEWBIT_FLOAT32; dtype <= FEWBIT_FLOAT16; dtype++)
    for (int64_t columns : {1, 7, 31, 33, 97}) check_dense(steps, dtype, 13, columns, 6);
  for (int32_t kv = FEWBIT_FLOAT32; kv <= FEWBIT_KV_INT4; kv++)
    for (int64_t dim : {1, 8, 33, 64})
      for (int64_t length : {1, 17, 64, 200})
        for (int64_t window : {0, 5, 70}) check_attention(steps, kv, dim, length, window, window == 5 ? 2.0f : 0.0f);
  for (int32_t kv = FEWBIT_FLOAT32; kv <= FEWBIT_KV_INT4; kv++)  // several spans
    for (int64_t window : {0, 70, 600}) check_attention(steps, kv, 40, 2 * fewbit::kSpan + 3, window, 0.0f);
}

// A Llama of two blocks in float32, 13 wide, with everything that it points to.
struct Tiny {
  std::vector<Floats> arrays;
  fewbit_block block[2] = {};
  fewbit_rope rope = {};
  fewbit_model model = {};

  const float* array(int64_t count, float width) {
    arrays.push_back(random_floats(count, width));
    return arrays.back().data();
  }
  fewbit_weight weight(int64_t rows, int64_t columns) {
    fewbit_weight w = {};
    w.kind = FEWBIT_DENSE, w.rows = rows, w.columns = columns, w.dense = array(rows * columns, 0.3f);
    return w;
  }
  Tiny() {
    arrays.reserve(64);
    const int64_t hidden = 13, dim = 6;
    for (fewbit_block& b : block) {
      b.norm = array(hidden, 1), b.mlp_norm = array(hidden, 1);
      b.q = weight(4 * dim, hidden), b.k = weight(2 * dim, hidden), b.v = weight(2 * dim, hidden);
      b.o = weight(hidden, 4 * dim);
      b.mlp = {weight(9, hidden), weight(9, hidden), weight(hidden, 9)};
    }
    block[1].window = 20;
    rope = {dim / 2, array(dim / 2, 0.5f), 1.0f, 0};
    model.bytes = sizeof model, model.hidden = hidden, model.heads = 4, model.kv_heads = 2, model.head_dim = dim;
    model.vocabulary = 29, model.layers = 2, model.ropes = 1, model.eps = 1e-5f, model.query_scale = 0.4f;
    model.logit_scale = 1, model.embedding_scale = 1, model.isa = FEWBIT_SERIAL, model.rope = &rope;
    model.block = block, model.norm = array(hidden, 1), model.embedding = weight(29, hidden);
    model.head = weight(29, hidden);
  }
};

Floats feed(fewbit_decoder* decoder, int64_t sequence, const std::vector<int32_t>& tokens, size_t begin, size_t end) {
  const std::vector<int32_t> some(tokens.begin() + static_cast<long>(begin), tokens.begin() + static_cast<long>(end));
  const fewbit_part part = {sequence, static_cast<int64_t>(some.size()), some.data()};
  Floats logits(29);
  expect(fewbit_decoder_feed(decoder, &part, 1, 0, logits.data(), 2) == FEWBIT_OK, "feed", sequence);
  return logits;
}

void check_decoder(int32_t kv) {
  const Tiny tiny;
  const size_t all = fewbit::kSpan + 48;
  fewbit_decoder* decoder;
  expect(fewbit_decoder_new(&tiny.model, kv, 3, &decoder) == FEWBIT_OK, "new", kv);
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < all; i++) tokens.push_back(static_cast<int32_t>(generator() % 29));
  const Floats whole = feed(decoder, 0, tokens, 0, all);
  Floats one_by_one, every(300 * 29);
  for (size_t at = 0; at < all; at++) {
    const Floats logits = feed(decoder, 1, tokens, at, at + 1);
    one_by_one.insert(one_by_one.end(), logits.begin(), logits.end());
  }
  expect(Floats(one_by_one.end() - 29, one_by_one.end()) == whole, "token by token", kv);
  const fewbit_part parts[] = {{1, 170, tokens.data()}, {2, 130, tokens.data()}};
  for (const fewbit_part& part : parts) expect(fewbit_decoder_keep(decoder, 1, part.sequence, 0) == FEWBIT_OK, "keep", kv);
  expect(fewbit_decoder_feed(decoder, parts, 2, 1, every.data(), 1) == FEWBIT_OK, "every", kv);
  expect(std::equal(every.begin(), every.begin() + 170 * 29, one_by_one.begin()), "after every token", kv);
  expect(std::equal(every.begin() + 170 * 29, every.end(), one_by_one.begin()), "after every token of the second", kv);
  expect(feed(decoder, 1, tokens, 170, all) == whole, "after every token, one more", kv);
  expect(fewbit_decoder_keep(decoder, 1, 2, 0) == FEWBIT_OK, "keep", kv);
  feed(decoder, 2, tokens, 0, 77), feed(decoder, 2, tokens, 77, 205);
  const int64_t before = fewbit_decoder_bytes(decoder);
  expect(fewbit_decoder_keep(decoder, 2, 1, 200) == FEWBIT_OK, "fork", kv);
  expect(fewbit_decoder_bytes(decoder) < before, "blocks are shared", kv);
  feed(decoder, 1, tokens, 0, 60);  // something else after the fork: the other sequence must not see it
  expect(fewbit_decoder_keep(decoder, 2, 1, 200) == FEWBIT_OK, "fork", kv);
  expect(feed(decoder, 2, tokens, 205, all) == whole, "chunks", kv);
  expect(feed(decoder, 1, tokens, 200, all) == whole, "after a fork", kv);
  expect(fewbit_decoder_length(decoder, 1) == static_cast<int64_t>(all), "length", kv);
  const int32_t wrong[] = {1, 29};
  Floats logits(58);
  const fewbit_part bad[] = {{0, 2, wrong}, {0, 1, wrong}};
  expect(fewbit_decoder_feed(decoder, bad, 1, 0, logits.data(), 1) == FEWBIT_BAD_ARGUMENT, "a token", kv);
  const fewbit_part twice[] = {{0, 1, wrong}, {0, 1, wrong}};
  expect(fewbit_decoder_feed(decoder, twice, 2, 0, logits.data(), 1) == FEWBIT_BAD_ARGUMENT, "a sequence twice", kv);
  expect(fewbit_decoder_keep(decoder, 0, 1, all + 1) == FEWBIT_BAD_ARGUMENT, "keep", kv);
  expect(fewbit_decoder_length(decoder, 0) == static_cast<int64_t>(all) && fewbit_decoder_length(decoder, 3) == -1, "lengths", kv);
  fewbit_decoder_free(decoder);
  fewbit_model other = tiny.model;
  other.bytes--;
  expect(fewbit_decoder_new(&other, kv, 3, &decoder) == FEWBIT_BAD_ARGUMENT && !decoder, "another struct", kv);
}

}  // namespace

int decode_failures() {
  const struct { int32_t flag; const char* name; } rows[] = {
      {FEWBIT_SERIAL, "serial"}, {FEWBIT_AVX2, "avx2"}, {FEWBIT_AVX512, "avx512"}, {FEWBIT_NEON, "neon"}};
  for (const auto& row : rows)
    if (const Steps* steps = fewbit::steps_of(row.flag)) check_steps(*steps), printf("decode on %s\n", row.name);
  for (int32_t kv = FEWBIT_FLOAT32; kv <= FEWBIT_KV_INT4; kv++)  // all on serial: emulated, of codes beside float16
    if (fewbit_caps() & FEWBIT_AVX2 || kv == FEWBIT_KV_INT4) check_decoder(kv);
  return failures;
}
