// SPDX-License-Identifier: Apache-2.0
// Products of levels and activations that were rounded to int8, or came as bfloat16.
#include <string.h>

#include "core/rounded.h"

namespace fewbit {
namespace {

constexpr int64_t kExact = 1 << 24;  // integers below it are float32s
constexpr int64_t kSmall = 1 << 18;  // multiply-adds below which a second thread costs more than it brings

int64_t divisor(int64_t a, int64_t b) { return b ? divisor(b, a % b) : a; }

// Activations as integers of 24 bits, on instruction sets that multiply bytes four at a time.
const SegmentKernel* find_int24(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (isa) {
    case FEWBIT_SERIAL: return &int24_linear_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return &int24_linear_avx2;
    case FEWBIT_AVXVNNI: return &int24_linear_avxvnni;
    case FEWBIT_AVX512VNNI: return &int24_linear_avx512vnni;
#elif defined(__aarch64__)
    case FEWBIT_NEONDOT: return &int24_linear_neondot;
    case FEWBIT_NEONI8MM: return &int24_linear_neoni8mm;
#endif
    default: return nullptr;
  }
}

// Products of a table's levels and float activations as such integers.
const SegmentKernel* find_int24_lut([[maybe_unused]] int32_t bits, [[maybe_unused]] int64_t tokens, int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (isa) {
    case FEWBIT_SERIAL: return &int24_lut_linear_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: {
      const FewKernel& few = int24_few_lut_linear_avx2;
      return bits <= few.most || tokens <= 2 ? &few.kernel : &int24_lut_linear_avx2;
    }
#endif
    default: return nullptr;
  }
}

const SegmentKernel* find_bfloat16(int32_t isa) {
#if defined(__x86_64__)
  if (fewbit_caps() & isa & FEWBIT_AVX512BF16) return &bf16_linear_avx512bf16;
#endif
  return nullptr;
}

// `table`: that of FEWBIT_LUT, else null.
const SegmentKernel* find(const FixedPoint* table, int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  const auto pick = [&](const SegmentKernel& codes, const LutKernels& lut) {
    return !table ? &codes : table->most <= lut.most ? &lut.bytes : &lut.words;
  };
  switch (isa) {
    case FEWBIT_SERIAL: return pick(int8_linear_serial, int8_lut_linear_serial);
#if defined(__x86_64__)
    case FEWBIT_AVX2: return pick(int8_linear_avx2, int8_lut_linear_avx2);
    case FEWBIT_AVXVNNI: return pick(int8_linear_avxvnni, int8_lut_linear_avxvnni);
    case FEWBIT_AVX512VNNI: return pick(int8_linear_avx512vnni, int8_lut_linear_avx512vnni);
#elif defined(__aarch64__)
    case FEWBIT_NEON: return pick(int8_linear_neon, int8_lut_linear_neon);
    case FEWBIT_NEONDOT: return pick(int8_linear_neondot, int8_lut_linear_neondot);
    case FEWBIT_NEONI8MM: return pick(int8_linear_neoni8mm, int8_lut_linear_neoni8mm);
#endif
    default: return nullptr;
  }
}

// That of one or two tokens alone, where there is one, or of more beside 1 bit, whatever their codes are arranged like; `most`: bits
// of a code, or the largest level.
const SegmentKernel* find_few([[maybe_unused]] bool lut, [[maybe_unused]] int32_t most, [[maybe_unused]] int64_t tokens,
                              [[maybe_unused]] int32_t isa) {
#if defined(__x86_64__)
  const FewKernel& few = lut ? int8_few_lut_linear_avx2 : int8_few_linear_avx2;
  if (fewbit_caps() & isa & FEWBIT_AVX2 && tokens <= 2 && most <= few.most) return &few.kernel;
  if (fewbit_caps() & isa & FEWBIT_AVX2 && tokens > 2 && !lut && most == 1) return &int8_bits_linear_avx2;
#endif
  return nullptr;
}

// That of codes of 8 bits, and of levels of a byte times three tokens and more, where there is one. Activations far from 0 would
// be split, all of them; beside levels too many of those would be large that have one scale for a few columns (`!whole`).
const SegmentKernel* find_split([[maybe_unused]] const FixedPoint* table, [[maybe_unused]] int32_t bits,
                                [[maybe_unused]] bool whole, [[maybe_unused]] const fewbit_input& x,
                                [[maybe_unused]] int32_t isa) {
#if defined(__x86_64__)
  const bool around = x.scale == 0 || (x.zero >= 96 && x.zero <= 160);
  if (!(fewbit_caps() & isa & FEWBIT_AVX2) || !around) return nullptr;
  const FewKernel& levels = int8_level_linear_avx2;
  const bool bytes = table && table->most > int8_lut_linear_avx2.most && table->most <= levels.most;
  if (x.tokens > 2 && bytes && whole) return &levels.kernel;
  if (!table && bits == 8) return x.tokens > 2 ? &int8_split_linear_avx2 : &int8_few_split_linear_avx2;
#endif
  return nullptr;
}

// Columns that share a scale of the activations, `x_block` being an argument of fewbit_linear_many.
int64_t columns_of(int64_t x_block, int64_t columns) { return x_block < 0 ? columns : x_block; }

// Whether every code less the zero has at most 8 significant bits.
bool centred(const fewbit_matrix& w) {
  if (!(w.zero >= 0 && w.zero <= 256)) return false;
  const auto whole = [](float x) { return x == static_cast<float>(static_cast<int32_t>(x)); };
  const float top = static_cast<float>((1 << w.bits) - 1) - w.zero, most = top > w.zero ? top : w.zero;
  return whole(w.zero) ? most <= 256 : whole(2 * w.zero) && 2 * most <= 256;
}

bool sensible(const fewbit_matrix& w, int64_t x_block) {
  const int32_t most = x_block > 0 ? kLookedUp : x_block == FEWBIT_INT24 ? kLookedUp24 : 0;
  if (w.arranged && (x_block <= 0 || (w.bits == 1 && w.table))) return false;
  const bool lut = w.family == FEWBIT_LUT && w.bits <= most && w.table && w.zero == 0.0f;
  return (lut || (w.family == FEWBIT_AFFINE && !w.table)) && segment_columns(w.columns, w.block, x_block) > 0;
}

// Columns whose integers are summed up before scales are applied. Rows that share one of each are summed whole where that
// is exact: whatever order it is done in, and whether in int32 or in float32.
int64_t summed_columns(const fewbit_matrix& w, int64_t x_block) {
  const bool codes = !w.table && x_block != FEWBIT_BFLOAT16S;
  const bool whole = w.block >= w.columns && columns_of(x_block, w.columns) >= w.columns;
  const int64_t most = ((int64_t{1} << w.bits) - 1) * 128 * w.columns;
  if (codes && whole && w.columns > kSegment && most < kExact) return round_up(w.columns, 32);
  return segment_columns(w.columns, w.block, x_block);
}

bool shared(const fewbit_matrix& a, const fewbit_matrix& b, int64_t x_block) {
  if (a.family != b.family) return false;
  if (a.table && (a.bits != b.bits || memcmp(a.table, b.table, sizeof(float) << a.bits))) return false;
  return summed_columns(a, x_block) == summed_columns(b, x_block);
}

// What sums of codes begin with, for each activation: the integer below a zero among the codes, by which sums stay as exact as
// they are; 0 for others.
float whole_zero(const fewbit_matrix& w) {
  const bool among = w.bits > 1 && w.zero >= 0 && w.zero <= static_cast<float>((1 << w.bits) - 1);
  return among ? static_cast<float>(static_cast<int32_t>(w.zero)) : 0.0f;
}

SegmentTask task_of(const fewbit_matrix& w, int64_t x_block) {
  SegmentTask task{};
  const int64_t columns = summed_columns(w, x_block);
  const bool bfloat16s = x_block == FEWBIT_BFLOAT16S, centre = bfloat16s && centred(w);
  const bool entries = w.table && x_block == FEWBIT_INT24;
  x_block = columns_of(x_block, w.columns);
  task.bits = w.bits, task.scale_half = w.scale_half, task.offset_half = w.offset_half;
  task.rows = w.rows, task.columns = w.columns, task.chunks = ceil_div(w.columns, 32);
  task.segments = ceil_div(w.columns, columns), task.segment_chunks = columns / 32;
  task.blocks = ceil_div(w.columns, w.block), task.x_blocks = ceil_div(w.columns, x_block);
  task.block_segments = w.block < w.columns ? w.block / columns : task.segments;
  task.x_block_segments = x_block < w.columns ? x_block / columns : task.segments;
  task.whole = bfloat16s ? 0 : whole_zero(w), task.centre = centre ? w.zero : 0;
  task.zero = w.zero - task.whole - task.centre, task.shifted = w.offset || task.zero != 0.0f;
  task.codes = w.codes, task.scale = w.scale, task.offset = w.offset, task.arranged = w.arranged;
  if (entries) task.entries = w.table, task.x_blocks = task.segments, task.x_block_segments = 1;
  return task;
}

// Rows of activations that are computed together; bfloat16 serves many tokens only.
int64_t together(int64_t tokens, const SegmentKernel& kernel, bool bfloat16s) {
  if (bfloat16s) return kernel.most;
  if (tokens <= 2) return least(tokens * kernel.digits, kernel.most);
  return kernel.digits > 1 || tokens > 4 ? kernel.most : least(4, kernel.most);
}

int run(const fewbit_output* outputs, int32_t count, const fewbit_input& x, int64_t x_block, int32_t y_dtype,
        int32_t isa, int32_t threads) {
  RoundedCall<SegmentTask, SegmentKernel> call{};
  FixedPoint levels{};  // of all matrices
  const float* table = outputs[0].matrix->table;
  if (table && !fixed_point(table, outputs[0].matrix->bits, &levels)) return FEWBIT_BAD_ARGUMENT;
  const bool entries = table && x_block == FEWBIT_INT24;
  if (entries) table = nullptr;
  const bool bfloat16s = x_block == FEWBIT_BFLOAT16S;
  call.kernel = bfloat16s                  ? find_bfloat16(isa)
                : x_block == FEWBIT_INT24 && entries ? find_int24_lut(outputs[0].matrix->bits, x.tokens, isa)
                : x_block == FEWBIT_INT24 ? find_int24(isa)
                                          : find(table ? &levels : nullptr, isa);
  int32_t most = levels.most;  // or bits, of all matrices
  for (int32_t i = 0; i < count; i++) {
    if (!table && outputs[i].matrix->bits > most) most = outputs[i].matrix->bits;
    if (outputs[i].matrix->arranged && isa != FEWBIT_AVX2) return FEWBIT_NO_KERNEL;
  }
  if (x_block > 0) {
    if (const SegmentKernel* few = find_few(table, most, x.tokens, isa)) call.kernel = few;
    const bool whole = x_block >= outputs[0].matrix->columns;
    if (const SegmentKernel* split = find_split(table ? &levels : nullptr, most, whole, x, isa)) call.kernel = split;
  }
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  for (int32_t i = 1; i < count; i++) {
    const fewbit_matrix &first = *outputs[0].matrix, &here = *outputs[i].matrix;
    const bool differ = call.kernel->starts + call.kernel->rests && here.bits != first.bits;
    if (differ || here.arranged != first.arranged) {
      const int code = run(outputs, i, x, x_block, y_dtype, isa, threads);
      return code != FEWBIT_OK ? code : run(outputs + i, count - i, x, x_block, y_dtype, isa, threads);
    }
  }
  for (int32_t i = 0; i < count; i++) {
    SegmentTask& task = call.task[i] = task_of(*outputs[i].matrix, x_block);
    task.table = table ? &levels : nullptr;
    task.alone = reads_straight();
    task.digits = call.kernel->digits;
    task.together = together(x.tokens, *call.kernel, bfloat16s);
  }
  const SegmentTask& first = call.task[0];
  const int64_t bytes = first.chunks * 32 * call.kernel->bytes;
  const int64_t floats = first.segments + first.x_blocks + first.chunks * (call.kernel->starts + call.kernel->rests);
  const auto place = [&](SegmentTask& task, char* scratch, int64_t tokens) {
    task.activations = scratch;
    task.sums = reinterpret_cast<float*>(scratch + tokens * bytes);
    task.x_scale = task.sums + tokens * task.segments;
    task.starts = reinterpret_cast<int32_t*>(task.x_scale + tokens * task.x_blocks);
    task.rests = task.starts + tokens * task.chunks * call.kernel->starts;
  };
  return run_rounded(call, outputs, count, x, y_dtype, first.digits, bytes, floats, kSmall, threads, place);
}

}  // namespace

int64_t segment_columns(int64_t columns, int64_t block, int64_t x_block) {
  x_block = columns_of(x_block, columns);
  int64_t common = 0;  // of the blocks that are no whole row; those that are end where the row does
  if (block < columns) common = divisor(block, common);
  if (x_block < columns) common = divisor(x_block, common);
  if (common % 32) return 0;
  if (common == 0) return kSegment;
  int64_t size = least(common, kSegment);
  while (common % size) size -= 32;
  return size;
}

const Products segment_products = {sensible, shared, run};

}  // namespace fewbit
