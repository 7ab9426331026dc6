// The contract between the ATen drivers and the matrix products of product.inl: what one thread multiplies at a time.
//
// Why not the vendor's GEMM: asked for a tile that stays in a core's cache, it packs both operands again for every
// tile. Here the right-hand matrix is packed once for all tiles that share it and the left one is read where it lies,
// so that a tile is multiplied and swept before it leaves the cache.
#pragma once
#include <cstdint>

namespace fc {

// Two bfloat16 that follow each other in k: the instruction that multiplies them adds both products, in float32.
struct Bf16Pair {
  uint16_t first, second;
};

// The dtype that products of E are summed in.
template <class E>
struct Accumulator {
  using Type = E;
};
template <>
struct Accumulator<Bf16Pair> {
  using Type = float;
};

// What a matrix of E is stored as, and how many stored rows make one of E where k runs down them.
template <class E>
struct Stored {
  using Type = E;
  static constexpr int64_t rows = 1;
};
template <>
struct Stored<Bf16Pair> {
  using Type = uint16_t;
  static constexpr int64_t rows = 2;
};

// C = A B, or C += A B. k counts elements E: for Bf16Pair, two steps each.
template <class E>
struct Product {
  using T = typename Accumulator<E>::Type;
  int64_t m, n, k;
  const E* a;  // (m, k), with any strides; of Bf16Pair a_k is 1
  int64_t a_row, a_k;
  const E* b;       // (k, n) in panels of Products::panel columns: panel j is (k, panel), its last columns padded
  int64_t b_panel;  // elements between one panel and the next
  T* c;             // (m, n), rows of unit stride
  int64_t c_row;
  bool add;
};

// The products of one instruction set; for an E that it cannot multiply, `multiply` is null.
template <class E>
struct Products {
  using T = typename Accumulator<E>::Type;
  int64_t panel;  // columns of a panel
  void (*multiply)(const Product<E>&);
  // Fills one panel with `columns` columns of b (rows, n), and with 0 what is left of its width and of its last E.
  void (*pack)(const typename Stored<E>::Type* b, int64_t b_row, int64_t rows, int64_t columns, E* panel);
  // Fills one panel with `columns` rows of b (n, k), which become columns.
  void (*pack_transposed)(const E* b, int64_t b_row, int64_t k, int64_t columns, E* panel);
  // For Bf16Pair: rounds g (rows, cols) to pairs that follow each other along a row, (rows, cols / 2), and to pairs
  // that do down a column, of g's transpose: (cols, rows / 2). What the two products of the backward read. 0 where a
  // pair has only one; of the second also where a block of 16 columns by 16 pairs ends behind g.
  void (*round_pairs)(const T* g, int64_t g_row, int64_t rows, int64_t cols, E* along, int64_t along_row, E* down,
                      int64_t down_row);
};

// The products at the level that kernels<T>() has (tile.h).
template <class E>
const Products<E>& products();

}  // namespace fc
