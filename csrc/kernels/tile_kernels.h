// The contract between the drivers in stats/ and the vector kernels for one tile of S, the M x N matrix of logits. A
// driver fills a tile with products x @ y.T; a kernel turns these into masked logits and reduces the logits to
// statistics, or turns them into gradients. Kernels do not use ATen and allocate nothing.
#pragma once
#include <cstdint>

namespace fc {

constexpr int64_t kTileRows = 256;  // rows of a tile, at most; a column's partial sums are merged once per tile
constexpr int64_t kTileCols = 256;  // columns of a tile, at most
constexpr int64_t kSweepRows = 16;  // rows of logits held at a time, 16 KB, from their maxima to their exponentials
constexpr int64_t kMostIds = 5;     // ids of a row or column: a caller's 4, and one for the target

// What happens to related pairs, those with an equal id: they are excluded; or all others are; or their logits change
// sign; or they are reduced by themselves, for softplus with their sign changed; or they count and are also added up.
enum class EqualIds { kExclude, kOnly, kNegate, kApart, kAdd };

// How a product becomes a logit, and which logits are excluded. Pointers are to whole (M,) or (N,) vectors.
template <class T>
struct LogitRule {
  T scale;
  const T* col_bias;       // (N,) added, or null
  const int64_t* targets;  // (M,) column of the positive, or null for t(i) = i
  const int32_t* row_ids;  // (ids, M) compared with col_ids, or null
  const int32_t* col_ids;  // (ids, N)
  int64_t ids, row_count, col_count;
  const T *row_limit, *col_limit;          // (M,), (N,): pairs with a similarity above it are excluded there; or null
  const T *row_reference, *col_reference;  // (M,), (N,): count the logits above it; or null
  EqualIds equal_ids;
  bool paired;        // row i has a positive, in column target(i)
  bool exclude_self;  // exclude S[i, i]
  bool upper;         // exclude all but j > i
  bool softplus;      // reduce to sums of softplus(s) along rows, not to log-sum-exps
  bool teacher;       // the guide's products are a teacher's logits t: also reduce these, and s by their softmax

  // The column of row i's positive, or -1.
  int64_t target(int64_t i) const { return !paired ? -1 : targets ? targets[i] : i; }
  bool is_limited() const { return row_limit || col_limit; }
  bool is_apart() const { return row_ids && equal_ids == EqualIds::kApart; }
  bool adds() const { return row_ids && equal_ids == EqualIds::kAdd; }
};

// Where a tile lies in S.
struct TileBounds {
  int64_t row, col;    // of its first element
  int64_t rows, cols;  // its size
};

// A tile's part of the statistics of its rows or columns: pairs (maximum, sum of exp(s - maximum)), for softplus sums
// alone. Null where they are not needed.
template <class T>
struct TileSums {
  T *max, *sum;
};

// Forward: products -> a tile's part of the statistics.
template <class T>
struct ForwardTile {
  TileBounds at;
  const T* products;  // (rows, cols), row stride `stride`
  int64_t stride;
  // (rows, cols), rows kTileCols apart: a teacher's logits, or what limits are compared with; null: products * scale
  const T* guide;
  T* pos;                                // (M,) logits of the positives; written where this tile holds them
  TileSums<T> row, col;                  // (rows,), (cols,)
  TileSums<T> related_row, related_col;  // of the related pairs, if these are reduced by themselves or added up
  // How many logits are above the references (in `sum`) and the highest logits; without references null.
  TileSums<T> row_ranks, col_ranks;
  // With a teacher, related_row and related_col are its sums, and these are sums of exp(t - maximum) * s.
  T *weighted_row, *weighted_col;
};

// Log-normalisers of all rows or columns and the gradients that arrive at them; or null.
template <class T>
struct Normalised {
  const T *value, *low, *g;  // finite log-normaliser rounded to T, the remainder, its gradient
};

// Backward: products -> the gradient of the tile's logits, the positives left out:
//   g_row exp(s - row) + g_col exp(s - col), or for softplus g_row sigmoid(s), negated where the logit was.
template <class T>
struct BackwardTile {
  TileBounds at;
  const T* products;  // (rows, cols), row stride `stride`
  int64_t stride;
  const T* guide;  // as in ForwardTile
  T* grad;         // (rows, cols), row stride `grad_stride`; may be `products`
  int64_t grad_stride;
  Normalised<T> row, col;  // (M,), (N,)
  // Of the related pairs, if these are reduced by themselves or added up; with a teacher, of its logits.
  Normalised<T> related_row, related_col;
};

// A prefix's products to its cosines: each is multiplied by a factor of its row and one of its column.
template <class T>
struct ScaledTile {
  int64_t rows, cols;
  const T *row, *col;  // (rows,), (cols,)
  const T* products;   // (rows, cols), row stride `stride`
  int64_t stride;
  T* out;  // (rows, cols), row stride `out_stride`
  int64_t out_stride;
};

// A prefix's G to the gradient of its products, plus what longer prefixes have added up.
template <class T>
struct WeighedTile {
  int64_t rows, cols;
  const T *row, *col;  // the factors, or null where all are 1
  const T* cosines;    // (rows, cols), row stride `stride`
  int64_t stride;
  T* grad;          // G, which becomes factors * G + longer; row stride `grad_stride`
  const T* longer;  // likewise, or null
  int64_t grad_stride;
  T *row_dots, *col_dots;  // (rows,), (cols,) sums of G * cosines; or null
};

// The kernels of one instruction set.
template <class T>
struct TileKernels {
  void (*forward)(const LogitRule<T>&, const ForwardTile<T>&);
  void (*backward)(const LogitRule<T>&, const BackwardTile<T>&);
  void (*scale)(const ScaledTile<T>&);
  void (*weigh)(const WeighedTile<T>&);
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
