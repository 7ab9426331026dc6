// A training step frees its kept products and the next one wants as many. The page faults of getting such a block from
// the system again cost a third of a matrix product, so the block freed last is held here, marked MADV_FREE: Linux
// takes its pages, without writing them to disk, as soon as anything else needs memory.
#include "common/memory.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>

#include "common/integers.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <utility>
#endif

namespace fc {

#ifdef __linux__
namespace {

size_t page_size() {
  static const size_t size = sysconf(_SC_PAGESIZE);
  return size;
}

}  // namespace
#endif

#if defined(__linux__) && defined(MADV_FREE)
namespace {

constexpr size_t kTiny = 64 << 10;  // up to this size malloc itself reuses memory
constexpr size_t kSmall = 1 << 20;  // up to this size blocks are held as they are
constexpr size_t kHugePage = 2 << 20;

// Maps whole pages, aligned so that they can be huge pages: marking a thousand small pages as free, and using them
// again, cost up to a twentieth of a step that keeps 4 MB. Returns null if there is no memory.
void* map_pages(size_t bytes) {
  const auto map = [](size_t size) {
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  };
  if (bytes < kHugePage) return map(bytes);
  char* begin = map(bytes + kHugePage);
  if (!begin) return map(bytes);
  const auto at = reinterpret_cast<uintptr_t>(begin);
  const size_t before = round_up(at, kHugePage) - at;
  if (before) munmap(begin, before);
  munmap(begin + before + bytes, kHugePage - before);
  return begin + before;
}

struct Slab {
  void* memory = nullptr;
  size_t bytes = 0;
};

class Spare {
 public:
  Slab take(size_t least) {
    const size_t bytes = round_up(least, page_size());
    Slab slab;
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock) slab = std::exchange(spare_, {});
    }
    if (slab.bytes < bytes || slab.bytes / 2 > bytes) {
      release(slab);
      slab = {map_pages(bytes), bytes};
    }
    TORCH_CHECK_WITH(OutOfMemoryError, slab.memory, "fused_contrastive: could not allocate ", bytes,
                     " bytes for the kept products (", std::strerror(errno), "); a smaller memory_budget needs less");
    madvise(slab.memory, slab.bytes, MADV_HUGEPAGE);
    return slab;
  }
  // MADV_NOHUGEPAGE comes first: Linux's khugepaged, which gathers small pages into huge ones, would touch them again.
  void give_back(Slab slab) {
    madvise(slab.memory, slab.bytes, MADV_NOHUGEPAGE);
    madvise(slab.memory, slab.bytes, MADV_FREE);
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock) std::swap(slab, spare_);
    }
    release(slab);
  }

 private:
  static void release(const Slab& slab) {
    if (slab.memory) munmap(slab.memory, slab.bytes);
  }
  std::mutex mutex_;  // never waited for: in a forked child its owner may not exist
  Slab spare_;
};

// Holds the last few small blocks. malloc gives the end of its heap back to the system as soon as some hundred
// kilobytes of it are free, and the page faults of getting them again took a fifth of a step of 128 rows.
class SmallSpares {
 public:
  Slab take(size_t bytes) {
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock)
        for (Slab& slab : spares_)
          if (slab.bytes >= bytes && slab.bytes / 2 <= bytes) return std::exchange(slab, {});
    }
    const Slab slab{std::aligned_alloc(64, round_up(bytes, size_t(64))), bytes};
    TORCH_CHECK_WITH(OutOfMemoryError, slab.memory, "fused_contrastive: could not allocate ", bytes, " bytes");
    return slab;
  }
  void give_back(Slab slab) {
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock) {
        std::swap(slab, spares_[oldest_]);
        oldest_ = (oldest_ + 1) % spares_.size();
      }
    }
    std::free(slab.memory);
  }

 private:
  std::mutex mutex_;  // never waited for, as above
  std::array<Slab, 4> spares_;
  size_t oldest_ = 0;
};

// Never destroyed: tensors may outlive static objects.
template <class S>
S& never_destroyed() {
  static S& instance = *new S;
  return instance;
}

template <class S>
at::Tensor matrix_in(size_t bytes, int64_t rows, int64_t cols, const at::TensorOptions& options) {
  const Slab slab = never_destroyed<S>().take(bytes);
  return at::from_blob(slab.memory, {rows, cols}, [slab](void*) { never_destroyed<S>().give_back(slab); }, options);
}

}  // namespace

at::Tensor reused_matrix(int64_t rows, int64_t cols, const at::TensorOptions& options) {
  const size_t bytes = rows * cols * options.dtype().itemsize();
  if (bytes <= kTiny) return at::empty({rows, cols}, options);
  return bytes <= kSmall ? matrix_in<SmallSpares>(bytes, rows, cols, options)
                         : matrix_in<Spare>(bytes, rows, cols, options);
}

at::Tensor small_block(int64_t bytes) {
  const size_t size = bytes;
  if (size <= kTiny || size > kSmall) return at::empty({bytes}, at::kByte);
  return matrix_in<SmallSpares>(size, 1, bytes, at::kByte);
}
#else
at::Tensor reused_matrix(int64_t rows, int64_t cols, const at::TensorOptions& options) {
  return at::empty({rows, cols}, options);
}

at::Tensor small_block(int64_t bytes) {
  return at::empty({bytes}, at::kByte);
}
#endif

namespace {

// Gives the whole pages of [begin, end) back to the system. Their contents are lost.
void release_pages(void* begin, void* end) {
#ifdef __linux__
  const uintptr_t page = page_size(), first = round_up(reinterpret_cast<uintptr_t>(begin), page);
  const uintptr_t last = reinterpret_cast<uintptr_t>(end) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#endif
}

// Matrices up to kWhole bytes are converted in one call, larger ones kPart bytes at a time.
constexpr int64_t kPart = 256 << 10, kWhole = 4 << 20;

int64_t bytes_of(const at::Tensor& t) {
  return t.numel() * t.element_size();
}

int64_t element_size(at::ScalarType dtype) {
  return static_cast<int64_t>(c10::elementSize(dtype));
}

// Whether a matrix has no other owner, and is so large that its memory should be freed or reused while it is converted.
bool is_own_and_large(const at::Tensor& t) {
  return t.use_count() == 1 && t.storage().use_count() == 1 && bytes_of(t) > kWhole;
}

// Returns a tensor in the block's memory from byte `offset` on. It is not a view, because an operator's outputs must
// own their storage.
at::Tensor within(const at::Tensor& block, int64_t offset, at::IntArrayRef sizes, at::ScalarType dtype) {
  auto* begin = static_cast<char*>(block.mutable_data_ptr()) + offset;
  return at::from_blob(begin, sizes, [block](void*) {}, block.options().dtype(dtype));
}

// Converts to a dtype of half the size, at the front of the same memory. Rows [r, 2r) are written where rows [r/2, r)
// were, which have been converted already.
at::Tensor halved_in_place(const at::Tensor& matrix, at::ScalarType dtype) {
  const int64_t rows = matrix.size(0);
  at::Tensor out = within(matrix, 0, matrix.sizes(), dtype);
  out.slice(0, 0, 1).copy_(matrix.slice(0, 0, 1).clone());
  for (int64_t r = 1; r < rows; r *= 2) {
    const int64_t end = std::min(rows, 2 * r);
    out.slice(0, r, end).copy_(matrix.slice(0, r, end));
  }
  return out;
}

}  // namespace

at::Tensor converted(at::Tensor matrix, at::ScalarType dtype) {
  if (matrix.scalar_type() == dtype || !is_own_and_large(matrix)) return matrix.to(dtype);
  const int64_t rows = matrix.size(0), row_bytes = bytes_of(matrix) / rows;
  at::Tensor out = at::empty(matrix.sizes(), matrix.options().dtype(dtype));
  const int64_t at_once = std::max<int64_t>(1, kPart / row_bytes);
  auto* bytes = static_cast<char*>(matrix.mutable_data_ptr());
  for (int64_t first = 0; first < rows; first += at_once) {
    const int64_t last = std::min(rows, first + at_once);
    out.slice(0, first, last).copy_(matrix.slice(0, first, last));
    release_pages(bytes + first * row_bytes, bytes + last * row_bytes);
  }
  return out;
}

std::pair<at::Tensor, at::Tensor> converted(at::Tensor a, at::Tensor b, at::ScalarType a_dtype,
                                            at::ScalarType b_dtype) {
  // Whether converting `t` frees half of its memory, and the converted `other` fits into that half and fills half of
  // it.
  const auto fits_beside = [](const at::Tensor& t, at::ScalarType dtype, const at::Tensor& other,
                              at::ScalarType other_dtype) {
    const int64_t left = bytes_of(t) / 2, bytes = other.numel() * element_size(other_dtype);
    return is_own_and_large(t) && dtype == other_dtype && 2 * element_size(dtype) == t.element_size() &&
           bytes <= left && bytes >= left / 2;
  };
  if (fits_beside(a, a_dtype, b, b_dtype)) {
    const at::Tensor first = halved_in_place(a, a_dtype);
    const at::Tensor second = within(a, bytes_of(first), b.sizes(), b_dtype);
    second.copy_(b);
    return {first, second};
  }
  if (fits_beside(b, b_dtype, a, a_dtype)) {
    const auto [second, first] = converted(std::move(b), std::move(a), b_dtype, a_dtype);
    return {first, second};
  }
  at::Tensor first = converted(std::move(a), a_dtype);  // gives its memory back before the second is made
  return {first, converted(std::move(b), b_dtype)};
}

}  // namespace fc
