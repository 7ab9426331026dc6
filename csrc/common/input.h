// Checks of tensors that come from outside: sizes, indices and memory are checked before a kernel reads them. What a
// caller checked may have changed since, in a buffer that is shared with NumPy or by hooks on saved tensors.
#pragma once
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <optional>

namespace fc {

using OptionalTensor = std::optional<at::Tensor>;

inline void check_sizes(const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, ": got shape ", t.sizes(), ", expected ", sizes);
}

inline void check_dtype(const char* name, const at::Tensor& t, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": got dtype ", t.scalar_type(), ", expected ", dtype);
}

// Raises unless the tensor is dense, on the CPU, and in memory: `untyped_storage().resize_(0)` may have freed it.
inline void check_memory(const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.is_cpu() && t.layout() == at::kStrided, name, ": expected a dense tensor on the CPU");
  if (t.numel() == 0) return;
  const size_t bytes = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(),
                                                        static_cast<size_t>(t.storage_offset()));
  TORCH_CHECK(t.storage().nbytes() >= bytes && t.storage().data(), name, ": its storage has ", t.storage().nbytes(),
              " bytes, expected at least ", bytes, ": it was freed or resized");
}

// The tensor's values in `dtype`, contiguous and with memory behind them. A lazy tensor of zeros has no memory, and a
// negated view, such as z.conj().imag, stores the opposite of its values.
inline at::Tensor readable(const char* name, const at::Tensor& t, at::ScalarType dtype) {
  if (t._is_zerotensor()) return at::zeros(t.sizes(), t.options().dtype(dtype));
  check_memory(name, t);
  return t.to(dtype).resolve_neg().contiguous();
}

inline OptionalTensor readable(const char* name, const OptionalTensor& t, at::ScalarType dtype) {
  return t ? OptionalTensor(readable(name, *t, dtype)) : std::nullopt;
}

// Returns a copy of indices, each in [0, limit), which nobody else can change.
inline at::Tensor indices(const char* name, const at::Tensor& t, int64_t limit) {
  check_dtype(name, t, at::kLong);
  const at::Tensor source = readable(name, t, at::kLong), copy = source.clone();
  const int64_t* index = copy.const_data_ptr<int64_t>();
  const auto bad =
      std::find_if(index, index + copy.numel(), [limit](int64_t i) { return i < 0 || i >= limit; }) - index;
  TORCH_CHECK_INDEX(bad == copy.numel(), name, ": got ", index[bad], " at ", bad, ", expected 0 to ", limit - 1);
  return copy;
}

template <class T>
const T* data(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace fc
