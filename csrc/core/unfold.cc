// SPDX-License-Identifier: Apache-2.0
// fewbit_unfold: windows of images as rows of a matrix. A pure copy, so it knows the size of an element only.
#include <algorithm>

#include "core/pool.h"
#include "core/windows.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int64_t kTogether = 16;             // windows copied in one go
constexpr int64_t kElementsPerUnit = 1 << 14;  // copied by a thread at a time

// The taps [first, last) of one axis whose input at + tap * dilation lies in [0, size).
struct Taps {
  int64_t first, last;
  Taps(int64_t at, int64_t dilation, int64_t count, int64_t size)
      : first(at < 0 ? (-at + dilation - 1) / dilation : 0),
        last(at < size ? std::min(count, (size - at + dilation - 1) / dilation) : 0) {}
};

// `count` neighbouring windows of one image, the first one's top left corner at (top, left), to out (count, channels,
// kernel_h, kernel_w). Where columns of a window lie outside of the image, it comes alone. Windows are the inner loop:
// they lie together in an image whose channels do not.
template <class T>
void copy_windows(const fewbit_windows& g, const T* image, int64_t top, int64_t left, int64_t count, T* out) {
  const Taps rows(top, g.dilation_h, g.kernel_h, g.height), columns(left, g.dilation_w, g.kernel_w, g.width);
  const int64_t taps = g.kernel_h * g.kernel_w, width = g.channels * taps;
  const int64_t across = g.dilation_w * g.stride_column, apart = g.step_w * g.stride_column;
  const bool clipped = rows.first > 0 || columns.first > 0 || rows.last < g.kernel_h || columns.last < g.kernel_w;
  if (clipped) std::fill(out, out + count * width, T{0});
  // Offsets, not pointers: the corner of a clipped window lies outside of the image.
  const int64_t corner = top * g.stride_row + left * g.stride_column;
  for (int64_t c = 0; c < g.channels; c++, out += taps) {
    for (int64_t i = rows.first; i < rows.last; i++) {
      const int64_t at = corner + c * g.stride_channel + i * g.dilation_h * g.stride_row;
      for (int64_t j = columns.first; j < columns.last; j++) {
        const int64_t from = at + j * across, to = i * g.kernel_w + j;
        for (int64_t n = 0; n < count; n++) out[to + n * width] = image[from + n * apart];
      }
    }
  }
}

struct Call {
  const fewbit_windows* windows;
  const void* x;
  int64_t begin, end, per_unit;
  void* out;
};

template <class T>
void copy_unit(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  const fewbit_windows& g = *call.windows;
  const int64_t width = g.channels * g.kernel_h * g.kernel_w, first = call.begin + unit * call.per_unit;
  T* out = static_cast<T*>(call.out) + (first - call.begin) * width;
  const int64_t end = std::min(call.end, first + call.per_unit), reach = (g.kernel_w - 1) * g.dilation_w;
  for (int64_t p = first, count; p < end; p += count, out += count * width) {
    const int64_t row = p / g.out_w, top = row % g.out_h * g.step_h - g.padding_h;
    const int64_t left = p % g.out_w * g.step_w - g.padding_w, whole = (g.width - 1 - reach - left) / g.step_w + 1;
    const T* image = static_cast<const T*>(call.x) + row / g.out_h * g.stride_image;
    count = std::min({kTogether, end - p, g.out_w - p % g.out_w, left < 0 ? 1 : std::max<int64_t>(whole, 1)});
    copy_windows(g, image, top, left, count, out);
  }
}

}  // namespace

bool well_formed(const fewbit_windows& g) {
  for (int64_t positive : {g.channels, g.height, g.width, g.kernel_h, g.kernel_w, g.step_h, g.step_w, g.dilation_h,
                           g.dilation_w, g.out_h, g.out_w})
    if (positive <= 0) return false;
  return g.padding_h >= 0 && g.padding_w >= 0 && (g.element_bytes == 2 || g.element_bytes == 4);
}

}  // namespace fewbit

extern "C" int fewbit_unfold(const fewbit_windows* windows, const void* x, int64_t begin, int64_t end, void* out,
                             int32_t threads) {
  using namespace fewbit;
  if (!windows || !x || !out || !well_formed(*windows) || begin < 0 || end < begin || threads <= 0)
    return FEWBIT_BAD_ARGUMENT;
  const int64_t width = windows->channels * windows->kernel_h * windows->kernel_w;
  Call call = {windows, x, begin, end, std::max<int64_t>(1, kElementsPerUnit / width), out};
  const int64_t units = (end - begin + call.per_unit - 1) / call.per_unit;
  parallel(units, thread_count(threads), windows->element_bytes == 4 ? copy_unit<uint32_t> : copy_unit<uint16_t>, &call);
  return FEWBIT_OK;
}
