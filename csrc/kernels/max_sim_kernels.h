// The contract between the driver of late interaction, max_sim/, and its vector kernels, max_sim.inl.
#pragma once
#include <cstdint>

namespace fc {

// The kernels of one instruction set. Products are (rows, cols) with a row stride. The index of a maximum is the first
// of equal ones. A maximum is NaN where one of its products is; its index is then in range but arbitrary.
template <class T>
struct MaxSimKernels {
  // Sets best[j] and index[j] to the maximum of column j and its row, where the rows of `products` count from `first`.
  // If `first` is not 0, best and index hold the maxima over the rows before `first`, which are compared too.
  void (*column_maxima)(const T* products, int64_t stride, int64_t rows, int64_t cols, int64_t first, T* best,
                        int32_t* index);
  // The same along rows: best[i] and index[i] are the maximum of row i and its column, counted from `first`.
  void (*row_maxima)(const T* products, int64_t stride, int64_t rows, int64_t cols, int64_t first, T* best,
                     int32_t* index);
  // out[i] += g * in[index[i]], for `count` rows d long
  void (*gather)(T* out, const T* in, const int32_t* index, int64_t count, int64_t d, T g);
  // out[index[i]] += g * in[i], likewise
  void (*scatter)(T* out, const T* in, const int32_t* index, int64_t count, int64_t d, T g);
  // Sets top[j] to the maximum of column j and sum[j] to its sum of exp(inverse * (s - top[j])), where a top of -inf
  // counts as 0. The sum is NaN where a product is NaN or +inf.
  void (*column_sums)(const T* products, int64_t stride, int64_t rows, int64_t cols, T inverse, T* top, T* sum);
  // Replaces each product of column j by factor[j] * exp(inverse * (s - top[j])).
  void (*column_weights)(T* products, int64_t stride, int64_t rows, int64_t cols, T inverse, const T* top,
                         const T* factor);
};

template <class T>
const MaxSimKernels<T>& max_sim_kernels();

}  // namespace fc
