// Tokens of late interaction as its kernels read them: the real ones alone (those within an item's length). Scores of
// all pairs take them packed, item after item, and cut into blocks; an item that is read by itself needs no packing.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "common/input.h"
#include "common/integers.h"

namespace fc {

// The tokens of all items of x, or of y, in the compute dtype.
struct TokenSide {
  at::Tensor tokens;           // (real, D) if packed, else (items * length, D)
  std::vector<int64_t> start;  // (items + 1,) where each item's tokens begin
  std::vector<int64_t> real;   // (items,) how many of them are real
  int64_t items, length;       // length: T or P, tokens per item, real or not
  at::Tensor places;           // (real,) index of each packed token among all tokens; undefined if none was left out

  TokenSide(const char* name, const at::Tensor& x, const OptionalTensor& lengths, at::ScalarType dtype, bool packed)
      : real(x.size(0), x.size(1)), items(x.size(0)), length(x.size(1)) {
    tokens = readable(name, x, x.scalar_type()).view({items * length, x.size(2)});
    if (lengths) {
      check_sizes("lengths", *lengths, {items});
      const at::Tensor count = indices("lengths", *lengths, length + 1);
      real.assign(count.const_data_ptr<int64_t>(), count.const_data_ptr<int64_t>() + items);
      if (packed) {
        places = at::arange(length).lt(count.unsqueeze(1)).flatten().nonzero().squeeze(1);
        tokens = tokens.index_select(0, places);
      }
    }
    tokens = tokens.to(dtype).contiguous();
    start.push_back(0);
    for (int64_t i = 0; i < items; ++i) start.push_back(start[i] + (packed ? real[i] : length));
  }
  int64_t count(int64_t item) const { return real[item]; }
  template <class T>
  const T* item(int64_t i) const {
    return tokens.const_data_ptr<T>() + start[i] * dim();
  }
  int64_t dim() const { return tokens.size(1); }

  // Turns a gradient of the packed tokens into a gradient of x, in x's dtype.
  at::Tensor unpack(const at::Tensor& gradient, const at::Tensor& x) const {
    const at::Tensor cast = gradient.to(x.scalar_type());
    if (!places.defined()) return cast.view(x.sizes());
    return at::zeros({items * length, dim()}, cast.options()).index_copy_(0, places, cast).view(x.sizes());
  }
};

// Packed tokens [begin, end) of items [item0, item1): whole items, or a part of one item.
struct TokenBlock {
  int64_t item0, item1, begin, end;
  int64_t tokens() const { return end - begin; }
  int64_t items() const { return item1 - item0; }
};

// The part of one item that lies in a block.
struct ItemPart {
  int64_t begin, end;  // packed tokens
  int64_t offset;      // of `begin` in the item
  bool last;           // the item ends here
  ItemPart(const TokenSide& side, const TokenBlock& block, int64_t item)
      : begin(std::max(block.begin, side.start[item])),
        end(std::min(block.end, side.start[item + 1])),
        offset(begin - side.start[item]),
        last(end == side.start[item + 1]) {}
  int64_t tokens() const { return end - begin; }
};

// Cuts items [first, last) into blocks of at most `limit` tokens. Items without tokens may be left out.
inline std::vector<TokenBlock> token_blocks(const TokenSide& side, int64_t first, int64_t last, int64_t limit) {
  std::vector<TokenBlock> all;
  for (int64_t i = first; i < last;) {
    int64_t next = i + 1;
    const int64_t begin = side.start[i], count = side.count(i);
    if (count > limit) {
      const int64_t parts = ceil_div(count, limit);
      for (int64_t p = 0; p < parts; ++p)
        all.push_back({i, next, begin + count * p / parts, begin + count * (p + 1) / parts});
    } else {
      while (next < last && side.start[next + 1] - begin <= limit) ++next;
      if (side.start[next] > begin) all.push_back({i, next, begin, side.start[next]});
    }
    i = next;
  }
  return all;
}

inline int64_t longest(const std::vector<TokenBlock>& blocks) {
  int64_t most = 0;
  for (const TokenBlock& b : blocks) most = std::max(most, b.tokens());
  return most;
}

}  // namespace fc
