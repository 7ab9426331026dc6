// The contract between the drivers in stats/ and the matrix products of product.inl: what one thread multiplies at a
// time. The vendor's GEMM would pack both operands again for every tile; here the right-hand matrix is packed once for
// all tiles that share it, and a tile is multiplied and swept before it leaves the cache.
#pragma once
#include <cstdint>
#include <type_traits>

namespace fc {

// Two bfloat16 numbers, adjacent in k. One instruction multiplies two pairs and adds both products in float32.
struct Bf16Pair {
  uint16_t first, second;
};

// An element E of a product is a float, a double or a Bf16Pair.
template <class E>
constexpr bool kIsPair = std::is_same_v<E, Bf16Pair>;
// The dtype that products of E are summed in.
template <class E>
using SumType = std::conditional_t<kIsPair<E>, float, E>;
// What a matrix of E is stored as.
template <class E>
using StoredType = std::conditional_t<kIsPair<E>, uint16_t, E>;
// How many stored numbers, along k, make one E.
template <class E>
constexpr int64_t kStoredPer = kIsPair<E> ? 2 : 1;

// C = A B, or C += A B. k counts elements E.
template <class E>
struct MatrixProduct {
  using T = SumType<E>;
  int64_t m, n, k;
  const E* a;  // (m, k), with any strides; for Bf16Pair a_k is 1
  int64_t a_row, a_k;
  const E* b;       // (k, n) in panels of ProductKernels::panel columns: each is (k, panel), the last one padded
  int64_t b_panel;  // elements between one panel and the next
  T* c;             // (m, n), rows of unit stride
  int64_t c_row;
  bool add;
};

// The products of one instruction set. `multiply` is null for an E that it cannot multiply.
template <class E>
struct ProductKernels {
  using T = SumType<E>;
  int64_t panel;  // columns of a panel
  void (*multiply)(const MatrixProduct<E>&);
  // Fills one panel with `columns` columns of b (rows, n). Its other columns, and the second half of a last pair that
  // `rows` leaves incomplete, are 0.
  void (*pack)(const StoredType<E>* b, int64_t b_row, int64_t rows, int64_t columns, E* panel);
  // Fills one panel with `columns` rows of b (n, k), which become columns.
  void (*pack_transposed)(const E* b, int64_t b_row, int64_t k, int64_t columns, E* panel);
  // For Bf16Pair alone: rounds g (rows, cols) to pairs along its rows, (rows, cols / 2), and along the rows of its
  // transpose, (cols, rows / 2). A pair that has only one number is completed with 0. `transposed` is also filled with
  // 0 to the end of its last block of 16 rows by 16 pairs.
  void (*round_pairs)(const T* g, int64_t g_row, int64_t rows, int64_t cols, E* pairs, int64_t pairs_row, E* transposed,
                      int64_t transposed_row);
};

// The products of the instruction set that tile_kernels<T>() chooses.
template <class E>
const ProductKernels<E>& product_kernels();

}  // namespace fc
