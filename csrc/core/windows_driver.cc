// SPDX-License-Identifier: Apache-2.0
// fewbit_int8_windows: a band of one image's output rows and one group of channels at a time are laid out as planes, in
// which every tap of a window lies equally far from its position, whatever the step and the dilation.
#include "core/windows.h"

#include <string.h>

#include <cstddef>
#include <new>

#include "core/dtypes.h"
#include "core/pool.h"
#include "core/products.h"

namespace fewbit {
namespace {

constexpr int64_t kFloats = 1 << 15;  // of a panel and its results: they stay in a second-level cache
constexpr int64_t kSmall = 1 << 16;   // inputs of windows below which a second thread costs more than it brings

const WindowsKernel* find(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (float_isa(isa)) {
    case FEWBIT_SERIAL: return &int8_windows_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return &int8_windows_avx2;
    case FEWBIT_AVX512: return &int8_windows_avx512;
#elif defined(__aarch64__)
    case FEWBIT_NEON: return &int8_windows_neon;
#endif
    default: return nullptr;
  }
}

// Pixels of one channel that windows meet at the same place, step_h apart down and step_w across, make a plane: pixel
// (a + step_h q, b + step_w n) of the padded image lies in plane (a, b), row q, column n.
struct Planes {
  int64_t channels;      // of a group
  int64_t band;          // output rows that are computed together
  int64_t height, width; // of a plane
  int64_t positions;     // of a band

  Planes(const fewbit_windows& g, int64_t groups, int64_t rows) : channels(g.channels / groups) {
    width = g.out_w + (g.kernel_w - 1) * g.dilation_w / g.step_w;
    const int64_t fit = kFloats / (width * (channels * g.step_h * g.step_w + rows));
    band = fit < 1 ? 1 : least(fit, g.out_h);
    height = band + (g.kernel_h - 1) * g.dilation_h / g.step_h;
    positions = round_up((band - 1) * width + g.out_w, kMostPositions);
  }
  int64_t plane(const fewbit_windows& g, int64_t channel, int64_t a, int64_t b) const {
    return ((channel * g.step_h + a) * g.step_w + b) * height * width;
  }
  int64_t floats(const fewbit_windows& g) const { return plane(g, channels, 0, 0) + kMostPositions; }
};

struct Call {
  const fewbit_windows* windows;
  const WindowsKernel* kernel;
  const char* x;
  int32_t dtype;
  int64_t images, groups, rows;  // rows of a group
  const float* weight;
  const float* bias;
  char* y;
  const Planes* planes;
  const int64_t* tap;
  int64_t units, workers, columns;
  float* scratch;
  int64_t scratch_floats;  // of a worker: panel, rounded, out
};

// Rows are short: a call takes as long as they do.
inline void copy(float* out, const float* x, int64_t count) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) memcpy(out + k, x + k, 4 * sizeof(float));
  for (; k < count; k++) memcpy(out + k, x + k, sizeof(float));
}

// One row of the padded image, `from` as an input of one token, to row q of the planes of one channel.
void lay_out_row(const Call& call, fewbit_input from, int64_t channel, int64_t a, int64_t q, float* panel) {
  const fewbit_windows& g = *call.windows;
  from.step = g.step_w * g.stride_column;
  const char* row = static_cast<const char*>(from.data);
  for (int64_t b = 0; b < g.step_w; b++) {
    const int64_t before = g.padding_w - b, first = before > 0 ? ceil_div(before, g.step_w) : 0;
    const int64_t count = least(call.planes->width, ceil_div(g.width + before, g.step_w)) - first;
    if (count <= 0) continue;
    float* out = panel + call.planes->plane(g, channel, a, b) + q * call.planes->width + first;
    from.data = row + (first * g.step_w - before) * g.stride_column * bytes_of(from.dtype);
    const float* found = floats(from, 0, 0, count, out);
    if (found != out) copy(out, found, count);
  }
}

// Output rows from `top` of one image and group, into planes that are zero wherever the image is not.
void lay_out(const Call& call, int64_t image, int64_t group, int64_t top, float* panel) {
  const fewbit_windows& g = *call.windows;
  const Planes& planes = *call.planes;
  for (int64_t c = 0; c < planes.channels; c++)
    for (int64_t i = 0; i < planes.height * g.step_h; i++) {
      const int64_t row = top * g.step_h + i - g.padding_h;
      if (row < 0 || row >= g.height) continue;
      const int64_t channel = group * planes.channels + c;
      const int64_t at = image * g.stride_image + channel * g.stride_channel + row * g.stride_row;
      const fewbit_input from = {call.x + at * bytes_of(call.dtype), 1, 0, 1, call.dtype};
      lay_out_row(call, from, c, i % g.step_h, i / g.step_h, panel);
    }
}

void write(const Call& call, int64_t image, int64_t group, int64_t top, const WindowsTask& task) {
  const fewbit_windows& g = *call.windows;
  const int64_t height = least(call.planes->band, g.out_h - top);
  for (int64_t r = 0; r < call.rows; r++)
    for (int64_t h = 0; h < height; h++) {
      const float* out = task.out + r * task.positions + h * call.planes->width;
      const int64_t at = (((image * call.groups + group) * call.rows + r) * g.out_h + top + h) * g.out_w;
      if (call.dtype == FEWBIT_FLOAT32)
        copy(reinterpret_cast<float*>(call.y) + at, out, g.out_w);
      else
        for (int64_t w = 0; w < g.out_w; w++) write_float(call.y, call.dtype, at + w, out[w]);
    }
}

// A worker takes every workers-th unit, a band of one group of one image, in scratch of its own.
void work(void* context, int64_t worker) {
  const Call& call = *static_cast<const Call*>(context);
  const fewbit_windows& g = *call.windows;
  const Planes& planes = *call.planes;
  const int64_t parts = call.images * call.groups, panel = planes.floats(g);
  float* scratch = call.scratch + worker * call.scratch_floats;
  WindowsTask task = {call.rows, call.columns, nullptr, nullptr, call.tap, scratch, 0, scratch + panel, nullptr};
  task.out = task.rounded + call.columns * kMostPositions;
  for (int64_t unit = worker, last = -1; unit < call.units; unit += call.workers) {
    const int64_t top = unit / parts * planes.band, group = unit % call.groups, image = unit % parts / call.groups;
    if (top != last) memset(scratch, 0, static_cast<std::size_t>(panel) * sizeof(float));
    last = top;
    task.positions = round_up((least(planes.band, g.out_h - top) - 1) * planes.width + g.out_w, kMostPositions);
    task.weight = call.weight + group * call.rows * call.columns;
    task.bias = call.bias ? call.bias + group * call.rows : nullptr;
    lay_out(call, image, group, top, scratch);
    call.kernel->run(task);
    write(call, image, group, top, task);
  }
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_int8_windows(const fewbit_windows* windows, const void* x, int32_t dtype, int64_t images,
                                   int64_t groups, const float* weight, int64_t rows, const float* bias, void* y,
                                   int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!windows || !well_formed(*windows) || !known_dtype(dtype) || windows->element_bytes != bytes_of(dtype) ||
      images < 0 || groups < 1 || rows < 1 || windows->channels % groups || rows % groups || !weight || threads < 1 ||
      (images > 0 && (!x || !y)))
    return FEWBIT_BAD_ARGUMENT;
  const fewbit_windows& g = *windows;
  const Planes planes(g, groups, rows / groups);
  Call call{};
  call.kernel = find(isa);
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  call.windows = windows, call.x = static_cast<const char*>(x), call.dtype = dtype;
  call.images = images, call.groups = groups, call.rows = rows / groups;
  call.weight = weight, call.bias = bias, call.y = static_cast<char*>(y);
  call.planes = &planes, call.columns = planes.channels * g.kernel_h * g.kernel_w;
  call.units = images * groups * ceil_div(g.out_h, planes.band);
  const int64_t inputs = images * g.channels * g.kernel_h * g.kernel_w * g.out_h * g.out_w;
  call.workers = inputs < kSmall ? 1 : least(thread_count(threads), call.units < 1 ? 1 : call.units);
  call.scratch_floats = planes.floats(g) + call.columns * kMostPositions + call.rows * planes.positions;
  const auto taps = static_cast<std::size_t>(call.columns), size = static_cast<std::size_t>(call.workers * call.scratch_floats);
  auto* scratch = static_cast<char*>(operator new(taps * sizeof(int64_t) + size * sizeof(float), std::nothrow));
  if (!scratch) return FEWBIT_NO_MEMORY;
  auto* tap = reinterpret_cast<int64_t*>(scratch);
  call.tap = tap, call.scratch = reinterpret_cast<float*>(tap + taps);
  for (int64_t c = 0; c < planes.channels; c++)
    for (int64_t i = 0; i < g.kernel_h; i++)
      for (int64_t j = 0; j < g.kernel_w; j++) {
        const int64_t down = i * g.dilation_h, across = j * g.dilation_w;
        *tap++ = planes.plane(g, c, down % g.step_h, across % g.step_w) + down / g.step_h * planes.width + across / g.step_w;
      }
  parallel(call.workers, static_cast<int32_t>(call.workers), work, &call);
  operator delete(scratch);
  return FEWBIT_OK;
}
