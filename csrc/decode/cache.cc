// SPDX-License-Identifier: Apache-2.0
#include "decode/cache.h"

#include <stdlib.h>
#include <string.h>

#include <new>
#include <set>

namespace fewbit {

HeadLayout layout_of(int32_t kv, int64_t dim) {
  const int64_t bits = kv == FEWBIT_FLOAT32 ? 32 : kv == FEWBIT_KV_INT8 ? 8 : kv == FEWBIT_KV_INT4 ? 4 : 16;
  HeadLayout layout{};
  layout.kv = kv, layout.dim = dim, layout.width = (dim + kWidth - 1) / kWidth * kWidth;
  layout.key_tile = (dim + dim % 2) * kTile * bits / 8, layout.value_tile = layout.width * kTile * bits / 8;
  layout.values = layout.key_tile * (kBlock / kTile);
  layout.bytes = layout.values + layout.value_tile * (kBlock / kTile);
  if (bits < 16) layout.scales = layout.bytes, layout.bytes += 2 * kBlock * 2;
  return layout;
}

namespace {

constexpr int64_t kLargePage = 1 << 21;

// Blocks of about a large page and more take whole ones: a head's keys lie far from those of the next block, and with
// small pages half of the time would go into finding them.
int64_t rounded(int64_t bytes) {
  return bytes < kLargePage / 2 ? (bytes + 63) / 64 * 64 : (bytes + kLargePage - 1) / kLargePage * kLargePage;
}

}  // namespace

// Zeros, so that nothing that has not been written can be NaN.
Cache::Block::Block(int64_t size, bool is_closed) : bytes(rounded(size)), closed(is_closed) {
  const int64_t alignment = bytes % kLargePage ? 64 : kLargePage;
  data = static_cast<uint8_t*>(aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(bytes)));
  if (!data) throw std::bad_alloc();
  if (alignment == kLargePage) fewbit_large_pages(data, bytes);
  memset(data, 0, static_cast<size_t>(bytes));
}

Cache::Block::~Block() { free(data); }

Cache::Cache(const Steps& steps, int32_t kv, int64_t layers, int64_t heads, int64_t dim, int64_t sequences)
    : steps_(steps),
      heads_(heads),
      heads_of_all_(layers * heads),
      open_(layout_of(kv > FEWBIT_FLOAT16 ? FEWBIT_FLOAT16 : kv, dim)),
      closed_(layout_of(kv, dim)),
      sequences_(static_cast<size_t>(sequences)) {}

int64_t Cache::bytes() const {
  std::set<const Block*> blocks;
  for (const Sequence& sequence : sequences_)
    for (const auto& block : sequence.blocks) blocks.insert(block.get());
  int64_t total = 0;
  for (const Block* block : blocks) total += block->bytes;
  return total;
}

int64_t Cache::room(int64_t sequence, int64_t count) const {
  const int64_t left = kBlock - length(sequence) % kBlock;
  return codes() && left < count ? left : count;
}

void Cache::reserve(int64_t sequence, int64_t count) {
  Sequence& held = sequences_[static_cast<size_t>(sequence)];
  const int64_t first = held.length / kBlock, last = (held.length + count - 1) / kBlock;
  while (static_cast<int64_t>(held.blocks.size()) <= last)
    held.blocks.push_back(std::make_shared<Block>(block_bytes(false), false));
  for (int64_t b = first; b <= last; b++) {
    std::shared_ptr<Block>& block = held.blocks[static_cast<size_t>(b)];
    if (block.use_count() == 1 && !block->closed) continue;
    auto own = std::make_shared<Block>(block_bytes(false), false);
    if (!block->closed) memcpy(own->data, block->data, static_cast<size_t>(block->bytes));
    else
      for (int64_t h = 0; h < heads_of_all_; h++)
        steps_.reopen(closed_, block->data + h * closed_.bytes, open_, own->data + h * open_.bytes);
    block = own;
  }
}

void Cache::advance(int64_t sequence, int64_t count) {
  Sequence& held = sequences_[static_cast<size_t>(sequence)];
  const int64_t before = held.length / kBlock;
  held.length += count;
  if (!codes() || held.length / kBlock == before) return;
  for (int64_t b = 1; b + 1 < held.length / kBlock; b++) {
    std::shared_ptr<Block>& block = held.blocks[static_cast<size_t>(b)];
    if (block->closed) continue;
    auto own = std::make_shared<Block>(block_bytes(true), true);
    for (int64_t h = 0; h < heads_of_all_; h++)
      steps_.close(open_, block->data + h * open_.bytes, closed_, own->data + h * closed_.bytes);
    block = own;
  }
}

uint8_t* Cache::place(int64_t sequence, int64_t position, int64_t layer, int64_t head) {
  const Sequence& held = sequences_[static_cast<size_t>(sequence)];
  return held.blocks[static_cast<size_t>(position / kBlock)]->data + (layer * heads_ + head) * open_.bytes;
}

void Cache::keep(int64_t from, int64_t to, int64_t length) {
  Sequence kept;
  const Sequence& source = sequences_[static_cast<size_t>(from)];
  kept.blocks.assign(source.blocks.begin(), source.blocks.begin() + (length + kBlock - 1) / kBlock);
  kept.length = length;
  sequences_[static_cast<size_t>(to)] = std::move(kept);
}

void Cache::list(int64_t sequence, std::vector<const uint8_t*>* blocks, std::vector<uint8_t>* closed) const {
  const Sequence& held = sequences_[static_cast<size_t>(sequence)];
  blocks->clear(), closed->clear();
  for (const auto& block : held.blocks) blocks->push_back(block->data), closed->push_back(block->closed);
}

}  // namespace fewbit
