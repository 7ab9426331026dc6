// Measures the error of each function of csrc/kernels/math.inl in ULP, the distance of two neighbouring numbers of its
// dtype at the exact value; exits with 1 if one is larger than stated. float32 is compared with the same function in
// float64. float64 is compared with long double, at random numbers.
//
//     vector_math EVERY    measures every EVERY-th block of 256 neighbouring floats; 1: all
//
// For |x| < 2^-20 three terms of a function's Taylor series are exact enough to compare with. Three quarters of all
// floats lie there; every 16th of their blocks is measured.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "kernels/vector.inl"
#include "kernels/math.inl"

namespace {

constexpr int64_t kBlock = 256;
constexpr double kTiny = 0x1p-20;

// A function of x, or if it `shifts`, 2^shift times a function of x - low. In [least, most] its values are normal or 0.
struct Function {
  const char* name;
  double least, least_double, most;
  double taylor[3];  // its value near 0 is taylor[0] + taylor[1] x + taylor[2] x^2
  double stated_float, stated_double;
  long double (*exact)(long double x);
  bool shifts = false;
};

struct Worst {
  double error = 0, x = 0;
  void take(double other_error, double other_x) {
    if (!(other_error <= error)) error = other_error, x = other_x;  // a NaN is the worst
  }
};

template <class To, class From>
To bits_of(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The shift that brings exp(x) near 1.
int shift_of(double x) {
  return -static_cast<int>(x * 1.4426950408889634);
}

template <class T, class F>
void evaluate(const F& f, const T* x, const T* low, int shift, T* out) {
  for (int64_t j = 0; j < kBlock; j += kLanes<T>)
    store(out + j, f.template operator()<T>(load(x + j), load(low + j), shift));
}

// |got - exact| in ULP of float.
Vec<double> float_ulp(Vec<double> got, Vec<double> exact) {
  using Bits = Lanes<double>::BitVec;
  const Bits exponent = (Bits)exact & (uint64_t{2047} << 52), inverse = (uint64_t{2046} << 52) - exponent;
  const Vec<double> error = (got - exact) * (Vec<double>)inverse * 0x1p23;
  return error < 0. ? -error : error;
}

// Measures the floats with bits [first, first + kBlock), with those beyond `last` replaced by it.
template <class F>
void measure(const Function& c, const F& f, uint32_t first, uint32_t last, bool tiny, Worst& worst) {
  alignas(64) uint32_t bits[kBlock];
  alignas(64) float x[kBlock], low[kBlock] = {}, got[kBlock];
  alignas(64) double wide_x[kBlock], wide_low[kBlock] = {}, wide_got[kBlock], exact[kBlock], error[kBlock];
  for (int64_t j = 0; j < kBlock; ++j) bits[j] = std::min(first + static_cast<uint32_t>(j), last);
  std::memcpy(x, bits, sizeof x);
  for (int64_t j = 0; c.shifts && j < kBlock; ++j) {  // low is the rounding error of x: up to half an ULP
    low[j] = x[j] * static_cast<float>(static_cast<int32_t>(bits[j] * 2654435761u)) * 0x1p-56f;
    wide_low[j] = low[j];
  }
  const int shift = c.shifts ? shift_of(x[0]) : 0;
  evaluate(f, x, low, shift, got);
  for (int64_t j = 0; j < kBlock; ++j) wide_x[j] = x[j], wide_got[j] = got[j];
  if (tiny)
    for (int64_t j = 0; j < kBlock; ++j) {
      const double z = wide_x[j] - wide_low[j];
      exact[j] = (c.taylor[2] * z + c.taylor[1]) * z + c.taylor[0];
    }
  else
    evaluate(f, wide_x, wide_low, shift, exact);
  Vec<double> most{};
  for (int64_t j = 0; j < kBlock; j += kLanes<double>) {
    const Vec<double> e = float_ulp(load(wide_got + j), load(exact + j));
    store(error + j, e);
    most = e <= most ? most : e;
  }
  bool worse = false;
  for (int l = 0; l < kLanes<double>; ++l) worse |= !(most[l] <= worst.error);
  for (int64_t j = 0; worse && j < kBlock; ++j) worst.take(error[j], wide_x[j]);
}

// Measures the floats from 0, or from the least of a positive range, to `bound`, on all cores.
template <class F>
void measure_side(const Function& c, const F& f, float bound, uint64_t every, std::vector<Worst>& worst) {
  const auto zero = static_cast<float>(std::max(c.least, 0.));
  const uint32_t first = bits_of<uint32_t>(std::copysign(zero, bound)), last = bits_of<uint32_t>(bound);
  const uint32_t tiny = bits_of<uint32_t>(std::copysign(static_cast<float>(kTiny), bound));
  constexpr uint64_t kTask = 4096 * kBlock;
  std::atomic<uint64_t> next(first);
  std::vector<std::thread> threads;
  for (Worst& own : worst)
    threads.emplace_back([&] {
      for (uint64_t task = next.fetch_add(kTask); task <= last; task = next.fetch_add(kTask))
        for (uint64_t at = task, step; at < task + kTask && at <= last; at += step * kBlock) {
          const bool is_tiny = at + kBlock <= tiny;
          step = is_tiny ? 16 * every : every;
          measure(c, f, static_cast<uint32_t>(at), last, is_tiny, own);
        }
    });
  for (std::thread& t : threads) t.join();
}

template <class F>
Worst worst_float(const Function& c, const F& f, uint64_t every) {
  std::vector<Worst> worst(std::max(1u, std::thread::hardware_concurrency()));
  if (c.least < 0) measure_side(c, f, static_cast<float>(c.least), every, worst);
  if (c.most > 0) measure_side(c, f, static_cast<float>(c.most), every, worst);
  for (const Worst& w : worst) worst[0].take(w.error, w.x);
  return worst[0];
}

template <class F>
Worst worst_double(const Function& c, const F& f) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> unit(0, 1);
  Worst worst;
  for (int64_t i = 0; i < 1'000'000; ++i) {
    const double x = c.least_double + (c.most - c.least_double) * unit(random);
    const double low = c.shifts ? x * (unit(random) - 0.5) * 0x1p-53 : 0;
    const int shift = c.shifts ? shift_of(x) : 0;
    const double got = f.template operator()<double>(fill(x), fill(low), shift)[0];
    const long double exact = std::ldexp(c.exact(static_cast<long double>(x) - low), shift);
    worst.take(static_cast<double>(std::abs(got - exact) / std::ldexp(1.L, std::ilogb(exact) - 52)), x);
  }
  return worst;
}

template <class F>
bool is_as_stated(uint64_t every, const Function& c, const F& f) {
  const Worst narrow = worst_float(c, f, every), wide = worst_double(c, f);
  std::printf("%-16s float32 %.2f ULP at %a, stated %.1f; float64 %.2f ULP at %a, stated %.1f\n", c.name, narrow.error,
              narrow.x, c.stated_float, wide.error, wide.x, c.stated_double);
  return narrow.error <= c.stated_float && wide.error <= c.stated_double;
}

}  // namespace

int main(int, char** arguments) {
  const uint64_t every = std::strtoull(arguments[1], nullptr, 10);
  const bool fits[] = {
      is_as_stated(
          every,
          {"exp_shifted", -10100, -10100, 10100, {1, 1, 0.5}, 3, 5, [](long double x) { return std::exp(x); }, true},
          []<class T>(Vec<T> x, Vec<T> low, int shift) { return exp_shifted<T>(x, low, shift, kNegInf<T>); }),
      is_as_stated(every,
                   {"exp_nonpositive", -87, -708, 0, {1, 1, 0.5}, 1.3, 1.3, [](long double x) { return std::exp(x); }},
                   []<class T>(Vec<T> x, Vec<T>, int) { return exp_nonpositive<T>(x); }),
      is_as_stated(
          every, {"log1p_unit", 0x1p-126, 0x1p-126, 1, {0, 1, -0.5}, 3, 3, [](long double x) { return std::log1p(x); }},
          []<class T>(Vec<T> x, Vec<T>, int) { return log1p_unit<T>(x); }),
      is_as_stated(every,
                   {"softplus",
                    -87,
                    -708,
                    1e4,
                    {0.6931471805599453, 0.5, 0.125},
                    4,
                    3,
                    [](long double x) { return std::max(x, 0.L) + std::log1p(std::exp(-std::abs(x))); }},
                   []<class T>(Vec<T> x, Vec<T>, int) { return softplus<T>(x); }),
      is_as_stated(
          every,
          {"sigmoid", -87, -708, 1e4, {0.5, 0.25, 0}, 2.5, 2.5, [](long double x) { return 1 / (1 + std::exp(-x)); }},
          []<class T>(Vec<T> x, Vec<T>, int) { return sigmoid<T>(x); })};
  return std::all_of(std::begin(fits), std::end(fits), [](bool fit) { return fit; }) ? 0 : 1;
}
