// The statistic that a forward accumulates for one direction, and its normalisers as a backward reads them.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/tile_kernels.h"

namespace fc {

// Holds the log-sum-exps (without `log`, the sums) of one direction over all of S, and the partial ones of a section:
// `parts` vectors of `length` elements. Tiles write the parts in parallel and `merge` adds them in a fixed order, so
// that the result does not depend on the number of threads.
template <class T>
class RunningStatistic {
 public:
  RunningStatistic(bool asked, int64_t size, bool log)
      : asked_(asked),
        log_(log),
        max_(asked && log ? size : 0, -std::numeric_limits<T>::infinity()),
        sum_(asked && log ? size : 0, 0),
        plain_sum_(asked && !log ? size : 0, 0) {}

  void start(int64_t parts, int64_t length) {
    if (!asked_) return;
    parts_ = parts, length_ = length;
    part_max_.resize(log_ ? parts * length : 0);
    part_sum_.resize(parts * length);
  }
  T* part_max(int64_t part, int64_t offset) {
    return asked_ && log_ ? part_max_.data() + part * length_ + offset : nullptr;
  }
  T* part_sum(int64_t part, int64_t offset) { return asked_ ? part_sum_.data() + part * length_ + offset : nullptr; }

  // Where a tile's sums go.
  TileSums<T> part(int64_t part, int64_t offset) { return {part_max(part, offset), part_sum(part, offset)}; }

  // Makes `size` elements of a part empty, for a tile that is skipped.
  void skip(int64_t part, int64_t offset, int64_t size) {
    if (T* max = part_max(part, offset)) std::fill_n(max, size, -std::numeric_limits<T>::infinity());
    if (T* sum = part_sum(part, offset)) std::fill_n(sum, size, T(0));
  }

  // Adds the parts to the whole, from its element `first` on.
  void merge(int64_t first) {
    if (!asked_) return;
    for (int64_t p = 0; p < parts_; ++p) {
      const T* part = part_sum(p, 0);
      if (log_)
        tile_kernels<T>().merge(max_.data() + first, sum_.data() + first, part_max(p, 0), part, length_);
      else
        std::transform(part, part + length_, plain_sum_.begin() + first, plain_sum_.begin() + first, std::plus<>());
    }
  }
  // Returns the statistic in double: next to a maximum of 1000, float would round log(sum) to 6e-5.
  at::Tensor value() const {
    const auto size = static_cast<int64_t>(log_ ? sum_.size() : plain_sum_.size());
    at::Tensor out = at::empty({size}, at::kDouble);
    double* values = out.mutable_data_ptr<double>();
    if (!log_)
      std::copy(plain_sum_.begin(), plain_sum_.end(), values);
    else
      std::transform(max_.begin(), max_.end(), sum_.begin(), values,
                     [](double max, double sum) { return max + std::log(sum); });
    return out;
  }

 private:
  bool asked_, log_;
  int64_t parts_ = 0, length_ = 0;
  std::vector<T> max_, sum_, part_max_, part_sum_;
  std::vector<double> plain_sum_;
};

// Holds, for one direction and in double, the log-sum-exps of a teacher's logits and the sums of our logits weighted by
// the exponentials of the teacher's. Parts are merged element by element, in a fixed order.
template <class T>
class WeightedStatistic {
 public:
  WeightedStatistic(bool asked, int64_t size)
      : asked_(asked),
        max_(asked ? size : 0, -std::numeric_limits<double>::infinity()),
        sum_(max_.size()),
        weighted_(max_.size()) {}
  void start(int64_t parts, int64_t length) {
    if (!asked_) return;
    parts_ = parts, length_ = length;
    for (auto* each : {&part_max_, &part_sum_, &part_weighted_}) each->resize(parts * length);
  }
  TileSums<T> part(int64_t part, int64_t offset) {
    if (!asked_) return {};
    return {part_max_.data() + part * length_ + offset, part_sum_.data() + part * length_ + offset};
  }
  T* weighted(int64_t part, int64_t offset) {
    return asked_ ? part_weighted_.data() + part * length_ + offset : nullptr;
  }
  // Adds the parts to the whole, from its element `first` on.
  void merge(int64_t first) {
    for (int64_t k = 0; asked_ && k < parts_ * length_; ++k) {
      const double max = part_max_[k];
      // Of NaN alone the maximum is -inf too, but the sum is NaN, and must not be lost.
      if (max == -std::numeric_limits<double>::infinity() && part_sum_[k] == 0) continue;
      double &whole = max_[first + k % length_], &sum = sum_[first + k % length_];
      double& weighted = weighted_[first + k % length_];
      const double higher = std::max(whole, max), by = std::exp(whole - higher), its = std::exp(max - higher);
      sum = sum * by + part_sum_[k] * its;
      weighted = weighted * by + part_weighted_[k] * its;
      whole = higher;
    }
  }
  // Returns the weighted means and the log-sum-exps, which are 0 and -inf where all pairs are excluded.
  std::pair<at::Tensor, at::Tensor> value() const {
    const auto size = static_cast<int64_t>(max_.size());
    at::Tensor mean = at::empty({size}, at::kDouble), log = at::empty({size}, at::kDouble);
    for (int64_t i = 0; i < size; ++i) {
      mean.mutable_data_ptr<double>()[i] = sum_[i] == 0 ? 0 : weighted_[i] / sum_[i];
      log.mutable_data_ptr<double>()[i] = max_[i] + std::log(sum_[i]);
    }
    return {mean, log};
  }

 private:
  bool asked_;
  int64_t parts_ = 0, length_ = 0;
  std::vector<double> max_, sum_, weighted_;
  std::vector<T> part_max_, part_sum_, part_weighted_;
};

// Holds, for one direction, how many logits are above the references and the highest logits.
template <class T>
class RankStatistic {
 public:
  RankStatistic(bool asked, int64_t size)
      : asked_(asked), max_(asked ? size : 0, -std::numeric_limits<T>::infinity()), count_(max_.size()) {}

  void start(int64_t parts, int64_t length) {
    if (!asked_) return;
    parts_ = parts, length_ = length;
    part_max_.resize(parts * length), part_count_.resize(parts * length);
  }
  // Where a tile's maxima and counts go.
  TileSums<T> part(int64_t part, int64_t offset) {
    if (!asked_) return {};
    return {part_max_.data() + part * length_ + offset, part_count_.data() + part * length_ + offset};
  }
  void skip(int64_t part, int64_t offset, int64_t size) {
    const TileSums<T> of = this->part(part, offset);
    if (of.max) std::fill_n(of.max, size, -std::numeric_limits<T>::infinity()), std::fill_n(of.sum, size, T(0));
  }
  // Adds the parts to the whole, from its element `first` on.
  void merge(int64_t first) {
    for (int64_t p = 0; asked_ && p < parts_; ++p) {
      const TileSums<T> of = part(p, 0);
      for (int64_t i = 0; i < length_; ++i) {
        count_[first + i] += static_cast<int64_t>(of.sum[i]);
        max_[first + i] = std::max(max_[first + i], of.max[i]);
      }
    }
  }
  // Adds another direction's values, for an upper triangle, whose columns are the rows of the lower one.
  void add(const RankStatistic& other) {
    for (size_t i = 0; i < max_.size(); ++i) {
      count_[i] += other.count_[i];
      max_[i] = std::max(max_[i], other.max_[i]);
    }
  }
  // Returns the counts in [:, 0] and the highest logits in [:, 1], in double.
  at::Tensor value() const {
    at::Tensor out = at::empty({static_cast<int64_t>(max_.size()), 2}, at::kDouble);
    double* values = out.mutable_data_ptr<double>();
    for (size_t i = 0; i < max_.size(); ++i)
      values[2 * i] = static_cast<double>(count_[i]), values[2 * i + 1] = max_[i];
    return out;
  }

 private:
  bool asked_;
  int64_t parts_ = 0, length_ = 0;
  std::vector<T> max_, part_max_, part_count_;
  std::vector<int64_t> count_;
};

// Holds log-normalisers, given in double, as sums of two T each. -inf, where all pairs are excluded, is held as 0.
template <class T>
struct Normaliser {
  std::vector<T> high, low;

  explicit Normaliser(int64_t size) : high(size), low(size) {}
  explicit Normaliser(const at::Tensor& value) : Normaliser(value.numel()) { set(0, value); }
  // `value` is contiguous.
  void set(int64_t first, const at::Tensor& value) {
    const double* v = value.const_data_ptr<double>();
    for (int64_t i = 0; i < value.numel(); ++i) {
      const double finite = v[i] == -std::numeric_limits<double>::infinity() ? 0 : v[i];
      high[first + i] = static_cast<T>(finite);
      low[first + i] = static_cast<T>(finite - high[first + i]);
    }
  }
};

}  // namespace fc
