// Tokens of late interaction item by item, as they lie in memory: an item is packed and converted when a task reads it.
#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "common/input.h"
#include "max_sim/tokens.h"

namespace fc {

// All items of x, or of y, in their own dtype.
struct ItemSide {
  at::Tensor tokens;  // (items, length, D)
  RealTokens real;
  int64_t items, length, d;

  ItemSide(const char* name, const at::Tensor& x, const OptionalTensor& lengths, const OptionalTensor& order)
      : tokens(readable(name, x, x.scalar_type())),
        real(x, lengths, order),
        items(x.size(0)),
        length(x.size(1)),
        d(x.size(2)) {}
  int64_t count(int64_t item) const { return real.count[item]; }
  // Which tokens of an item are real, in order, or undefined if they are the first ones.
  at::Tensor places(int64_t item) const {
    return real.order.defined() ? real.order[item].narrow(0, 0, count(item)) : at::Tensor();
  }
};

// Reads items in one thread. Threads of a parallel region begin without the guard that `plain` is.
template <class T>
class ItemReader {
 public:
  explicit ItemReader(const ItemSide& side) : side_(side) {}

  // The item's real tokens (count, D), until the next call.
  const T* read(int64_t item) {
    if (item == item_) return held_.template const_data_ptr<T>();
    const at::AutoDispatchBelowADInplaceOrView plain;
    const at::Tensor all = side_.tokens[item], places = side_.places(item);
    held_ = (places.defined() ? all.index_select(0, places) : all).to(c10::CppTypeToScalarType<T>::value);
    item_ = item;
    return held_.template const_data_ptr<T>();
  }

 private:
  const ItemSide& side_;
  int64_t item_ = -1;
  at::Tensor held_;
};

// The gradient of all items of a side, in their dtype; each item's is written once.
template <class T>
class ItemGradients {
 public:
  explicit ItemGradients(const ItemSide& side) : side_(side), all_(at::empty_like(side.tokens)) {}

  // Calls f(out) with zeros (count, D), to which it adds the gradient of the item's real tokens.
  template <class F>
  void write(int64_t item, const F& f) const {
    const at::AutoDispatchBelowADInplaceOrView plain;
    const at::Tensor out = all_[item].zero_(), places = side_.places(item);
    if (!places.defined() && out.scalar_type() == c10::CppTypeToScalarType<T>::value)
      return f(out.template mutable_data_ptr<T>());
    const at::Tensor sums = at::zeros({side_.count(item), side_.d}, c10::CppTypeToScalarType<T>::value);
    f(sums.template mutable_data_ptr<T>());
    if (places.defined())
      out.index_copy_(0, places, sums.to(out.scalar_type()));
    else
      out.narrow(0, 0, side_.count(item)).copy_(sums);
  }
  const at::Tensor& tensor() const { return all_; }

 private:
  const ItemSide& side_;
  at::Tensor all_;
};

}  // namespace fc
