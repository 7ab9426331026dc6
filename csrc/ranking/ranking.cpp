// Scores are compared with the worst of the row's best k so far, kChunk at a time and without branches. In random order
// only about k log(N / k) of N columns pass; these are gathered, then sorted and merged in batches. For small k this is
// no slower than a heap, and for k near N no slower than one sort.
#include "ranking/ranking.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/input.h"

namespace fc {
namespace {

constexpr int64_t kChunk = 32;
constexpr int64_t kLeastGathered = 16;  // columns gathered before a merge, or k if that is more
constexpr int64_t kGrain = 32768;       // scores per thread, at least

template <class T>
struct Entry {
  T score;
  int64_t column;
};

// Whether a ranks ahead of b in the order of core/order.py, which is a strict weak order even with NaN.
template <class T>
bool is_ahead(const Entry<T>& a, const Entry<T>& b) {
  if (a.score > b.score) return true;
  if (a.score < b.score) return false;
  const bool a_nan = std::isnan(a.score), b_nan = std::isnan(b.score);
  return a_nan == b_nan ? a.column < b.column : b_nan;
}

// Whether any of the scores may enter a list whose last score is `worst`. If `worst` is NaN, every score may.
template <class T>
bool any_passes(const T* scores, int64_t n, T worst) {
  int passes = 0;
  if (n == kChunk) {
    for (int64_t j = 0; j < kChunk; ++j) passes |= !(scores[j] <= worst);
  } else {
    for (int64_t j = 0; j < n; ++j) passes |= !(scores[j] <= worst);
  }
  return passes;
}

// Finds the best k columns of one row after another, in buffers that the rows share.
template <class T>
class Best {
 public:
  explicit Best(int64_t k) : k_(k), gather_limit_(std::max(k, kLeastGathered)) {}

  // Merges a block of one row into the list in `values` and `columns`, which has `filled` entries.
  void scan(const T* scores, int64_t n, int64_t first_column, T* values, int64_t* columns, int64_t filled) {
    list_.resize(filled);
    for (int64_t j = 0; j < filled; ++j) list_[j] = {values[j], columns[j]};
    bool changed = false;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, n);
      if (full() && !any_passes(scores + begin, end - begin, list_.back().score)) continue;
      changed = true;
      for (int64_t j = begin; j < end; ++j) offer({scores[j], first_column + j});
    }
    if (!changed) return;
    merge();
    for (size_t j = 0; j < list_.size(); ++j) values[j] = list_[j].score, columns[j] = list_[j].column;
  }

 private:
  bool full() const { return static_cast<int64_t>(list_.size()) == k_; }

  void offer(const Entry<T>& entry) {
    if (full() && !is_ahead(entry, list_.back())) return;
    gathered_.push_back(entry);
    if (static_cast<int64_t>(gathered_.size()) == gather_limit_) merge();
  }

  void merge() {
    std::sort(gathered_.begin(), gathered_.end(), is_ahead<T>);
    merged_.resize(list_.size() + gathered_.size());
    std::merge(list_.begin(), list_.end(), gathered_.begin(), gathered_.end(), merged_.begin(), is_ahead<T>);
    merged_.resize(std::min<size_t>(merged_.size(), k_));
    list_.swap(merged_);
    gathered_.clear();
  }

  int64_t k_, gather_limit_;
  std::vector<Entry<T>> list_, gathered_, merged_;
};

template <class T>
void merge_blocks(const at::Tensor& scores, int64_t first_column, const at::Tensor& values, const at::Tensor& indices) {
  const int64_t m = scores.size(0), n = scores.size(1), k = values.size(1), filled = std::min(first_column, k);
  const T* s = scores.const_data_ptr<T>();
  T* v = values.mutable_data_ptr<T>();
  int64_t* c = indices.mutable_data_ptr<int64_t>();
  at::parallel_for(0, m, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n)), [&](int64_t begin, int64_t end) {
    Best<T> best(k);
    for (int64_t i = begin; i < end; ++i) best.scan(s + i * n, n, first_column, v + i * k, c + i * k, filled);
  });
}

// Counts the columns of a block that rank ahead of the target, which may lie outside [0, n). Column `target` itself is
// never counted.
template <class T>
int64_t ahead_in_row(const T* scores, int64_t n, T score, int64_t target) {
  const int64_t before = std::clamp<int64_t>(target, 0, n), after = std::clamp<int64_t>(target + 1, 0, n);
  int32_t count = 0;  // vectorises better than int64_t; a block has fewer columns than 2^31
  if (std::isnan(score)) {
    for (int64_t j = after; j < n; ++j) count += !std::isnan(scores[j]);
    return count + before;
  }
  for (int64_t j = 0; j < before; ++j) count += scores[j] >= score;
  for (int64_t j = after; j < n; ++j) count += scores[j] > score;
  return count;
}

template <class T>
void count_block(const at::Tensor& scores, int64_t first_column, const at::Tensor& target_scores,
                 const at::Tensor& targets, const at::Tensor& counts) {
  const int64_t m = scores.size(0), n = scores.size(1);
  const T *s = scores.const_data_ptr<T>(), *own = target_scores.const_data_ptr<T>();
  const int64_t* t = targets.const_data_ptr<int64_t>();
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  at::parallel_for(0, m, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] += ahead_in_row(s + i * n, n, own[i], t[i] - first_column);
  });
}

// Raises a TypeError or ValueError unless `of_scores`, which holds scores, and `of_columns`, which hold column indices,
// have the same shape, with one row for each row of `scores`.
void check(const at::Tensor& scores, const at::Tensor& of_scores, std::initializer_list<at::Tensor> of_columns) {
  const at::ScalarType dtype = scores.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "scores: got dtype ", dtype,
                   ", expected float32 or 64");
  TORCH_CHECK_TYPE(of_scores.scalar_type() == dtype, "values: got dtype ", of_scores.scalar_type(), ", expected ",
                   dtype);
  TORCH_CHECK_VALUE(scores.is_contiguous() && of_scores.is_contiguous(), "scores, values: expected contiguous tensors");
  TORCH_CHECK_VALUE(scores.dim() == 2 && of_scores.dim() && of_scores.size(0) == scores.size(0),
                    "scores, values: got shapes ", scores.sizes(), " and ", of_scores.sizes(),
                    ", expected (M, n) and M rows");
  check_memory("scores", scores);
  check_memory("values", of_scores);
  for (const at::Tensor& t : of_columns) {
    TORCH_CHECK_TYPE(t.scalar_type() == at::kLong && t.is_contiguous(), "columns: expected contiguous int64 tensors");
    check_sizes("columns", t, of_scores.sizes());
    check_memory("columns", t);
  }
}

}  // namespace

void merge_top_k(const at::Tensor& scores, int64_t first_column, const at::Tensor& values, const at::Tensor& indices) {
  check(scores, values, {indices});
  TORCH_CHECK_VALUE(values.dim() == 2 && values.size(1) > 0 && first_column >= 0, "values: got shape ", values.sizes(),
                    " for columns from ", first_column, ", expected (M, k), k >= 1, and columns from 0 or more");
  return scores.scalar_type() == at::kDouble ? merge_blocks<double>(scores, first_column, values, indices)
                                             : merge_blocks<float>(scores, first_column, values, indices);
}

void count_ahead(const at::Tensor& scores, int64_t first_column, const at::Tensor& target_scores,
                 const at::Tensor& targets, const at::Tensor& counts) {
  check(scores, target_scores, {targets, counts});
  TORCH_CHECK_VALUE(target_scores.dim() == 1, "target_scores: got shape ", target_scores.sizes(), ", expected (M,)");
  return scores.scalar_type() == at::kDouble ? count_block<double>(scores, first_column, target_scores, targets, counts)
                                             : count_block<float>(scores, first_column, target_scores, targets, counts);
}

}  // namespace fc
