// SPDX-License-Identifier: Apache-2.0
// k-means of tables of numbers: see fewbit_centers. Numbers and sums are those of src/fewbit/core/scalars.py, in the same
// order, so that both give the same bits.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <new>
#include <vector>

#include "core/clusters.h"
#include "core/dtypes.h"
#include "fewbit.h"
#include "fewbit_grids.h"

namespace fewbit {
namespace {

constexpr int64_t kHalves = 0x7C00;  // float16 from 0 to the largest finite one
constexpr int kDigit = 11;           // bits that one pass of a sort looks at
constexpr int64_t kShort = 1024;     // numbers up to which passes do not pay
constexpr double kTiny = std::numeric_limits<double>::min();

// Numbers that differ, ascending, and what each weighs; of a table after the other, in the same room.
struct Numbers {
  std::vector<double> x, mass;
  void clear() { x.clear(), mass.clear(); }
};
struct Room {
  std::vector<uint64_t> keys, other;
  std::vector<double> total, mass;
  Numbers numbers;
  std::vector<double> s0, s1, s2;
  std::vector<int64_t> begins;
};

// In the order of numbers; both zeros are one.
uint32_t key_of(float x) {
  uint32_t bits;
  x += 0.0f;
  memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

float of_key(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & 0x7FFFFFFFu : ~key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Keys in the upper halves ascend, and of equal ones the lower halves, which did before.
void sort(std::vector<uint64_t>& keys, std::vector<uint64_t>& other) {
  if (int64_t(keys.size()) <= kShort) return std::sort(keys.begin(), keys.end());
  other.resize(keys.size());
  for (int shift = 32; shift < 64; shift += kDigit) {
    size_t starts[(1 << kDigit) + 1] = {};
    const auto digit = [shift](uint64_t key) { return key >> shift & ((1 << kDigit) - 1); };
    for (const uint64_t key : keys) ++starts[digit(key) + 1];
    for (size_t i = 1; i <= 1 << kDigit; ++i) starts[i] += starts[i - 1];
    for (const uint64_t key : keys) other[starts[digit(key)]++] = key;
    keys.swap(other);
  }
}

// What number i of a table weighs: at most 1; 1 where the table weighs nothing.
struct Weights {
  const float* weights;
  double top = 0;
  Weights(const float* table, int64_t n) : weights(table) {
    for (int64_t i = 0; weights && i < n; ++i) top = std::max(top, double(weights[i]));
  }
  double operator()(int64_t i) const { return top > 0 ? double(weights[i]) / std::max(top, kTiny) : 1; }
};

void merged(const float* values, const Weights& weight, int64_t n, Room& room) {
  room.keys.clear();
  for (int64_t i = 0; i < n; ++i)
    if (weight(i) > 0) room.keys.push_back(uint64_t(key_of(values[i])) << 32 | uint64_t(i));
  sort(room.keys, room.other);
  uint32_t last = 0;
  for (const uint64_t each : room.keys) {
    const uint32_t key = uint32_t(each >> 32);
    if (room.numbers.x.empty() || key != last) room.numbers.x.push_back(of_key(key)), room.numbers.mass.push_back(0);
    room.numbers.mass.back() += weight(int64_t(each & 0xFFFFFFFFu)), last = key;
  }
}

void cells(const float* values, const Weights& weight, int64_t n, Room& room) {
  room.mass.assign(2 * kHalves + 1, 0), room.total.assign(2 * kHalves + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t bits = to_float16(values[i]), magnitude = std::min(bits & 0x7FFF, kHalves);
    const size_t at = size_t(bits & 0x8000 ? kHalves - magnitude : kHalves + magnitude);
    const double live = weight(i);
    room.mass[at] += live, room.total[at] += live * double(values[i]);
  }
  for (size_t at = 0; at < room.mass.size(); ++at)
    if (room.mass[at] > 0) room.numbers.x.push_back(room.total[at] / room.mass[at]), room.numbers.mass.push_back(room.mass[at]);
}

// Centers of room.numbers, which are left with the middle one as zero and the farthest from it as 1.
void centers_of(Room& room, int64_t count, double* centers) {
  std::vector<double>&x = room.numbers.x, &mass = room.numbers.mass;
  const int64_t n = int64_t(x.size());
  if (n <= count) {
    for (int64_t k = 0; k < count; ++k) centers[k] = x[size_t(std::min(k, n - 1))];
    return;
  }
  const double pivot = x[size_t(n / 2)];
  double unit = kTiny;
  for (double& each : x) each -= pivot, unit = std::max(unit, fabs(each));
  for (double& each : x) each /= unit;
  room.s0.assign(size_t(n) + 1, 0), room.s1.assign(size_t(n) + 1, 0), room.s2.assign(size_t(n) + 1, 0);
  for (size_t i = 0; i < size_t(n); ++i) {
    room.s0[i + 1] = room.s0[i] + mass[i];
    room.s1[i + 1] = room.s1[i] + mass[i] * x[i];
    room.s2[i + 1] = room.s2[i] + mass[i] * x[i] * x[i];
  }
  room.begins.resize(size_t(count) + 1);
  clusters({n, x.data(), room.s0.data(), room.s1.data(), room.s2.data()}, count, room.begins.data());
  room.begins[size_t(count)] = n;
  for (size_t k = 0; k < size_t(count); ++k) {
    double weight = 0, sum = 0;
    for (int64_t i = room.begins[k]; i < room.begins[k + 1]; ++i) weight += mass[size_t(i)], sum += mass[size_t(i)] * x[size_t(i)];
    centers[k] = (weight > 0 ? sum / std::max(weight, kTiny) : x[size_t(std::min(room.begins[k], n - 1))]) * unit + pivot;
  }
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_centers(const fewbit_centers_call* call) {
  const auto& c = *call;
  if (!c.values || !c.centers || c.tables < 0 || c.size < 1 || c.size > UINT32_MAX || c.count < 1) return FEWBIT_BAD_ARGUMENT;
  try {
    fewbit::Room room;
    for (int64_t t = 0; t < c.tables; ++t) {
      const float* values = c.values + t * c.size;
      const fewbit::Weights weight(c.weights ? c.weights + t * c.size : nullptr, c.size);
      room.numbers.clear();
      (c.cells ? fewbit::cells : fewbit::merged)(values, weight, c.size, room);
      fewbit::centers_of(room, c.count, c.centers + t * c.count);
    }
  } catch (const std::bad_alloc&) {
    return FEWBIT_NO_MEMORY;
  }
  return FEWBIT_OK;
}
