// Matrix products of bfloat16 pairs by AMX; included after product.inl, which multiplies the rows and steps that fill
// no whole register. An AMX register holds 16 rows of 64 bytes: 16 x 16 sums, or 16 rows of A over 16 steps of k, or 16
// steps of k of 16 columns of B as they lie in a panel. Four hold sums, two hold A and two hold B: all eight are used.

constexpr int64_t kAmxTile = 16;

// The compiler does not see which memory the AMX intrinsics read, and could move writes to it behind them.
static inline void amx_barrier() {
  __asm__ volatile("" ::: "memory");
}

static inline void amx_configure() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } all;
  for (int tile = 0; tile < 8; ++tile) all.row_bytes[tile] = 64, all.rows[tile] = kAmxTile;
  amx_barrier();
  _tile_loadconfig(&all);
}

// Sets c (16 * kTiles, 2 * 16) to a times b over `steps` steps, a multiple of 16.
template <int kTiles>
static inline void amx_block(const Bf16Pair* a, int64_t a_row, const Bf16Pair* b, int64_t steps, float* c,
                             int64_t c_row) {
  constexpr int64_t kBytes = sizeof(Bf16Pair), kWidth = kPanel<Bf16Pair>;
  static_assert(kWidth == 2 * kAmxTile && sizeof(float) == kBytes);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s += kAmxTile, a += kAmxTile, b += kAmxTile * kWidth) {
    _tile_loadd(6, b, kWidth * kBytes);
    _tile_loadd(4, a, a_row * kBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kAmxTile, kWidth * kBytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTiles == 2) {
      _tile_loadd(5, a + kAmxTile * a_row, a_row * kBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row * kBytes);
  _tile_stored(1, c + kAmxTile, c_row * kBytes);
  if constexpr (kTiles == 2) {
    _tile_stored(2, c + kAmxTile * c_row, c_row * kBytes);
    _tile_stored(3, c + kAmxTile * c_row + kAmxTile, c_row * kBytes);
  }
}

// Multiplies the first `rows` rows over the first `steps` steps, both multiples of 16, in parts of kDepth steps as
// `multiply` does.
static void amx_whole(const MatrixProduct<Bf16Pair>& p, int64_t rows, int64_t steps) {
  constexpr int64_t kWidth = kPanel<Bf16Pair>;
  alignas(64) float block[2 * kAmxTile * kWidth];
  for (int64_t k = 0; k < steps; k += kDepth) {
    const int64_t part = smaller(kDepth, steps - k);
    const bool add = p.add || k > 0;
    for (int64_t row = 0; row < rows; row += 2 * kAmxTile) {
      const int64_t height = smaller(2 * kAmxTile, rows - row);
      const Bf16Pair* a = p.a + row * p.a_row + k;
      for (int64_t column = 0; column < p.n; column += kWidth) {
        const Bf16Pair* b = p.b + column / kWidth * p.b_panel + k * kWidth;
        float* c = p.c + row * p.c_row + column;
        const int64_t columns = smaller(kWidth, p.n - column);
        const bool direct = !add && columns == kWidth;
        float* out = direct ? c : block;
        const int64_t out_row = direct ? p.c_row : kWidth;
        if (height == 2 * kAmxTile)
          amx_block<2>(a, p.a_row, b, part, out, out_row);
        else
          amx_block<1>(a, p.a_row, b, part, out, out_row);
        if (direct) continue;
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < columns; ++j) {
            const float value = block[i * kWidth + j];
            c[i * p.c_row + j] = add ? c[i * p.c_row + j] + value : value;
          }
      }
    }
  }
}

static void multiply_amx(const MatrixProduct<Bf16Pair>& p) {
  const int64_t rows = p.m / kAmxTile * kAmxTile, steps = p.k / kAmxTile * kAmxTile;
  if (!rows || !steps || p.n < kPanel<Bf16Pair>) return multiply<Bf16Pair>(p);
  amx_configure();
  amx_whole(p, rows, steps);
  _tile_release();
  if (steps < p.k) {
    MatrixProduct<Bf16Pair> rest = p;
    rest.m = rows, rest.k = p.k - steps, rest.a += steps, rest.b += steps * kPanel<Bf16Pair>, rest.add = true;
    multiply<Bf16Pair>(rest);
  }
  if (rows < p.m) {
    MatrixProduct<Bf16Pair> rest = p;
    rest.m = p.m - rows, rest.a += rows * p.a_row, rest.c += rows * p.c_row;
    multiply<Bf16Pair>(rest);
  }
}

static ProductKernels<Bf16Pair> amx_kernel_table() {
  ProductKernels<Bf16Pair> table = product_kernel_table<Bf16Pair>();
  table.multiply = multiply_amx;
  return table;
}
