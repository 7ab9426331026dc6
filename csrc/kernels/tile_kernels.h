// The contract between the drivers in stats/ and the vector kernels for one tile of S, the M x N matrix of logits. A
// driver fills a tile with products x @ y.T; a kernel turns these into masked logits and reduces the logits to
// statistics, or turns them into gradients. Kernels do not use ATen and allocate nothing.
#pragma once
#include <cstdint>

namespace fc {

constexpr int64_t kTileRows = 256;  // rows of a tile, at most; a column's partial sums are merged once per tile
constexpr int64_t kTileCols = 256;  // columns of a tile, at most
constexpr int64_t kSweepRows = 16;  // rows of logits held at a time, 16 KB, from their maxima to their exponentials

// What happens to pairs whose ids are equal: they are excluded; or all others are; or their logits change sign.
enum class EqualIds { kExclude, kOnly, kNegate };

// How a product becomes a logit, and which logits are excluded. Pointers are to whole (M,) or (N,) vectors.
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
  bool softplus;      // reduce to sums of softplus(s) along rows, not to log-sum-exps

  int64_t target(int64_t i) const { return targets ? targets[i] : i; }
  // Whether a logit is its product times the scale, and no pair is excluded but the positive and S[i, i].
  bool is_plain() const { return !col_bias && !row_ids && !upper; }
};

// Where a tile lies in S.
struct TileBounds {
  int64_t row, col;    // of its first element
  int64_t rows, cols;  // its size
};

// Forward: products -> a tile's part of the statistics, as pairs (maximum, sum of exp(s - maximum)) for each row and
// column. For softplus it is row_sum alone.
template <class T>
struct ForwardTile {
  TileBounds at;
  const T* products;  // (rows, cols), row stride `stride`
  int64_t stride;
  T* pos;                // (M,) logits of the positives; written where this tile holds them
  T *row_max, *row_sum;  // (rows,), or null where the direction is not needed
  T *col_max, *col_sum;  // (cols,), or null
};

// Backward: products -> the gradient of the tile's logits, the positives left out:
//   g_row exp(s - row) + g_col exp(s - col), or for softplus g_row sigmoid(s), negated where the logit was.
template <class T>
struct BackwardTile {
  TileBounds at;
  const T* products;  // (rows, cols), row stride `stride`
  int64_t stride;
  T* grad;  // (rows, cols), row stride `grad_stride`; may be `products`
  int64_t grad_stride;
  const T *row, *row_low, *g_row;  // (M,) finite log-normaliser rounded to T, the remainder, its gradient; or null
  const T *col, *col_low, *g_col;  // (N,) the same for columns
};

// The kernels of one instruction set.
template <class T>
struct TileKernels {
  void (*forward)(const LogitRule<T>&, const ForwardTile<T>&);
  void (*backward)(const LogitRule<T>&, const BackwardTile<T>&);
  // Merges n pairs (max2, sum2) into (max, sum), each the parts of a log-sum-exp.
  void (*merge)(T* max, T* sum, const T* max2, const T* sum2, int64_t n);
  // Rows d long: total = grad + g * other (other may be null); grad = scale * total. Returns features . total.
  double (*add_scale_dot)(T* grad, const T* features, const T* other, T g, T scale, int64_t d);
};

// The kernels for this CPU, or those that FUSED_CONTRASTIVE_CPU_LEVEL names; throws if that level cannot run here.
template <class T>
const TileKernels<T>& tile_kernels();
const char* vector_level();

}  // namespace fc
