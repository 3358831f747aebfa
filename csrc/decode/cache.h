// SPDX-License-Identifier: Apache-2.0
// Keys and values of all sequences. A sequence is a list of blocks of kBlock positions, each of all layers and heads;
// memory follows what is used. Sequences that begin alike share blocks; a shared block is copied before it is written.
//
// Where elements are codes, a block is float16 while it is appended to, and becomes codes once the block after it is
// full too: the last 64 to 127 positions are exact to float16, and so is the first block, on whose positions attention
// rests (Xiao et al. 2023, arXiv:2309.17453). Which blocks are codes depends on the position of the next token alone.
#pragma once

#include <memory>
#include <vector>

#include "decode/steps.h"

namespace fewbit {

class Cache {
 public:
  Cache(const Steps& steps, int32_t kv, int64_t layers, int64_t heads, int64_t dim, int64_t sequences);

  int64_t sequences() const { return static_cast<int64_t>(sequences_.size()); }
  int64_t length(int64_t sequence) const { return sequences_[static_cast<size_t>(sequence)].length; }
  int64_t bytes() const;
  const HeadLayout& open() const { return open_; }
  const HeadLayout& closed() const { return closed_; }

  // Positions that may be appended before `advance`, `count` at most: all see the same codes.
  int64_t room(int64_t sequence, int64_t count) const;
  // Makes places for `count` more positions, of which `place` tells; then counts them.
  void reserve(int64_t sequence, int64_t count);
  void advance(int64_t sequence, int64_t count);
  uint8_t* place(int64_t sequence, int64_t position, int64_t layer, int64_t head);

  // `to` becomes the first `length` positions of `from`.
  void keep(int64_t from, int64_t to, int64_t length);

  // The blocks of a sequence, and which are codes, for AttentionTask.
  void list(int64_t sequence, std::vector<const uint8_t*>* blocks, std::vector<uint8_t>* closed) const;

 private:
  struct Block {
    Block(int64_t bytes, bool closed);
    ~Block();
    Block(const Block&) = delete;
    uint8_t* data;
    int64_t bytes;
    bool closed;
  };
  struct Sequence {
    std::vector<std::shared_ptr<Block>> blocks;
    int64_t length = 0;
  };

  int64_t block_bytes(bool closed) const { return heads_of_all_ * (closed ? closed_ : open_).bytes; }
  bool codes() const { return closed_.scales != 0; }

  const Steps& steps_;
  int64_t heads_, heads_of_all_;
  HeadLayout open_, closed_;
  std::vector<Sequence> sequences_;
};

}  // namespace fewbit
