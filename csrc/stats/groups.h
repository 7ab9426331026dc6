// Groups: independent problems whose rows and columns follow each other. A small group is one thread's work, from its
// products to its gradients; a large one is shared by all threads, like a problem without groups.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/input.h"
#include "common/parallel.h"
#include "stats/stats.h"
#include "stats/tiling.h"

namespace fc {

constexpr int64_t kSmallGroup = int64_t(1) << 18;  // pairs of a group that is one thread's work, at most
constexpr int64_t kGroupsAtOnce = 1024;            // small groups between two looks at signals

struct Group {
  Range rows, cols;
  bool empty() const { return rows.size() == 0 || cols.size() == 0; }
};

// Raises unless the lengths are of at least 0 and sum to the rows of x and of y.
inline std::vector<Group> groups_of(const StatsProblem& p) {
  TORCH_CHECK_VALUE(p.row_lengths && p.col_lengths, "row_lengths, col_lengths: expected both");
  const int64_t count = p.row_lengths->numel();
  std::vector<Group> groups(count);
  const auto fill = [&](const char* name, const at::Tensor& t, int64_t rows, Range Group::* range) {
    check_dtype(name, t, at::kLong);
    check_sizes(name, t, {count});
    const at::Tensor lengths = readable(name, t, at::kLong);
    int64_t begin = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t length = lengths.const_data_ptr<int64_t>()[k];
      TORCH_CHECK_VALUE(length >= 0 && length <= rows - begin, name, ": got ", length, " at ", k,
                        ", expected lengths of at least 0, whose sum is ", rows);
      groups[k].*range = {begin, begin + length};
      begin += length;
    }
    TORCH_CHECK_VALUE(begin == rows, name, ": got lengths whose sum is ", begin, ", expected ", rows);
  };
  fill("row_lengths", *p.row_lengths, p.x.size(0), &Group::rows);
  fill("col_lengths", *p.col_lengths, p.y.size(0), &Group::cols);
  return groups;
}

// Elements `range` of a tensor; a 0-d tensor belongs to all groups.
inline at::Tensor part(const at::Tensor& t, const Range& range) {
  return t.dim() ? t.narrow(0, range.begin, range.size()) : t;
}
inline OptionalTensor part(const OptionalTensor& t, const Range& range) {
  return t ? OptionalTensor(part(*t, range)) : std::nullopt;
}

// The problem of one group, which keeps no products.
inline StatsProblem part(const StatsProblem& p, const Group& g) {
  StatsProblem own = p;
  own.x = part(p.x, g.rows);
  own.y = p.y.is_same(p.x) ? own.x : part(p.y, g.cols);
  for (OptionalTensor* t : {&own.targets, &own.row_ids, &own.row_limit, &own.row_guide, &own.row_reference})
    *t = part(*t, g.rows);
  for (OptionalTensor* t : {&own.col_bias, &own.col_ids, &own.col_limit, &own.col_guide, &own.col_reference})
    *t = part(*t, g.cols);
  own.row_lengths = own.col_lengths = std::nullopt;
  own.kept_rows = 0;
  return own;
}

// Calls f(k, interrupt) for every group k: small ones in parallel, if all threads find work, and each in one thread.
template <class F>
void for_each_group(const std::vector<Group>& groups, const Interrupt& interrupt, const F& f) {
  std::vector<int64_t> small, large;
  for (size_t k = 0; k < groups.size(); ++k) {
    const bool is_small = groups[k].rows.size() * groups[k].cols.size() <= kSmallGroup;
    (is_small ? small : large).push_back(static_cast<int64_t>(k));
  }
  if (static_cast<int64_t>(small.size()) < at::get_num_threads())
    large.insert(large.end(), small.begin(), small.end());
  else
    for (const Range& some : pieces(0, static_cast<int64_t>(small.size()), kGroupsAtOnce)) {
      for_each_task(some.size(), [&](int64_t task) {
        const at::AutoDispatchBelowADInplaceOrView plain;  // threads of a parallel region begin without the guard
        f(small[some.begin + task], [] {});
      });
      interrupt();
    }
  for (const int64_t k : large) {
    f(k, interrupt);
    interrupt();
  }
}

// Gathers the groups' gradients.
class GroupedGradients {
 public:
  GroupedGradients(const StatsProblem& p, const Needs& needs, int64_t groups, at::ScalarType x_dtype,
                   at::ScalarType y_dtype, at::ScalarType dtype)
      : needs_(needs),
        one_bias_(p.col_bias && p.col_bias->dim() == 0),
        options_(p.x.options().dtype(dtype)),
        scale_(groups, 0),
        bias_(groups, 0) {
    if (needs.of[0]) all_[0] = at::empty(p.x.sizes(), p.x.options().dtype(x_dtype));
    if (needs.of[1]) all_[1] = at::empty(p.y.sizes(), p.y.options().dtype(y_dtype));
    if (needs.of[2]) all_[2] = at::empty({}, options_);
    if (needs.of[3]) all_[3] = at::empty(p.col_bias->sizes(), options_);
  }
  // What group g needs. A gradient that needs no rounding is formed in its place.
  Needs needs(const Group& g) const {
    Needs own{needs_.of, needs_.joint};
    if (in_place(0)) own.zeros_for_x = part(all_[0], g.rows).zero_();
    if (in_place(1)) own.zeros_for_y = part(all_[1], g.cols).zero_();
    return own;
  }
  // Sets the gradients of group k; undefined ones are 0. Any thread may call it.
  void set(int64_t k, const Group& g, const Gradients& grads) {
    copy(0, g.rows, grads[0]);
    copy(1, g.cols, grads[1]);
    if (grads[2].defined()) scale_[k] = grads[2].item<double>();
    if (!one_bias_)
      copy(3, g.cols, grads[3]);
    else if (grads[3].defined())
      bias_[k] = grads[3].item<double>();
  }
  Gradients finish() {
    const auto sum = [](at::Tensor& out, const std::vector<double>& parts) {
      out.copy_(at::scalar_tensor(std::accumulate(parts.begin(), parts.end(), 0.), at::kDouble));
    };
    if (all_[2].defined()) sum(all_[2], scale_);
    if (all_[3].defined() && one_bias_) sum(all_[3], bias_);
    return all_;
  }

 private:
  void copy(size_t which, const Range& range, const at::Tensor& grad) {
    if (!all_[which].defined() || range.size() == 0) return;
    const at::Tensor out = part(all_[which], range);
    if (grad.defined() && grad.is_alias_of(out)) return;
    if (grad.defined())
      out.copy_(grad);
    else
      out.zero_();
  }
  bool in_place(size_t which) const { return all_[which].defined() && all_[which].scalar_type() == options_.dtype(); }
  Needs needs_;
  bool one_bias_;
  at::TensorOptions options_;
  Gradients all_;
  std::vector<double> scale_, bias_;
};

}  // namespace fc
