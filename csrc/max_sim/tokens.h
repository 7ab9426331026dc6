// Tokens of late interaction as the sweep over all pairs reads them: the real ones alone, packed item after item and
// cut into blocks.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "common/input.h"
#include "common/integers.h"

namespace fc {

// How many tokens of each item are real, and where they lie.
struct RealTokens {
  std::vector<int64_t> count;  // (items,)
  at::Tensor order;            // (items, length) int64, the real tokens of each item first; undefined: as they lie

  RealTokens(const at::Tensor& x, const OptionalTensor& lengths, const OptionalTensor& ordered)
      : count(x.size(0), x.size(1)) {
    const int64_t items = x.size(0), length = x.size(1);
    if (lengths) {
      check_sizes("lengths", *lengths, {items});
      const at::Tensor checked = indices("lengths", *lengths, length + 1);
      count.assign(checked.const_data_ptr<int64_t>(), checked.const_data_ptr<int64_t>() + items);
    }
    if (ordered) {
      check_sizes("order", *ordered, {items, length});
      order = indices("order", *ordered, length);
    }
  }
};

// The real tokens of all items of x, or of y, packed, in the compute dtype.
struct TokenSide {
  at::Tensor tokens;           // (real, D)
  std::vector<int64_t> start;  // (items + 1,) where each item's tokens begin
  int64_t items, length;       // length: T or P, tokens per item, real or not
  at::Tensor places;           // (real,) index of each token among all tokens; undefined if all are real

  TokenSide(const char* name, const at::Tensor& x, const OptionalTensor& lengths, const OptionalTensor& order,
            at::ScalarType dtype)
      : items(x.size(0)), length(x.size(1)) {
    const RealTokens real(x, lengths, order);
    const at::Tensor all = readable(name, x, x.scalar_type()).view({items * length, x.size(2)});
    if (lengths) {
      const at::Tensor within = at::arange(length).lt(at::tensor(real.count).unsqueeze(1));
      const at::Tensor at = real.order.defined() ? real.order : at::arange(length).expand({items, length});
      places = (at + at::arange(items).mul(length).unsqueeze(1)).masked_select(within);
      tokens = all.index_select(0, places).to(dtype);
    } else {
      tokens = all.to(dtype).contiguous();
    }
    start.push_back(0);
    for (int64_t i = 0; i < items; ++i) start.push_back(start[i] + real.count[i]);
  }
  int64_t count(int64_t item) const { return start[item + 1] - start[item]; }
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
