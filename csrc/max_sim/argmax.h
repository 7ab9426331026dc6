// Stores which tokens were the maxima, from forward to backward, in the narrowest dtype that holds an index.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>

#include "max_sim/tokens.h"

namespace fc {

// The dtype of indices below `size`, as in core/tokens.py.
inline at::ScalarType index_dtype(int64_t size) {
  return size <= 256 ? at::kByte : size <= 32768 ? at::kShort : at::kInt;
}

// Argmaxima (rows, N, tokens) for items of x from `row0` on.
struct Argmax {
  at::Tensor tensor;
  int64_t row0 = 0;

  bool holds(int64_t m) const { return tensor.numel() && m >= row0 && m < row0 + tensor.size(0); }
  void put(int64_t m, int64_t n, int64_t offset, const int32_t* index, int64_t count) const {
    visit(m, n, offset, [&](auto* at) { std::copy(index, index + count, at); });
  }
  // Reads the argmaxima of one pair. Raises IndexError where one is negative or not below `others`, the other item's
  // present number of tokens: what a forward kept may no longer fit the masks.
  void get(int64_t m, int64_t n, int32_t* index, int64_t count, int64_t others) const {
    visit(m, n, 0, [&](auto* at) { std::copy(at, at + count, index); });
    int32_t bad = 0;
    for (int64_t i = 0; i < count; ++i) bad |= (index[i] < 0) | (index[i] >= others);
    TORCH_CHECK_INDEX(!bad, "max_sim: an argmax of the forward names a token that the backward's masks leave out, ",
                      "expected the same masks for both: was a mask's memory written to?");
  }

 private:
  template <class F>
  void visit(int64_t m, int64_t n, int64_t offset, const F& f) const {
    const int64_t at = ((m - row0) * tensor.size(1) + n) * tensor.size(2) + offset;
    void* data = tensor.data_ptr();
    switch (tensor.element_size()) {
      case 1:
        return f(static_cast<uint8_t*>(data) + at);
      case 2:
        return f(static_cast<int16_t*>(data) + at);
      default:
        return f(static_cast<int32_t*>(data) + at);
    }
  }
};

// Returns an uninitialised tensor for the argmaxima of `rows` items of x: for each token of `own`, the token of `other`
// with the largest product.
inline at::Tensor empty_argmax(int64_t rows, int64_t n, const TokenSide& own, const TokenSide& other) {
  return at::empty({rows, n, own.length}, index_dtype(other.length));
}

}  // namespace fc
