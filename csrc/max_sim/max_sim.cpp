// Late interaction. The vendor GEMM makes the products of a block of y's tokens with a block of x's, small enough for
// the cache; the kernels of max_sim.inl take the maxima of both directions from it, in parallel.
//
// Tokens are packed: only the real ones, item after item. A block holds whole items, or a part of one that is longer
// than a block; the maxima then go on from part to part. y's tokens are the rows of a block, so that the maxima over
// them, which are all that most calls want, run down its columns without comparing lanes.
#include "max_sim/max_sim.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/max_sim_kernels.h"
#include "common/integers.h"

namespace fc {
namespace {

constexpr int64_t kBlockTokens = 1024;            // of either side: 4 MB of fp32 products
constexpr int64_t kTaskTokens = 256;              // columns, or rows, that one task takes the maxima of
constexpr int64_t kArgmaxBytes = 8 << 20;         // that the backward makes again at a time
constexpr int64_t kWork = int64_t{1} << 31;       // multiplications of the backward between two interrupts
constexpr int64_t kGradientElements = 64 * 1024;  // that one task adds to: they stay in its cache

// The real tokens of all items in the compute dtype, one after the other.
struct Side {
  at::Tensor tokens;           // (real, D)
  std::vector<int64_t> start;  // (items + 1,) where each item's begin
  int64_t items, length;       // length: T or P, real or not
  at::Tensor places;           // (real,) where each token stands among all; undefined if all are real

  Side(const char* name, const at::Tensor& x, const OptionalTensor& lengths, at::ScalarType dtype)
      : items(x.size(0)), length(x.size(1)) {
    const at::Tensor all = readable(name, x, x.scalar_type()).view({items * length, x.size(2)});
    start.push_back(0);
    if (lengths) {
      check_sizes("lengths", *lengths, {items});
      const at::Tensor count = indices("lengths", *lengths, length + 1);
      places = at::arange(length).lt(count.unsqueeze(1)).flatten().nonzero().squeeze(1);
      tokens = all.index_select(0, places).to(dtype);
      for (int64_t i = 0; i < items; ++i) start.push_back(start[i] + count.const_data_ptr<int64_t>()[i]);
    } else {
      tokens = all.to(dtype).contiguous();
      for (int64_t i = 0; i < items; ++i) start.push_back(start[i] + length);
    }
  }
  int64_t count(int64_t item) const { return start[item + 1] - start[item]; }
  int64_t dim() const { return tokens.size(1); }

  // A gradient of the packed tokens as one of x, in its dtype.
  at::Tensor unpack(const at::Tensor& gradient, const at::Tensor& x) const {
    const at::Tensor cast = gradient.to(x.scalar_type());
    if (!places.defined()) return cast.view(x.sizes());
    return at::zeros({items * length, dim()}, cast.options()).index_copy_(0, places, cast).view(x.sizes());
  }
};

// Tokens [begin, end) of items [item0, item1): all of them, or a part of one.
struct Piece {
  int64_t item0, item1, begin, end;
  int64_t tokens() const { return end - begin; }
};

// A piece's part of one item.
struct Part {
  int64_t begin, end;  // packed tokens
  int64_t offset;      // of `begin` in the item
  bool last;           // the item ends here
  Part(const Side& side, const Piece& piece, int64_t item)
      : begin(std::max(piece.begin, side.start[item])),
        end(std::min(piece.end, side.start[item + 1])),
        offset(begin - side.start[item]),
        last(end == side.start[item + 1]) {}
  int64_t tokens() const { return end - begin; }
};

// Cuts items [first, last) into pieces of at most `limit` tokens. Items without tokens may be left out.
std::vector<Piece> pieces(const Side& side, int64_t first, int64_t last, int64_t limit) {
  std::vector<Piece> all;
  for (int64_t i = first; i < last;) {
    int64_t next = i + 1;
    const int64_t begin = side.start[i], count = side.count(i);
    if (count > limit) {
      const int64_t parts = ceil_div(count, limit);
      for (int64_t p = 0; p < parts; ++p)
        all.push_back({i, next, begin + count * p / parts, begin + count * (p + 1) / parts});
    } else {
      while (next < last && side.start[next + 1] - begin <= limit) ++next;
      if (side.start[next] > begin) all.push_back({i, next, begin, side.start[next]});
    }
    i = next;
  }
  return all;
}

int64_t longest(const std::vector<Piece>& all) {
  int64_t most = 0;
  for (const Piece& p : all) most = std::max(most, p.tokens());
  return most;
}

// Argmaxima (rows, N, tokens) in their narrow dtype, for items from `row0` of x on.
struct Argmax {
  at::Tensor tensor;
  int64_t row0 = 0;

  bool holds(int64_t m) const { return tensor.numel() && m >= row0 && m < row0 + tensor.size(0); }
  void put(int64_t m, int64_t n, int64_t offset, const int32_t* index, int64_t count) const {
    visit(m, n, offset, [&](auto* at) { std::copy(index, index + count, at); });
  }
  void get(int64_t m, int64_t n, int32_t* index, int64_t count) const {
    visit(m, n, 0, [&](auto* at) { std::copy(at, at + count, index); });
  }
  // The same for argmaxima that the forward kept. Raises IndexError where one is negative or not below `others`, the
  // other item's present number of tokens.
  void get(int64_t m, int64_t n, int32_t* index, int64_t count, int64_t others) const {
    get(m, n, index, count);
    int32_t bad = 0;
    for (int64_t i = 0; i < count; ++i) bad |= (index[i] < 0) | (index[i] >= others);
    TORCH_CHECK_INDEX(!bad, "max_sim: an argmax of the forward names a token that the backward's masks leave out, ",
                      "expected the same masks for both: was a mask's memory written to?");
  }

 private:
  template <class F>
  void visit(int64_t m, int64_t n, int64_t offset, const F& f) const {
    const int64_t at = ((m - row0) * tensor.size(1) + n) * tensor.size(2) + offset;
    void* data = tensor.data_ptr();
    switch (tensor.element_size()) {
      case 1:
        return f(static_cast<uint8_t*>(data) + at);
      case 2:
        return f(static_cast<int16_t*>(data) + at);
      default:
        return f(static_cast<int32_t*>(data) + at);
    }
  }
};

at::ScalarType index_dtype(int64_t size) {  // as core/tokens.py has it
  return size <= 256 ? at::kByte : size <= 32768 ? at::kShort : at::kInt;
}

// Room for the argmaxima of `rows` items of x from `row0` on, in the direction that `own` is of.
at::Tensor argmax_room(int64_t rows, int64_t n, const Side& own, const Side& other) {
  return at::empty({rows, n, own.length}, index_dtype(other.length));
}

// Where the maxima of one direction go.
template <class T>
struct Output {
  T* sums;  // (M, N), or null
  int64_t n;
  Argmax argmax;

  void clear(int64_t first, int64_t last) const {
    if (sums) std::fill(sums + first * n, sums + last * n, T(0));
  }
  void add(int64_t m, int64_t item, int64_t offset, const T* best, const int32_t* index, int64_t count) const {
    if (sums) sums[m * n + item] += static_cast<T>(std::accumulate(best, best + count, 0.));
    if (argmax.holds(m)) argmax.put(m, item, offset, index, count);
  }
};

// Maxima of one direction.
template <class T>
struct Maxima {
  std::vector<T> best;
  std::vector<int32_t> index;

  void make_room(int64_t size) {
    if (static_cast<int64_t>(best.size()) < size) best.resize(size), index.resize(size);
  }
};

// Takes the maxima of items [first, last) of x with all of y; out_y is null where that direction is not asked.
template <class T>
void sweep(const Side& x, const Side& y, int64_t first, int64_t last, const Output<T>* out_x, const Output<T>* out_y,
           const Interrupt& interrupt) {
  const MaxSimKernels<T>& kernel = max_sim_kernels<T>();
  const auto x_pieces = pieces(x, first, last, kBlockTokens), y_pieces = pieces(y, 0, y.items, kBlockTokens);
  const at::Tensor scratch = at::empty({longest(x_pieces) * longest(y_pieces)}, x.tokens.options());
  Maxima<T> of_x, of_y;
  int64_t cleared = first;  // rows of sums, as the sweep comes to them: the first touch of (M, N) takes long
  const auto clear_until = [&](int64_t row) {
    for (const Output<T>* out : {out_x, out_y})
      if (out) out->clear(cleared, row);
    cleared = row;
  };
  for (const Piece& xp : x_pieces) {
    clear_until(xp.item1);
    for (const Piece& yp : y_pieces) {
      const int64_t rows = yp.tokens(), cols = xp.tokens(), x_items = xp.item1 - xp.item0;
      const int64_t y_items = yp.item1 - yp.item0;
      at::Tensor s = scratch.slice(0, 0, rows * cols).view({rows, cols});
      at::mm_out(s, y.tokens.slice(0, yp.begin, yp.end), x.tokens.slice(0, xp.begin, xp.end).t());
      const T* products = s.const_data_ptr<T>();

      // of_x: (y_items, cols). of_y: (x_items, rows), but for a part of an item all of y's tokens, since the next part
      // meets them again.
      const bool x_in_parts = xp.tokens() < x.start[xp.item1] - x.start[xp.item0];
      const int64_t y_base = x_in_parts ? yp.begin : 0;
      if (out_x) of_x.make_room(y_items * cols);
      if (out_y) of_y.make_room(x_in_parts ? y.tokens.size(0) : x_items * rows);
      const int64_t col_tasks = ceil_div(cols, kTaskTokens), row_tasks = ceil_div(rows, kTaskTokens);
      const int64_t x_tasks = out_x ? y_items * col_tasks : 0, y_tasks = out_y ? x_items * row_tasks : 0;
      at::parallel_for(0, x_tasks + y_tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          if (task < x_tasks) {
            const int64_t n = task / col_tasks, col = task % col_tasks * kTaskTokens;
            const Part part(y, yp, yp.item0 + n);
            if (part.tokens())
              kernel.down(products + (part.begin - yp.begin) * cols + col, cols, part.tokens(),
                          std::min(kTaskTokens, cols - col), part.offset, of_x.best.data() + n * cols + col,
                          of_x.index.data() + n * cols + col);
          } else {
            const int64_t m = (task - x_tasks) / row_tasks, row = (task - x_tasks) % row_tasks * kTaskTokens;
            const Part part(x, xp, xp.item0 + m);
            if (part.tokens())
              kernel.across(products + row * cols + part.begin - xp.begin, cols, std::min(kTaskTokens, rows - row),
                            part.tokens(), part.offset, of_y.best.data() + y_base + m * rows + row,
                            of_y.index.data() + y_base + m * rows + row);
          }
        }
      });
      at::parallel_for(0, x_items * y_items, 16, [&](int64_t begin, int64_t end) {
        for (int64_t pair = begin; pair < end; ++pair) {
          const int64_t m = pair / y_items, n = pair % y_items;
          const Part xt(x, xp, xp.item0 + m), yt(y, yp, yp.item0 + n);
          if (!xt.tokens() || !yt.tokens()) continue;
          const int64_t col = n * cols + xt.begin - xp.begin, row = y_base + m * rows + yt.begin - yp.begin;
          if (out_x && yt.last)
            out_x->add(xp.item0 + m, yp.item0 + n, xt.offset, of_x.best.data() + col, of_x.index.data() + col,
                       xt.tokens());
          if (out_y && xt.last)
            out_y->add(xp.item0 + m, yp.item0 + n, yt.offset, of_y.best.data() + row, of_y.index.data() + row,
                       yt.tokens());
        }
      });
      interrupt();
    }
  }
  clear_until(last);
}

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const TokenProblem& p, int64_t kept_rows,
                                                                   const Interrupt& interrupt) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const Side x("x", p.x, p.x_lengths, dtype), y("y", p.y, p.y_lengths, dtype);
  const int64_t m = x.items, n = y.items;
  const at::Tensor x_sums = at::empty({m, n}, dtype), y_sums = at::empty({p.both ? m : 0, p.both ? n : 0}, dtype);
  const Output<T> out_x{x_sums.mutable_data_ptr<T>(), n, {argmax_room(kept_rows, n, x, y)}};
  const Output<T> out_y{y_sums.mutable_data_ptr<T>(),
                        n,
                        {p.both ? argmax_room(kept_rows, n, y, x) : at::empty({0, 0, 0}, index_dtype(x.length))}};
  sweep<T>(x, y, 0, m, &out_x, p.both ? &out_y : nullptr, interrupt);
  return {x_sums, y_sums, out_x.argmax.tensor, out_y.argmax.tensor};
}

// One direction of the backward: its gradient (M, N) and its argmaxima of some rows.
template <class T>
struct Direction {
  at::Tensor grad;
  Argmax argmax;

  // `kept`: the argmaxima of the first rows, for tokens of `own` with those of `other`.
  Direction(const char* name, const OptionalTensor& g, const at::Tensor& kept, int64_t m, int64_t n, const Side& own,
            const Side& other) {
    if (!g) return;
    check_sizes(name, *g, {m, n});
    grad = readable(name, *g, c10::CppTypeToScalarType<T>::value);
    TORCH_CHECK_VALUE(kept.dim() == 3 && kept.size(0) <= m, "argmaxima: got shape ", kept.sizes());
    if (kept.size(0) == 0) return;
    check_sizes("argmaxima", kept, {kept.size(0), n, own.length});
    check_dtype("argmaxima", kept, index_dtype(other.length));
    argmax = {readable("argmaxima", kept, kept.scalar_type())};
  }
  bool asked() const { return grad.defined(); }
  T g(int64_t m, int64_t n) const { return grad.const_data_ptr<T>()[m * grad.size(1) + n]; }
};

// Adds one pair's part to a gradient `out` of the tokens of `own`, given those of the `other` side. `by_own` is the
// direction whose argmaxima belong to own tokens and name other ones, `by_other` that in which it is the reverse.
template <class T>
void add_pair(int64_t m, int64_t n, T* out, int64_t own, const T* in, int64_t other, int64_t d,
              const Direction<T>& by_own, const Direction<T>& by_other, int32_t* index) {
  if (!own || !other) return;
  if (by_own.asked()) {
    by_own.argmax.get(m, n, index, own, other);
    max_sim_kernels<T>().gather(out, in, index, own, d, by_own.g(m, n));
  }
  if (by_other.asked()) {
    by_other.argmax.get(m, n, index, other, own);
    max_sim_kernels<T>().scatter(out, in, index, other, d, by_other.g(m, n));
  }
}

// Items [0, items) in groups, in parallel: as many at a time as have `kGradientElements`, fewer where threads lack
// work.
template <class F>
void for_each_group(int64_t items, int64_t elements, const F& f) {
  const int64_t for_cache = std::max<int64_t>(1, kGradientElements / elements);
  const int64_t size = std::clamp<int64_t>(ceil_div(items, 2 * at::get_num_threads()), 1, for_cache);
  at::parallel_for(0, ceil_div(items, size), 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) f(group * size, std::min(items, (group + 1) * size));
  });
}

// Adds the part of items [first, last) of x: to dx in parallel over x's items, to dy over y's, so that every sum has
// one owner and one order.
template <class T>
void accumulate(const Side& x, const Side& y, int64_t first, int64_t last, const Direction<T>& of_x,
                const Direction<T>& of_y, T* dx, T* dy) {
  const int64_t d = x.dim();
  const T *xs = x.tokens.const_data_ptr<T>(), *ys = y.tokens.const_data_ptr<T>();
  if (dx)
    for_each_group(last - first, x.length * d, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> index(std::max(x.length, y.length));
      for (int64_t n = 0; n < y.items; ++n)
        for (int64_t m = first + begin; m < first + end; ++m)
          add_pair(m, n, dx + x.start[m] * d, x.count(m), ys + y.start[n] * d, y.count(n), d, of_x, of_y, index.data());
    });
  if (dy)
    for_each_group(y.items, y.length * d, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> index(std::max(x.length, y.length));
      for (int64_t m = first; m < last; ++m)
        for (int64_t n = begin; n < end; ++n)
          add_pair(m, n, dy + y.start[n] * d, y.count(n), xs + x.start[m] * d, x.count(m), d, of_y, of_x, index.data());
    });
}

template <class T>
std::array<at::Tensor, 2> backward(const TokenProblem& p, const at::Tensor& argmax_x, const at::Tensor& argmax_y,
                                   const OptionalTensor& g_x, const OptionalTensor& g_y, std::array<bool, 2> needs,
                                   const Interrupt& interrupt) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const Side x("x", p.x, p.x_lengths, dtype), y("y", p.y, p.y_lengths, dtype);
  const int64_t m = x.items, n = y.items, longest = std::max(x.length, y.length);
  const at::Tensor dx = needs[0] ? at::zeros_like(x.tokens) : at::Tensor();
  const at::Tensor dy = needs[1] ? at::zeros_like(y.tokens) : at::Tensor();
  Direction<T> of_x("g_x", g_x, argmax_x, m, n, x, y), of_y("g_y", g_y, argmax_y, m, n, y, x);
  const int64_t kept_x = of_x.asked() ? argmax_x.size(0) : m, kept_y = of_y.asked() ? argmax_y.size(0) : m;
  const int64_t kept = std::min(kept_x, kept_y);

  const int64_t by_work = std::max<int64_t>(16, kWork / std::max<int64_t>(1, n * longest * x.dim()));
  const int64_t by_room =
      std::max(ceil_div(kBlockTokens, x.length), kArgmaxBytes / std::max<int64_t>(1, n * longest * 4));
  for (int64_t first = 0, last; first < m; first = last) {
    last = first < kept ? std::min(kept, first + by_work) : std::min(m, first + std::min(by_work, by_room));
    if (first >= kept) {
      if (of_x.asked()) of_x.argmax = {argmax_room(last - first, n, x, y), first};
      if (of_y.asked()) of_y.argmax = {argmax_room(last - first, n, y, x), first};
      const Output<T> out_x{nullptr, n, of_x.argmax}, out_y{nullptr, n, of_y.argmax};
      sweep<T>(x, y, first, last, of_x.asked() ? &out_x : nullptr, of_y.asked() ? &out_y : nullptr, interrupt);
    }
    accumulate<T>(x, y, first, last, of_x, of_y, needs[0] ? dx.mutable_data_ptr<T>() : nullptr,
                  needs[1] ? dy.mutable_data_ptr<T>() : nullptr);
    interrupt();
  }
  std::array<at::Tensor, 2> grads;
  if (needs[0]) grads[0] = x.unpack(dx, p.x);
  if (needs[1]) grads[1] = y.unpack(dy, p.y);
  return grads;
}

void check(const TokenProblem& p) {
  for (const auto& [name, t] : {std::pair("x", &p.x), std::pair("y", &p.y)}) {
    TORCH_CHECK_VALUE(t->dim() == 3 && t->size(2) == p.x.size(2) && t->size(1) && t->size(2), name, ": got shape ",
                      t->sizes(), ", expected (items, tokens, D) with at least one token, the same D >= 1 for both");
    TORCH_CHECK_TYPE(at::isFloatingType(t->scalar_type()), name, ": got dtype ", t->scalar_type());
  }
  check_dtype("y", p.y, p.x.scalar_type());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> max_sim_forward(const TokenProblem& problem,
                                                                           int64_t kept_rows,
                                                                           const Interrupt& interrupt) {
  check(problem);
  TORCH_CHECK_VALUE(kept_rows >= 0 && kept_rows <= problem.x.size(0), "kept_rows: got ", kept_rows);
  return problem.x.scalar_type() == at::kDouble ? forward<double>(problem, kept_rows, interrupt)
                                                : forward<float>(problem, kept_rows, interrupt);
}

std::array<at::Tensor, 2> max_sim_backward(const TokenProblem& problem, const at::Tensor& argmax_x,
                                           const at::Tensor& argmax_y, const OptionalTensor& g_x,
                                           const OptionalTensor& g_y, std::array<bool, 2> needs,
                                           const Interrupt& interrupt) {
  check(problem);
  return problem.x.scalar_type() == at::kDouble
             ? backward<double>(problem, argmax_x, argmax_y, g_x, g_y, needs, interrupt)
             : backward<float>(problem, argmax_x, argmax_y, g_x, g_y, needs, interrupt);
}

}  // namespace fc
