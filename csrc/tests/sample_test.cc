// SPDX-License-Identifier: Apache-2.0
// Draws from rows of exactly the size they need (so that a sanitizer sees any stray read or write), and Philox against
// the answers that its authors published. The distribution is tested in tests/decode/test_sampling.py.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "../decode/philox.h"
#include "fewbit.h"
#include "fewbit_sample.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  printf("sample: %s\n", what);
  failures++;
}

void check_philox() {
  struct Known {
    fewbit::Words4 counter;
    uint32_t key0, key1;
    fewbit::Words4 out;
  };
  const uint32_t ones = 0xffffffff;
  const Known known[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{ones, ones, ones, ones}}, ones, ones, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       0xa4093822,
       0x299f31d0,
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}};
  for (const Known& k : known) {
    const fewbit::Words4 out = fewbit::philox(k.counter, k.key0, k.key1);
    expect(!memcmp(&out, &k.out, sizeof(out)), "philox differs from its published answers");
  }
}

fewbit_draw plain(std::vector<float>& logits) {
  fewbit_draw draw{};
  draw.logits = logits.data(), draw.vocabulary = static_cast<int64_t>(logits.size());
  draw.temperature = 1, draw.top_p = 1, draw.repetition = 1, draw.seed = 7;
  return draw;
}

int32_t drawn(const fewbit_draw& draw) {
  int32_t token = -2;
  expect(fewbit_sample(&draw, 1, &token, 1) == FEWBIT_OK, "a draw is refused");
  return token;
}

// Every way to cut, on rows of n logits: what comes out is one of those that must stay.
void check_rows(int64_t n, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> row(static_cast<size_t>(n));
  for (float& x : row) x = normal(random);
  if (n > 3) row[static_cast<size_t>(n / 2)] = row[static_cast<size_t>(n - 1)];  // a tie
  std::vector<float> sorted = row;
  std::sort(sorted.rbegin(), sorted.rend());
  const int32_t first = static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
  const float large = 40.0f;
  for (int64_t k : {int64_t{0}, int64_t{1}, int64_t{2}, n / 2, n, 3 * n})
    for (float top_p : {1.0f, 0.9f, 0.0f})
      for (float min_p : {0.0f, 0.05f, 1.0f})
        for (float temperature : {0.0f, 1e-30f, 1.0f, 50.0f}) {
          std::vector<float> logits = row;
          fewbit_draw draw = plain(logits);
          draw.top_k = k, draw.top_p = top_p, draw.min_p = min_p, draw.temperature = temperature;
          draw.position = static_cast<uint64_t>(n);
          const int32_t token = drawn(draw);
          expect(token >= 0 && token < n, "no token is drawn");
          if (token < 0 || token >= n) continue;
          const float value = row[static_cast<size_t>(token)];
          if (k == 1 || top_p == 0 || temperature == 0) expect(token == first, "another than the best is drawn");
          if (min_p == 1 || temperature < 1) expect(value == sorted[0], "less than the best is drawn");
          if (k > 0 && k < n) expect(value >= sorted[static_cast<size_t>(k - 1)], "top_k lets more through");
        }
  std::vector<float> logits = row;
  fewbit_draw draw = plain(logits);
  const int32_t token = static_cast<int32_t>(n - 1), seen[] = {first}, counts[] = {2};
  draw.temperature = 0, draw.biased = &token, draw.bias = &large, draw.bias_count = 1;
  expect(drawn(draw) == token, "a bias is lost");
  logits = row;
  draw = plain(logits);
  draw.temperature = 0, draw.frequency = 100, draw.seen = seen, draw.counts = counts, draw.seen_count = 1;
  expect(n == 1 || row[static_cast<size_t>(first)] < 0 || drawn(draw) != first, "a penalty is lost");
}

// Where a temperature makes all weights one, a draw is the floor(u * kept)-th of the tokens that stay, in their order.
void check_kept(int64_t n, std::mt19937& random) {
  std::vector<float> row(static_cast<size_t>(n));
  for (float& x : row) x = static_cast<float>(random() % 1000);
  std::vector<int32_t> order(row.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
  for (int64_t k : {int64_t{1}, int64_t{3}, n / 7 + 1, n / 2 + 1, n - 1, n})
    for (uint64_t position = 0; position < 8; position++) {
      std::vector<int32_t> kept(order.begin(), order.begin() + std::max<int64_t>(1, std::min(k, n)));
      std::sort(kept.begin(), kept.end());
      std::vector<float> logits = row;
      fewbit_draw draw = plain(logits);
      draw.temperature = 1e30f, draw.position = position, draw.top_k = static_cast<int64_t>(kept.size());
      const double u = fewbit::uniform(draw.seed, position, 0);
      expect(drawn(draw) == kept[static_cast<size_t>(u * static_cast<double>(kept.size()))], "top_k keeps other tokens");
      logits = row;
      draw.top_k = 0, draw.top_p = 0.5f;  // of equal weights the lower half stays
      expect(drawn(draw) == static_cast<int32_t>(u * static_cast<double>((n + 1) / 2)), "top_p keeps other tokens");
    }
}

// The likeliest are those of a stable sort, and all probabilities add up to one.
void check_likeliest(int64_t n, std::mt19937& random) {
  std::vector<float> row(static_cast<size_t>(n));
  for (float& x : row) x = static_cast<float>(random() % 40) - 20;  // with ties
  if (n > 2) row[1] = -INFINITY;
  std::vector<int32_t> order(row.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
  for (int64_t count : {int64_t{0}, int64_t{1}, n / 2, n}) {
    std::vector<int32_t> tokens(static_cast<size_t>(count), -2);
    double log_sum = 0, all = 0;
    expect(fewbit_likeliest(row.data(), n, count, tokens.data(), &log_sum) == FEWBIT_OK, "a row is refused");
    expect(std::equal(tokens.begin(), tokens.end(), order.begin()), "others are the likeliest");
    for (float x : row) all += exp(static_cast<double>(x) - log_sum);
    expect(fabs(all - 1) < 1e-12, "probabilities do not add up to one");
  }
}

void check_refusals() {
  std::vector<float> logits(5, 0.0f);
  int32_t token = 5;
  fewbit_draw draw = plain(logits);
  draw.biased = &token, draw.bias = logits.data(), draw.bias_count = 1;
  expect(fewbit_sample(&draw, 1, &token, 1) == FEWBIT_BAD_ARGUMENT, "a bias beyond the vocabulary is taken");
  draw = plain(logits);
  draw.temperature = NAN;
  expect(fewbit_sample(&draw, 1, &token, 1) == FEWBIT_BAD_ARGUMENT, "a temperature of NaN is taken");
  for (float bad : {NAN, INFINITY}) {
    logits.assign(33, 0.0f);
    for (size_t at : {size_t{0}, size_t{17}, size_t{32}}) {
      logits.assign(33, 0.0f);
      logits[at] = bad;
      expect(drawn(plain(logits)) == -1, "a logit that is no number is drawn from");
    }
  }
  double log_sum = 0;
  expect(fewbit_likeliest(logits.data(), 33, 1, &token, &log_sum) == FEWBIT_OK && token == -1 && isnan(log_sum),
         "a row with infinity has a likeliest token");
  expect(fewbit_likeliest(logits.data(), 33, 34, &token, &log_sum) == FEWBIT_BAD_ARGUMENT, "more than all are found");
  logits.assign(33, -INFINITY);
  expect(drawn(plain(logits)) == -1, "a row without a finite logit is drawn from");
}

}  // namespace

int sample_failures() {
  std::mt19937 random(3);
  check_philox();
  for (int64_t n : {1, 2, 7, 16, 31, 33, 1024, 1025, 5000}) check_rows(n, random);
  for (int64_t n : {1, 2, 7, 33, 1024, 5000}) check_kept(n, random);
  for (int64_t n : {1, 2, 7, 33, 1024, 5000}) check_likeliest(n, random);
  check_refusals();
  return failures;
}
