// The mean logit of each row's positives, which are all other rows of its class. It needs no products: the mean of
// scale * x_i . x_j over j is scale * x_i times the mean of x_j, which each class's sum of features gives.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "stats/feature_gradients.h"
#include "stats/prepared.h"

namespace fc {

template <class E>
class ClassMeans {
 public:
  using T = SumType<E>;

  // `labels` (M,) int64 are equal for rows of one class.
  ClassMeans(const Features<E>& features, const at::Tensor& labels) : features_(features), class_of_(features.rows) {
    check_sizes("labels", labels, {features.rows});
    check_dtype("labels", labels, at::kLong);
    const at::Tensor known = readable("labels", labels, at::kLong);
    const int64_t* label = known.const_data_ptr<int64_t>();
    std::vector<int64_t> order(features.rows);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [label](int64_t a, int64_t b) { return label[a] < label[b]; });
    for (size_t k = 0; k < order.size(); ++k) {
      if (k == 0 || label[order[k]] != label[order[k - 1]]) sizes_.push_back(0);
      class_of_[order[k]] = static_cast<int64_t>(sizes_.size()) - 1;
      ++sizes_.back();
    }
    sums_.assign(sizes_.size() * features.d, 0);
    std::vector<T> scratch;
    for (int64_t i = 0; i < features.rows; ++i) {
      const T* row = features_.wide_row(i, scratch);
      T* sum = sums_.data() + class_of_[i] * features_.d;
      for (int64_t j = 0; j < features_.d; ++j) sum[j] += row[j];
    }
  }

  // How many positives row i has.
  int64_t positives(int64_t i) const { return sizes_[class_of_[i]] - 1; }
  // How many rows have positives.
  int64_t counted() const {
    int64_t rows = 0;
    for (const int64_t size : sizes_) rows += size > 1 ? size : 0;
    return rows;
  }

  // Returns the mean logit of row i's positives. What overflows T is infinite, as it would be in a tile; +inf becomes
  // NaN, as the logit of a single positive does.
  double logit(int64_t i, double scale) const {
    std::vector<T> scratch;
    const T *row = features_.wide_row(i, scratch), *sum = sums_.data() + class_of_[i] * features_.d;
    double dot = 0;
    for (int64_t j = 0; j < features_.d; ++j) dot += static_cast<double>(row[j]) * static_cast<double>(sum[j] - row[j]);
    const double mean = scale * dot / static_cast<double>(positives(i));
    constexpr double kMax = std::numeric_limits<T>::max();
    if (mean > kMax) return std::nan("");
    return mean < -kMax ? -std::numeric_limits<double>::infinity() : mean;
  }

  // Adds `factor` times the mean of the row's positives to row i of `grad`, for each row that has any.
  void add_to(T* grad, double factor) const {
    for_each_task(features_.rows, [&](int64_t i) {
      if (positives(i) == 0) return;
      std::vector<T> scratch;
      const T *row = features_.wide_row(i, scratch), *sum = sums_.data() + class_of_[i] * features_.d;
      const T share = static_cast<T>(factor / static_cast<double>(positives(i)));
      T* out = grad + i * features_.d;
      for (int64_t j = 0; j < features_.d; ++j) out[j] += share * (sum[j] - row[j]);
    });
  }

 private:
  const Features<E>& features_;
  std::vector<int64_t> class_of_, sizes_;
  std::vector<T> sums_;  // (classes, D)
};

}  // namespace fc
