// SPDX-License-Identifier: Apache-2.0
// Clusters of sorted numbers by dynamic programming, which src/fewbit/core/scalars.py says in torch; and, of many numbers
// a cluster, the same with most places where a cluster might begin ruled out first.
//
// Cluster k begins at boundary k. A partition whose boundaries all lie on a grid is found soon; the best of all is not on
// the grid. Take it, with its centers: its boundary, in the midst of its two centers, lies inside a cell of the grid, a
// run of numbers that weigh W and cost Q as one cluster. Move it to an end of the cell, the better one: what is then at
// the farther center costs at most (c[k] - c[k - 1]) sqrt(W Q) more, as half of the mean distance from the mean is at
// most half of the deviation. Where several boundaries lie in one cell, one cluster can have all of it: Q more.
// So the best partition costs at least what the best on the grid costs less those credits; and a boundary lies in no
// cell for which even that is more than what some partition is known to cost. Cells that are left are split, until no
// number is left inside of any: the best partition, as certain as rounding lets it be. Credits fall with the square of
// the number of cells.
#include "core/clusters.h"

#include <math.h>

#include <algorithm>
#include <vector>

namespace fewbit {
namespace {

using Places = std::vector<int64_t>;
using Values = std::vector<double>;

// Where a boundary may be: at one of `at`, ascending, or between at[i] and at[i + 1] where open[i]; apart[i]: how far apart
// its centers can be then; credit[i]: what it may save at most when it leaves at[i] for the inside of a cell (empty:
// nothing).
struct Boundary {
  Places at;
  std::vector<char> open;
  Values apart, credit;
};
// Boundaries 0 .. count; the first is at 0, the last at n.
using Row = std::vector<const Boundary*>;

constexpr int64_t kCells = 8, kSplit = 4;  // cells a cluster at first, and those that one is split into
constexpr int64_t kMany = 64;               // numbers a cluster from which on grids pay
constexpr double kSumsError = 1e-13, kSlack = 1e-9;

double heavy(double mass) { return mass > kFloor ? mass : kFloor; }

double mean(const Sums& s, int64_t first, int64_t last) { return (s.s1[last] - s.s1[first]) / heavy(s.s0[last] - s.s0[first]); }

double cost(const Sums& s, int64_t first, int64_t last) {
  const double moment = s.s1[last] - s.s1[first];
  return std::max(0.0, s.s2[last] - s.s2[first] - moment * moment / heavy(s.s0[last] - s.s0[first]));
}

// Where clusters may begin: sums up to there, and what the numbers before cost less s2.
struct From {
  Values mass, sum, before;
};

From sums_at(const Sums& s, const Boundary& from, const Values& least) {
  const size_t n = from.at.size();
  From found{Values(n), Values(n), Values(n)};
  for (size_t i = 0; i < n; ++i) {
    const int64_t at = from.at[i];
    found.mass[i] = s.s0[at], found.sum[i] = s.s1[at];
    found.before[i] = least[i] - (from.credit.empty() ? 0 : from.credit[i]) - s.s2[at];
  }
  return found;
}

// What each of low .. high of `from` leads to, less s2, where a cluster ends at `right`; returns the first of the best.
int64_t best_of(const From& from, double mass, double sum, int64_t low, int64_t high, double* tried) {
  for (int64_t i = low; i <= high; ++i) {
    const double moment = sum - from.sum[size_t(i)], apart = mass - from.mass[size_t(i)];
    tried[i] = from.before[size_t(i)] - moment * moment / (apart > kFloor ? apart : kFloor);
  }
  return std::min_element(tried + low, tried + high + 1) - tried;
}

// least[r], infinite where no cluster can end: the best beginning never falls as r grows. Between those of r's
// neighbours, which were found before, nothing else is tried.
void layer(const Sums& s, const Places& starts, const From& from, const Places& to, Values& tried, Values& least) {
  const int64_t n = int64_t(to.size()), last = int64_t(starts.size()) - 1;
  least.assign(to.size(), INFINITY);
  tried.resize(std::max(tried.size(), starts.size()));
  Places best(to.size() + 1);  // that of `to`[r - 1] is best[r]
  int64_t stride = 1;
  while (2 * stride <= n) stride *= 2;
  for (; stride; stride /= 2) {
    for (int64_t r = stride; r <= n; r += 2 * stride) {
      const int64_t right = to[size_t(r - 1)], low = best[size_t(r - stride)];
      int64_t high = r + stride <= n ? best[size_t(r + stride)] : last;
      if (starts[size_t(high)] > right) high = std::upper_bound(starts.begin(), starts.begin() + high, right) - starts.begin() - 1;
      if (high < low) continue;
      best[size_t(r)] = best_of(from, s.s0[right], s.s1[right], low, high, tried.data());
      least[size_t(r - 1)] = tried[size_t(best[size_t(r)])] + s.s2[right];
    }
  }
}

// [k][i]: what the numbers before row[k]->at[i] cost in k clusters at least, less the credits of boundaries before.
std::vector<Values> forward(const Sums& s, const Row& row) {
  std::vector<Values> least(row.size());
  least[0] = {0};
  Values tried;
  for (size_t k = 1; k < row.size(); ++k) {
    const From from = sums_at(s, *row[k - 1], least[k - 1]);
    layer(s, row[k - 1]->at, from, row[k]->at, tried, least[k]);
  }
  return least;
}

// Boundaries 0 .. count of the partition that ends with the last of `least`.
Places traced(const Sums& s, const Row& row, const std::vector<Values>& least) {
  Places found(row.size());
  Values tried;
  found.back() = s.n;
  for (size_t k = row.size() - 2; k > 0; --k) {
    const Places& at = row[k]->at;
    const int64_t right = found[k + 1], high = std::upper_bound(at.begin(), at.end(), right) - at.begin() - 1;
    tried.resize(std::max(tried.size(), at.size()));
    found[k] = at[size_t(best_of(sums_at(s, *row[k], least[k]), s.s0[right], s.s1[right], 0, high, tried.data()))];
  }
  return found;
}

Places best_on(const Sums& s, const Row& row) { return traced(s, row, forward(s, row)); }

// What a partition costs once Lloyd's iterations have moved its boundaries to the midst of its centers.
double settled(const Sums& s, Places begins) {
  const size_t count = begins.size() - 1;
  for (int64_t round = 0; round < 50; ++round) {
    const Places before = begins;
    for (size_t k = 1; k < count; ++k) {
      const double middle = (mean(s, before[k - 1], before[k]) + mean(s, before[k], before[k + 1])) / 2;
      const bool empty = before[k - 1] == before[k] || before[k] == before[k + 1];
      if (!empty) begins[k] = std::max(begins[k - 1], int64_t(std::upper_bound(s.x, s.x + s.n, middle) - s.x));
    }
    if (begins == before) break;
  }
  double total = 0;
  for (size_t k = 0; k < count; ++k) total += cost(s, begins[k], begins[k + 1]);
  return total;
}

// How far apart the centers beside a boundary inside of first .. last can be, if the upper one is at most `up`, and the
// lower one at least `down`: the boundary is in their midst.
double between(const Sums& s, int64_t first, int64_t last, double down, double up) {
  return std::max(0.0, std::min(up - down, 2 * std::min(up - s.x[first], s.x[last - 1] - down)));
}

// Of the cells of a grid: no center is so far away that what lies between a cell and it, which would be of its cluster,
// would cost more than `most`.
Values apart(const Sums& s, const Places& grid, double most) {
  const auto around = [&s](int64_t first, int64_t last, double center) {
    return s.s2[last] - s.s2[first] - 2 * center * (s.s1[last] - s.s1[first]) + center * center * (s.s0[last] - s.s0[first]);
  };
  Values found(grid.size());
  for (size_t i = 0; i + 1 < grid.size(); ++i) {
    const int64_t first = grid[i], last = grid[i + 1];
    int64_t up = last - 1, down = 0, high = s.n - 1, low = first;
    while (high - up > 1) {
      const int64_t middle = (up + high) / 2;
      (around(last, middle, s.x[middle]) > most ? high : up) = middle;
    }
    while (low - down > 1) {
      const int64_t middle = (down + low) / 2;
      (around(middle + 1, first, s.x[middle]) > most ? down : low) = middle;
    }
    found[i] = between(s, first, last, s.x[down], s.x[high]);
  }
  return found;
}

// Credits of a boundary, where the cluster before it begins at `lowest` or later, and the one behind it ends at `highest`
// or earlier: means of all from there, or to there, are bounds on their centers.
void give_credit(const Sums& s, int64_t lowest, int64_t highest, Boundary& own) {
  own.credit.assign(own.at.size(), 0);
  for (size_t i = 0; i + 1 < own.at.size(); ++i) {
    if (!own.open[i]) continue;
    const int64_t first = own.at[i], last = own.at[i + 1];
    if (s.s0[first] - s.s0[lowest] > kFloor && s.s0[highest] - s.s0[last] > kFloor)
      own.apart[i] = std::min(own.apart[i], between(s, first, last, mean(s, lowest, first), mean(s, last, highest)));
    const double alone = cost(s, first, last) + kSumsError * s.s2[s.n], mass = s.s0[last] - s.s0[first];
    const double credit = std::max(own.apart[i] * sqrt(mass * alone), alone / 2);
    own.credit[i] = std::max(own.credit[i], credit), own.credit[i + 1] = std::max(own.credit[i + 1], credit);
  }
}

// `own` without what is ruled out as it costs more than `most`, and with cells split. `before` and `after`: what the
// numbers before each place cost at least, and those from the last place backwards, those behind.
Boundary narrowed(const Boundary& own, const Values& before, const Values& after, double most) {
  const size_t n = own.at.size();
  std::vector<char> good(n);
  for (size_t i = 0; i < n; ++i) good[i] = before[i] + after[n - 1 - i] - own.credit[i] <= most;
  Boundary found;
  for (size_t i = 0; i < n; ++i) {
    const bool left = i && own.open[i - 1] && (good[i - 1] || good[i]);
    const bool right = i + 1 < n && own.open[i] && (good[i] || good[i + 1]);
    if (!good[i] && !left && !right) continue;
    const int64_t first = own.at[i], wide = right ? own.at[i + 1] - first : 1, step = (wide + kSplit - 1) / kSplit;
    for (int64_t at = 0; at < wide; at += step) {
      found.at.push_back(first + at), found.apart.push_back(own.apart[i]);
      found.open.push_back(right && std::min(step, wide - at) > 1);
    }
  }
  return found;
}

// Places at which cells of about the same cost begin: of as many clusters, the best have their boundaries there.
Places grid(const Sums& s, int64_t cells) {
  const int64_t step = std::max<int64_t>(1, s.n / (8 * cells));
  Values up_to;
  double total = 0;
  for (int64_t at = 0; at < s.n; at += step) {
    const int64_t next = std::min(at + step, s.n - 1);
    const double wide = s.x[next] - s.x[at];
    up_to.push_back(total += cbrt((s.s0[next] - s.s0[at]) * wide * wide));
  }
  Places found = {0};
  for (size_t i = 0, reached = 1; i + 1 < up_to.size(); ++i) {
    if (up_to[i] * double(cells) < total * double(reached)) continue;
    found.push_back(int64_t(i + 1) * step);
    reached = size_t(up_to[i] / total * double(cells)) + 1;
  }
  found.push_back(s.n);
  return found;
}

Row row_of(const std::vector<Boundary>& boundaries) {
  Row row;
  for (const Boundary& boundary : boundaries) row.push_back(&boundary);
  return row;
}

// The numbers from the last to the first.
struct Mirror {
  Values s0, s1, s2;
  explicit Mirror(const Sums& s) {
    for (int64_t at = s.n; at >= 0; --at)
      s0.push_back(s.s0[s.n] - s.s0[at]), s1.push_back(s.s1[s.n] - s.s1[at]), s2.push_back(s.s2[s.n] - s.s2[at]);
  }
  Sums sums() const { return {int64_t(s0.size()) - 1, nullptr, s0.data(), s1.data(), s2.data()}; }
};

Boundary mirrored(const Boundary& own, int64_t n) {
  Boundary found{Places(own.at.rbegin(), own.at.rend()), {}, {}, Values(own.credit.rbegin(), own.credit.rend())};
  for (int64_t& at : found.at) at = n - at;
  return found;
}

// One step: less of where each boundary may be, in smaller cells. `most` becomes what the best partition costs that was
// seen. False where nothing is left, as it may be of numbers whose sums are all rounding.
bool narrow(const Sums& s, const Sums& mirror, std::vector<Boundary>& own, double& most) {
  const size_t count = own.size() - 1;
  std::vector<Boundary> other;
  for (size_t k = 0; k <= count; ++k) other.push_back(mirrored(own[count - k], s.n));
  const Row row = row_of(own);
  const std::vector<Values> before = forward(s, row), after = forward(mirror, row_of(other));
  most = std::min(most, settled(s, traced(s, row, before)));
  const double limit = most * (1 + kSlack) + 10 * kSumsError * s.s2[s.n];
  for (size_t k = 1; k < count; ++k) {
    own[k] = narrowed(own[k], before[k], after[count - k], limit);
    if (own[k].at.empty()) return false;
  }
  for (size_t k = 1; k < count; ++k) give_credit(s, own[k - 1].at.front(), own[k + 1].at.back(), own[k]);
  return true;
}

// Boundaries narrowed to single places; false where that would take longer than trying all.
bool narrow_all(const Sums& s, std::vector<Boundary>& own) {
  const int64_t count = int64_t(own.size()) - 1;
  Boundary coarse, fine;
  fine.at = grid(s, kCells * count);
  for (size_t i = 0; i < fine.at.size(); i += kSplit) coarse.at.push_back(fine.at[i]);
  const Boundary first = own.front(), last = own.back();
  Row row(own.size(), &coarse);
  row.front() = &first, row.back() = &last;
  double most = settled(s, best_on(s, row));
  for (size_t i = 0; i < fine.at.size(); ++i) fine.open.push_back(i + 1 < fine.at.size() && fine.at[i + 1] - fine.at[i] > 1);
  fine.apart = apart(s, fine.at, most);
  give_credit(s, 0, s.n, fine);
  std::fill(own.begin() + 1, own.end() - 1, fine);
  const Mirror mirror(s);
  for (bool open = true; open;) {
    if (!narrow(s, mirror.sums(), own, most)) return false;
    int64_t places = 0;
    open = false;
    for (const Boundary& each : own) {
      places += int64_t(each.at.size());
      open |= std::find(each.open.begin(), each.open.end(), 1) != each.open.end();
    }
    if (places > count * s.n / 8) return false;
  }
  return true;
}

}  // namespace

void clusters(const Sums& s, int64_t count, int64_t* begins) {
  std::vector<Boundary> own(size_t(count) + 1);
  own.front().at = {0}, own.back().at = {s.n};
  Row row = row_of(own);
  Boundary every;
  if (count > 1 && (s.n < kMany * count || !narrow_all(s, own))) {
    for (int64_t at = 0; at <= s.n; ++at) every.at.push_back(at);
    std::fill(row.begin() + 1, row.end() - 1, &every);
  }
  const Places found = best_on(s, row);
  std::copy(found.begin(), found.end() - 1, begins);
}

}  // namespace fewbit
