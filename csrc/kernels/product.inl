// Matrix products of one thread, with the compiler's vector types; included after vector.inl. A micro-tile of C,
// kMicroRows by 2 vectors, stays in registers while k runs. Each step loads two vectors of a panel of B and broadcasts
// one element of A for each row.

// A sum in registers runs over kDepth steps of k and is then added to C: this part of a panel stays in L1, and short
// sums have smaller rounding errors. If C has few rows (kFlatDepth) or is narrower than a panel (kNarrowDepth), the
// product waits for memory anyway, and its sums are shorter still.
constexpr int64_t kDepth = 256, kFlatDepth = 64, kNarrowDepth = 16;

template <class E>
constexpr int64_t kPanel = 2 * kLanes<SumType<E>>;
#if FC_VECTOR_BYTES == 64
constexpr int kMicroRows = 8;  // of 32 registers 16 hold sums: no more are needed to hide a multiplication's latency
#else
constexpr int kMicroRows = 6;  // of 16 registers 12 hold sums
#endif

template <class T>
static inline void multiply_add(Vec<T>& sum, T a, Vec<T> b) {
  sum += b * a;
}
#ifdef FC_BF16
template <class E>
static inline void multiply_add(Vec<float>& sum, Bf16Pair a, Vec<float> b) {
  int bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)b);
}
#endif

template <class E, int kRows>
static void micro_tile(const MatrixProduct<E>& p, int64_t steps, const E* a, const E* b, SumType<E>* c, bool add) {
  using T = SumType<E>;
  Vec<T> sum[kRows][2] = {};
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {  // C is fetched while k runs
    __builtin_prefetch(c + i * p.c_row, 1);
    __builtin_prefetch(c + i * p.c_row + kPanel<E> - 1, 1);
  }
  for (int64_t s = 0; s < steps; ++s, a += p.a_k, b += kPanel<E>) {
    Vec<T> first, second;
    __builtin_memcpy(&first, b, sizeof first);
    __builtin_memcpy(&second, b + kLanes<T>, sizeof second);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const E element = a[i * p.a_row];
      multiply_add<E>(sum[i][0], element, first);
      multiply_add<E>(sum[i][1], element, second);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    T* row = c + i * p.c_row;
    store(row, add ? load(row) + sum[i][0] : sum[i][0]);
    store(row + kLanes<T>, add ? load(row + kLanes<T>) + sum[i][1] : sum[i][1]);
  }
}

template <class E, int kRows>
static void micro_rows(const MatrixProduct<E>& p, int64_t rows, int64_t steps, const E* a, const E* b, SumType<E>* c,
                       bool add) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return micro_tile<E, kRows>(p, steps, a, b, c, add);
    micro_rows<E, kRows - 1>(p, rows, steps, a, b, c, add);
  }
}

// Computes the columns of C that belong to one panel, for all rows.
template <class E>
static void multiply_panel(const MatrixProduct<E>& p, int64_t k, int64_t steps, int64_t column, bool add) {
  using T = SumType<E>;
  const int64_t tiles = (p.m + kMicroRows - 1) / kMicroRows;
  const E* b = p.b + column / kPanel<E> * p.b_panel + k * kPanel<E>;
  const int64_t columns = p.n - column;
  for (int64_t t = 0; t < tiles; ++t) {  // rows in equal shares, so that no short rest is left
    const int64_t row = p.m * t / tiles, rows = p.m * (t + 1) / tiles - row;
    const E* a = p.a + row * p.a_row + k * p.a_k;
    T* c = p.c + row * p.c_row + column;
    if (columns >= kPanel<E>) {
      micro_rows<E, kMicroRows>(p, rows, steps, a, b, c, add);
      continue;
    }
    alignas(64) T whole[kMicroRows * kPanel<E>];  // C's rows end before the panel does
    MatrixProduct<E> padded = p;
    padded.c_row = kPanel<E>;
    micro_rows<E, kMicroRows>(padded, rows, steps, a, b, whole, false);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const T value = whole[i * kPanel<E> + j];
        c[i * p.c_row + j] = add ? c[i * p.c_row + j] + value : value;
      }
  }
}

template <class E>
static void multiply(const MatrixProduct<E>& p) {
  const int64_t depth = p.n < kPanel<E> ? kNarrowDepth : p.m <= 2 * kMicroRows ? kFlatDepth : kDepth;
  for (int64_t k = 0; k < p.k; k += depth)
    for (int64_t column = 0; column < p.n; column += kPanel<E>)
      multiply_panel(p, k, smaller(depth, p.k - k), column, p.add || k > 0);
  if (p.k == 0 && !p.add)
    for (int64_t i = 0; i < p.m; ++i)
      for (int64_t j = 0; j < p.n; ++j) p.c[i * p.c_row + j] = 0;
}

template <class E>
static void pack(const StoredType<E>* b, int64_t b_row, int64_t rows, int64_t columns, E* panel) {
  for (int64_t s = 0; s < rows; ++s, b += b_row, panel += kPanel<E>) {
    if (columns == kPanel<E>) {
      __builtin_memcpy(panel, b, kPanel<E> * sizeof(E));
      continue;
    }
    for (int64_t j = 0; j < columns; ++j) panel[j] = b[j];
    for (int64_t j = columns; j < kPanel<E>; ++j) panel[j] = E{};
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FC_SHUFFLE
#endif
#endif

#ifdef FC_SHUFFLE
// Interleaves the lower (kHalf = 0) or upper (kHalf = 1) halves of two vectors.
template <int kHalf, class V, int... kLane>
static inline V interleave(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int n = sizeof...(kLane);
  return __builtin_shufflevector(a, b, (kHalf * n / 2 + kLane / 2 + (kLane % 2 ? n : 0))...);
}

// Transposes a square of as many rows as a vector has lanes: log2(lanes) times, rows i and i + lanes / 2 are
// interleaved.
template <class E>
static inline void transpose_square(const E* in, int64_t in_row, E* out, int64_t out_row) {
  using T = SumType<E>;
  constexpr int n = kLanes<T>;
  using Lane = std::make_integer_sequence<int, n>;
  Vec<T> rows[2][n];
  for (int i = 0; i < n; ++i) __builtin_memcpy(&rows[0][i], in + i * in_row, sizeof(Vec<T>));
  int from = 0;
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2, from = 1 - from) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      rows[1 - from][2 * i] = interleave<0>(rows[from][i], rows[from][i + n / 2], Lane());
      rows[1 - from][2 * i + 1] = interleave<1>(rows[from][i], rows[from][i + n / 2], Lane());
    }
  }
  for (int i = 0; i < n; ++i) __builtin_memcpy(out + i * out_row, &rows[from][i], sizeof(Vec<T>));
}
#else
template <class E>
static inline void transpose_square(const E* in, int64_t in_row, E* out, int64_t out_row) {
  for (int i = 0; i < kLanes<SumType<E>>; ++i)
    for (int j = 0; j < kLanes<SumType<E>>; ++j) out[j * out_row + i] = in[i * in_row + j];
}
#endif

template <class E>
static void pack_transposed(const E* b, int64_t b_row, int64_t k, int64_t columns, E* panel) {
  constexpr int n = kLanes<SumType<E>>;
  alignas(64) E part[2][n * n] = {};  // the rows of a half that is not full, and zeros
  int64_t done = 0;                   // steps of k
  for (; done + n <= k; done += n)
    for (int half = 0; half < 2; ++half) {
      const E* rows = b + half * n * b_row + done;
      E* out = panel + done * kPanel<E> + half * n;
      const int64_t count = columns - half * n;
      if (count >= n) {
        transpose_square(rows, b_row, out, kPanel<E>);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) __builtin_memcpy(part[half] + i * n, rows + i * b_row, n * sizeof(E));
      transpose_square(part[half], n, out, kPanel<E>);
    }
  for (int64_t s = done; s < k; ++s)
    for (int64_t j = 0; j < kPanel<E>; ++j) panel[s * kPanel<E> + j] = j < columns ? b[j * b_row + s] : E{};
}

#ifdef FC_BF16
// Stores sixteen pairs. The intrinsics are the masked ones, with all lanes set: for the others GCC 12 warns of an
// uninitialised vector in its own headers.
static inline void store_pairs(Bf16Pair* out, __m256i first, __m256i second) {
  constexpr __mmask16 kAll = 0xffff;
  const __m512i upper = _mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, second), 16);
  _mm512_storeu_si512(out, _mm512_or_si512(_mm512_maskz_cvtepu16_epi32(kAll, first), upper));
}

template <>
void pack<Bf16Pair>(const uint16_t* b, int64_t b_row, int64_t rows, int64_t columns, Bf16Pair* panel) {
  for (int64_t s = 0; s < rows; s += 2, b += 2 * b_row, panel += kPanel<Bf16Pair>) {
    constexpr int64_t n = 16;
    for (int64_t j = 0; j < kPanel<Bf16Pair>; j += n) {
      const auto lanes = __mmask16((1u << (columns > j ? smaller(columns - j, n) : 0)) - 1);
      const __mmask16 second_lanes = s + 1 < rows ? lanes : __mmask16(0);
      const __m256i first = _mm256_maskz_loadu_epi16(lanes, b + j);
      store_pairs(panel + j, first, _mm256_maskz_loadu_epi16(second_lanes, b + b_row + j));
    }
  }
}

// Takes 32 rows by 16 columns at a time: paired down the columns, they are a square of 16 x 16 pairs.
static void round_pairs(const float* g, int64_t g_row, int64_t rows, int64_t cols, Bf16Pair* pairs, int64_t pairs_row,
                        Bf16Pair* transposed, int64_t transposed_row) {
  constexpr int64_t n = 16;
  alignas(64) Bf16Pair square[n * n];
  for (int64_t r = 0; r < rows; r += 2 * n)
    for (int64_t c = 0; c < cols; c += n) {
      const int64_t width = smaller(n, cols - c);
      const __mmask16 lanes = __mmask16((1u << width) - 1);
      const __mmask8 pair_lanes = __mmask8((1u << (width + 1) / 2) - 1);
      for (int64_t i = 0; i < n; ++i) {
        __m256i half[2] = {};
        for (int64_t k = 0; k < 2 && r + 2 * i + k < rows; ++k) {
          const int64_t row = r + 2 * i + k;
          half[k] = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, g + row * g_row + c));
          _mm256_mask_storeu_epi32(pairs + row * pairs_row + c / 2, pair_lanes, half[k]);
        }
        store_pairs(square + i * n, half[0], half[1]);
      }
      transpose_square(square, n, transposed + c * transposed_row + r / 2, transposed_row);
    }
}
#endif

template <class E>
static ProductKernels<E> product_kernel_table() {
#ifdef FC_BF16
  return {kPanel<E>, multiply<E>, pack<E>, pack_transposed<E>, round_pairs};
#else
  return {kPanel<E>, multiply<E>, pack<E>, pack_transposed<E>, nullptr};
#endif
}
