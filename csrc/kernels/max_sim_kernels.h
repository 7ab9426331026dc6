// The contract between the driver of late interaction, max_sim/, and its vector kernels, max_sim.inl.
#pragma once
#include <cstdint>

namespace fc {

// The kernels of one instruction set. Products are (rows, cols) with a row stride. The index of a maximum is the first
// of equal ones. A maximum is NaN where one of its products is; its index is then in range and means nothing.
template <class T>
struct MaxSimKernels {
  // best[j], index[j] = the maximum of column j over rows first, first + 1, ... Where first is not 0, they hold the
  // maxima over the rows before, and those take part.
  void (*column_maxima)(const T* products, int64_t stride, int64_t rows, int64_t cols, int64_t first, T* best,
                        int32_t* index);
  // The same along the rows: best[i], index[i] over columns first, first + 1, ...
  void (*row_maxima)(const T* products, int64_t stride, int64_t rows, int64_t cols, int64_t first, T* best,
                     int32_t* index);
  // out[i] += g * in[index[i]], for `count` rows d long
  void (*gather)(T* out, const T* in, const int32_t* index, int64_t count, int64_t d, T g);
  // out[index[i]] += g * in[i]
  void (*scatter)(T* out, const T* in, const int32_t* index, int64_t count, int64_t d, T g);
};

template <class T>
const MaxSimKernels<T>& max_sim_kernels();

}  // namespace fc
