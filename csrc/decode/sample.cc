// SPDX-License-Identifier: Apache-2.0
// fewbit_likeliest, and fewbit_sample: what stays is described by the last token that does, found by selection, and the draw is one more walk
// in the order of tokens. Nothing is sorted: vocabularies have up to a quarter of a million tokens.
#include "fewbit_sample.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <new>
#include <vector>

#include "core/pool.h"
#include "decode/philox.h"
#include "decode/steps.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int64_t kTogether = 1024;  // tokens whose sum or largest is kept, to find one without another walk over all
constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool better(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.token < b.token);
}

constexpr Candidate kAll = {-kInfinity, std::numeric_limits<int32_t>::max()};

void adjust(const fewbit_draw& draw) {
  for (int64_t i = 0; i < draw.bias_count; i++) draw.logits[draw.biased[i]] += draw.bias[i];
  for (int64_t i = 0; i < draw.seen_count; i++) {
    float& logit = draw.logits[draw.seen[i]];
    logit = logit > 0 ? logit / draw.repetition : logit * draw.repetition;
    const float count = static_cast<float>(draw.counts[i]);
    logit -= draw.frequency * count + (count > 0 ? draw.presence : 0);
  }
}

// The largest of a few values; NaN where one is NaN or +infinity.
float largest_beside_infinities(const float* x, int64_t n) {
  float most = -kInfinity;
  for (int64_t i = 0; i < n; i++) {
    if (!(x[i] < kInfinity)) return std::numeric_limits<float>::quiet_NaN();
    most = std::max(most, x[i]);
  }
  return most;
}

// The largest of n values, and the first of the kTogether tokens that it is among; NaN where a value is NaN or +infinity, or
// none is finite.
Candidate largest(const Steps& steps, const float* values, int64_t n) {
  Candidate most = {-kInfinity, 0};
  for (int64_t first = 0; first < n; first += kTogether) {
    const int64_t count = std::min(kTogether, n - first);
    float here = steps.largest(values + first, count);
    if (isnan(here)) here = largest_beside_infinities(values + first, count);
    if (isnan(here)) return {here, 0};
    if (here > most.value) most = {here, static_cast<int32_t>(first)};
  }
  if (!(most.value > -kInfinity)) most.value = std::numeric_limits<float>::quiet_NaN();
  return most;
}

// The k-th best of n values, or kAll where fewer are above -infinity. Candidates gather until there are twice as many as
// wanted, then the better half stays: a later token must beat the worst of it, and hardly any does.
Candidate best(const float* values, int64_t n, int64_t k, std::vector<Candidate>& gathered) {
  if (k >= n) return kAll;
  gathered.clear();
  const auto halve = [&] {
    std::nth_element(gathered.begin(), gathered.begin() + (k - 1), gathered.end(), better);
    gathered.resize(static_cast<size_t>(k));
    return gathered.back();
  };
  float above = -kInfinity;
  for (int64_t i = 0; i < n; i++) {
    if (!(values[i] > above)) continue;
    gathered.push_back({values[i], static_cast<int32_t>(i)});
    if (static_cast<int64_t>(gathered.size()) == 2 * k) above = halve().value;
  }
  return static_cast<int64_t>(gathered.size()) < k ? kAll : halve();
}

// The last of the fewest best weights whose sum reaches top_p of `total`. Weights below (1 - top_p) * total / n do not
// amount to 1 - top_p together, so all that are needed lie above; these are halved around their median.
Candidate nucleus(const float* weights, int64_t n, double top_p, double total, std::vector<Candidate>& gathered) {
  const float least = static_cast<float>((1 - top_p) * total / static_cast<double>(n));
  gathered.clear();
  for (int64_t i = 0; i < n; i++)
    if (weights[i] >= least && weights[i] > 0) gathered.push_back({weights[i], static_cast<int32_t>(i)});
  double missing = top_p * total;
  auto begin = gathered.begin(), end = gathered.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, better);
    double sum = 0;
    for (auto it = begin; it != middle; ++it) sum += static_cast<double>(it->value);
    if (sum >= missing) {
      end = middle;
    } else {
      missing -= sum;
      begin = middle;
    }
  }
  return *begin;
}

// The token in whose share of the sum u falls; the last one that has a share where rounding left u beyond all.
int32_t drawn(const Steps& steps, const float* weights, int64_t n, double u, std::vector<double>& sums) {
  sums.clear();
  double total = 0;
  for (int64_t i = 0; i < n; i += kTogether) {
    sums.push_back(steps.sum(weights + i, std::min(kTogether, n - i)));
    total += sums.back();
  }
  double left = u * total;
  int64_t block = 0;
  while (block + 1 < static_cast<int64_t>(sums.size()) && left >= sums[block]) left -= sums[block++];
  int32_t last = -1;
  for (int64_t i = block * kTogether; i < n; i++) {
    if (!(weights[i] > 0)) continue;
    last = static_cast<int32_t>(i);
    left -= static_cast<double>(weights[i]);
    if (left < 0) return last;
  }
  if (last >= 0) return last;
  for (int64_t i = block * kTogether; i-- > 0;)
    if (weights[i] > 0) return static_cast<int32_t>(i);
  return -1;
}

int32_t sample(const fewbit_draw& draw) {
  static thread_local std::vector<Candidate> gathered;
  static thread_local std::vector<double> sums;
  float* const x = draw.logits;
  const int64_t n = draw.vocabulary;
  const Steps& steps = best_steps();
  adjust(draw);
  const Candidate likeliest = largest(steps, x, n);
  const float most = likeliest.value;
  if (isnan(most)) return -1;
  if (draw.temperature == 0) return static_cast<int32_t>(std::find(x + likeliest.token, x + n, most) - x);
  const Candidate last = draw.top_k > 0 ? best(x, n, draw.top_k, gathered) : kAll;
  steps.shares(x, n, most, draw.temperature, last);
  Candidate cut = kAll;
  if (draw.top_p < 1) cut = nucleus(x, n, static_cast<double>(draw.top_p), steps.sum(x, n), gathered);
  if (draw.top_p < 1 || draw.min_p > 0) steps.cut(x, n, draw.min_p, cut);
  return drawn(steps, x, n, uniform(draw.seed, draw.position, draw.branch), sums);
}

bool indices_fit(const int32_t* tokens, int64_t count, int64_t vocabulary) {
  if (count < 0 || (count > 0 && !tokens)) return false;
  return std::all_of(tokens, tokens + count, [=](int32_t token) { return token >= 0 && token < vocabulary; });
}

bool sensible(const fewbit_draw& d) {
  return d.logits && d.vocabulary > 0 && d.vocabulary < std::numeric_limits<int32_t>::max() && d.temperature >= 0 &&
         d.top_p >= 0 && d.top_p <= 1 && d.min_p >= 0 && d.min_p <= 1 && d.repetition > 0 && d.top_k >= 0 &&
         !isnan(d.frequency) && !isnan(d.presence) && indices_fit(d.seen, d.seen_count, d.vocabulary) &&
         (d.seen_count == 0 || d.counts) && indices_fit(d.biased, d.bias_count, d.vocabulary) &&
         (d.bias_count == 0 || d.bias);
}

// The `count` best of n values, best first. The worst of those found so far is at the front of a heap.
void likeliest(const float* values, int64_t n, int64_t count, int32_t* tokens) {
  std::vector<Candidate> heap;
  heap.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < n && count > 0; i++) {
    const bool full = static_cast<int64_t>(heap.size()) == count;
    if (full && !(values[i] > heap.front().value)) continue;
    if (full) std::pop_heap(heap.begin(), heap.end(), better), heap.pop_back();
    heap.push_back({values[i], static_cast<int32_t>(i)});
    std::push_heap(heap.begin(), heap.end(), better);
  }
  std::sort_heap(heap.begin(), heap.end(), better);
  for (const Candidate& one : heap) *tokens++ = one.token;
}

struct Call {
  const fewbit_draw* draws;
  int32_t* tokens;
  std::atomic<bool> no_memory;
};

void sample_unit(void* context, int64_t unit) {
  Call& call = *static_cast<Call*>(context);
  try {
    call.tokens[unit] = sample(call.draws[unit]);
  } catch (const std::bad_alloc&) {
    call.no_memory = true;
  }
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_sample(const fewbit_draw* draws, int64_t count, int32_t* tokens, int32_t threads) {
  using namespace fewbit;
  if (count < 0 || threads < 1 || (count > 0 && (!draws || !tokens))) return FEWBIT_BAD_ARGUMENT;
  if (!std::all_of(draws, draws + count, sensible)) return FEWBIT_BAD_ARGUMENT;
  Call call = {draws, tokens, {false}};
  parallel(count, thread_count(threads), sample_unit, &call);
  return call.no_memory ? FEWBIT_NO_MEMORY : FEWBIT_OK;
}

extern "C" int fewbit_likeliest(const float* logits, int64_t vocabulary, int64_t count, int32_t* tokens,
                                double* log_sum) {
  using namespace fewbit;
  if (!logits || vocabulary < 1 || vocabulary >= std::numeric_limits<int32_t>::max()) return FEWBIT_BAD_ARGUMENT;
  if (count < 0 || count > vocabulary || (count > 0 && !tokens) || !log_sum) return FEWBIT_BAD_ARGUMENT;
  const double most = static_cast<double>(largest(best_steps(), logits, vocabulary).value);
  double sum = 0;
  for (int64_t i = 0; i < vocabulary; i++) sum += exp(static_cast<double>(logits[i]) - most);
  *log_sum = most + log(sum);
  std::fill(tokens, tokens + count, -1);
  try {
    if (!isnan(most)) likeliest(logits, vocabulary, count, tokens);
  } catch (const std::bad_alloc&) {
    return FEWBIT_NO_MEMORY;
  }
  return FEWBIT_OK;
}
