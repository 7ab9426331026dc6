// The contract between the ATen driver (stats.cpp) and the vector kernels (tile.inl): one tile of S at a time.
//
// A tile is at most kTileRows x kTileCols of the M x N matrix S. The driver fills it with raw products x @ y.T, a
// kernel turns them into masked logits and reduces them, or into gradients. Kernels know no ATen and allocate nothing.
#pragma once
#include <cstdint>

namespace fc {

constexpr int64_t kTileRows = 256;  // rows one task sweeps; column partials are merged every kTileRows rows
constexpr int64_t kTileCols = 256;  // columns one task sweeps; a group of kGroupRows rows of them fits in 16 KB
constexpr int64_t kGroupRows = 16;  // rows held in L1 between the maximum and the exponentials

// What happens to pairs whose ids are equal: excluded; or all others are; or their logits change sign.
enum class EqualIds { kExclude, kOnly, kNegate };

// How a raw product becomes a logit, and which logits are excluded. Pointers are to whole (M,) or (N,) vectors.
template <class T>
struct LogitRule {
  T scale;
  const T* col_bias;       // (N,) added, or null
  const int64_t* targets;  // (M,) column of the positive, or null for t(i) = i
  const int32_t* row_ids;  // (M,) compared with col_ids, or null
  const int32_t* col_ids;  // (N,)
  EqualIds equal_ids;
  bool exclude_self;  // exclude S[i, i]
  bool upper;         // exclude all but j > i
  bool softplus;      // sums of softplus(s), of rows alone, instead of log-sum-exps

  int64_t target(int64_t i) const { return targets ? targets[i] : i; }
};

// Where a tile lies in S.
struct Place {
  int64_t row, col;    // of its first element
  int64_t rows, cols;  // its size
};

// Forward: raw products -> statistics as (maximum, sum of exp(s - maximum)) partials of this tile; or, for softplus,
// as row_sum alone.
template <class T>
struct ForwardTile {
  Place at;
  const T* products;  // (rows, cols), row stride `stride`
  int64_t stride;
  T* pos;                // (M,) positives' logits; the tile that holds a row's target writes it
  T *row_max, *row_sum;  // (rows,) partials of this tile, or null: direction not asked
  T *col_max, *col_sum;  // (cols,) partials of this tile, or null
};

// Backward: raw products -> the negatives' gradient g_row exp(s - row) + g_col exp(s - col); or, for softplus,
// g_row sigmoid(s), the sign of which changes with that of the logit.
template <class T>
struct BackwardTile {
  Place at;
  const T* products;  // (rows, cols), row stride `stride`
  int64_t stride;
  T* grad;  // (rows, cols), row stride `grad_stride`; may be `products`
  int64_t grad_stride;
  const T *row, *row_low, *g_row;  // (M,) finite log-normaliser, what rounding it to T left, and its gradient; or null
  const T *col, *col_low, *g_col;  // (N,) likewise for columns
};

// The kernels of one instruction set.
template <class T>
struct Kernels {
  void (*forward)(const LogitRule<T>&, const ForwardTile<T>&);
  void (*backward)(const LogitRule<T>&, const BackwardTile<T>&);
  // (max, sum) += (max2, sum2), elementwise over n partial log-sum-exps
  void (*merge)(T* max, T* sum, const T* max2, const T* sum2, int64_t n);
  // One row of a feature gradient, d long: total = grad + g * other (other may be null), grad = scale * total. Returns
  // features . total, the row's part of the scale's gradient.
  double (*finish_row)(T* grad, const T* features, const T* other, T g, T scale, int64_t d);
};

// Chooses by what this CPU can run, or by FUSED_CONTRASTIVE_CPU_LEVEL (throws if that level cannot run here).
template <class T>
const Kernels<T>& kernels();
const char* vector_level();

}  // namespace fc
