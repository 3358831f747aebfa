// SPDX-License-Identifier: Apache-2.0
// Windows of images against their definition, element by element, from buffers of exactly the size they need (so that a
// sanitizer sees any stray read or write).
#include <stdio.h>
#include <string.h>

#include <vector>

#include "fewbit.h"

namespace {

int failures = 0;

// (channels, height, width), kernel, step, padding, dilation: down, across.
struct Shape {
  int64_t images, channels, height, width, kernel_h, kernel_w, step_h, step_w, padding_h, padding_w, dilation_h,
      dilation_w;
};

const Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1},   {2, 3, 7, 5, 3, 3, 1, 1, 1, 1, 1, 1},   {3, 2, 8, 9, 3, 2, 2, 3, 0, 1, 1, 1},
    {1, 5, 2, 17, 1, 7, 1, 3, 0, 3, 1, 2},  {2, 3, 7, 9, 5, 2, 3, 1, 4, 1, 2, 3},   {1, 1, 1, 2, 3, 3, 1, 1, 3, 4, 3, 4},
    {1, 2, 3, 3, 2, 2, 5, 5, 9, 9, 1, 1},   {2, 31, 4, 6, 1, 1, 1, 1, 0, 0, 1, 1},
    {4, 33, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1},  // large enough for the thread pool
};

int64_t windows(int64_t size, int64_t kernel, int64_t step, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / step + 1;
}

// x[image][channel][row][column] holds its own index + 1. last: channels lie innermost, and of windows that fit across
// one is left out.
template <class T>
void check(const Shape& s, bool last) {
  fewbit_windows g = {s.channels, s.height, s.width, 0, 0, 0, 0, s.kernel_h, s.kernel_w, s.step_h, s.step_w, s.padding_h,
                      s.padding_w, s.dilation_h, s.dilation_w,
                      windows(s.height, s.kernel_h, s.step_h, s.padding_h, s.dilation_h),
                      windows(s.width, s.kernel_w, s.step_w, s.padding_w, s.dilation_w), sizeof(T)};
  if (last && g.out_w > 1) g.out_w--;
  const int64_t pixels = s.height * s.width;
  g.stride_image = s.channels * pixels;
  g.stride_channel = last ? 1 : pixels;
  g.stride_row = last ? s.width * s.channels : s.width;
  g.stride_column = last ? s.channels : 1;
  std::vector<T> x(static_cast<size_t>(s.images * g.stride_image));
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<T>(i + 1);
  std::vector<T> expected;
  for (int64_t n = 0; n < s.images; n++)
    for (int64_t h = 0; h < g.out_h; h++)
      for (int64_t w = 0; w < g.out_w; w++)
        for (int64_t c = 0; c < s.channels; c++)
          for (int64_t i = 0; i < s.kernel_h; i++)
            for (int64_t j = 0; j < s.kernel_w; j++) {
              const int64_t row = h * s.step_h + i * s.dilation_h - s.padding_h;
              const int64_t column = w * s.step_w + j * s.dilation_w - s.padding_w;
              const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
              const int64_t at =
                  n * g.stride_image + c * g.stride_channel + row * g.stride_row + column * g.stride_column;
              expected.push_back(inside ? x[static_cast<size_t>(at)] : T{0});
            }
  const int64_t width = s.channels * s.kernel_h * s.kernel_w, count = s.images * g.out_h * g.out_w;
  for (const int64_t begin : {int64_t{0}, count / 2, count - 1})
    for (const int32_t threads : {1, 2}) {
      std::vector<T> out(static_cast<size_t>((count - begin) * width), static_cast<T>(-1));
      const int status = fewbit_unfold(&g, x.data(), begin, count, out.data(), threads);
      if (status != FEWBIT_OK || memcmp(out.data(), expected.data() + begin * width, out.size() * sizeof(T))) {
        printf("windows of %lld bytes, kernel %lld x %lld differ\n", static_cast<long long>(sizeof(T)),
               static_cast<long long>(s.kernel_h), static_cast<long long>(s.kernel_w));
        failures++;
      }
    }
}

}  // namespace

int unfold_failures() {
  for (const Shape& shape : kShapes)
    for (const bool last : {false, true}) {
      check<uint32_t>(shape, last);
      check<uint16_t>(shape, last);
    }
  return failures;
}
