// Vectors of one instruction set and the functions of them that the kernels share, with the compiler's portable vector
// types: levels.cpp includes this file, and then the kernels, inside a namespace and a target pragma, with
// FC_VECTOR_BYTES set. Only plain functions and builtins: an inline function of a standard header would be shared with
// code for older CPUs.
//
// Excluded logits are -inf, and every reference subtracted before exp() is finite (`finite_reference`), so an excluded
// logit contributes exp(-inf) = 0 even in a row that has nothing left. NaN survives every step.

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef int32_t Int;
  typedef uint32_t Bits;
  typedef float Vec __attribute__((vector_size(FC_VECTOR_BYTES)));
  typedef int32_t IntVec __attribute__((vector_size(FC_VECTOR_BYTES)));
  typedef uint32_t BitVec __attribute__((vector_size(FC_VECTOR_BYTES)));
  static constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;  // kLn2Hi * n is exact
  static constexpr float kLowest = -87.f;  // below, exp is under the smallest normal number: 0
  static constexpr float kExact = 1e4f;    // up to here n ln2 leaves r no error to speak of
  static constexpr int kTerms = 7, kLogTerms = 7, kMantissa = 23, kExponentBias = 127;
};
template <>
struct Lanes<double> {
  typedef int64_t Int;
  typedef uint64_t Bits;
  typedef double Vec __attribute__((vector_size(FC_VECTOR_BYTES)));
  typedef int64_t IntVec __attribute__((vector_size(FC_VECTOR_BYTES)));
  typedef uint64_t BitVec __attribute__((vector_size(FC_VECTOR_BYTES)));
  static constexpr double kRound = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93145751953125e-1, kLn2Lo = 1.42860682030941723212e-6;
  static constexpr double kLowest = -708.;
  static constexpr double kExact = 1e4;
  static constexpr int kTerms = 13, kLogTerms = 16, kMantissa = 52, kExponentBias = 1023;
};

template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
using IntVec = typename Lanes<T>::IntVec;
template <class T>
constexpr int kLanes = FC_VECTOR_BYTES / sizeof(T);
template <class T>
constexpr T kNegInf = -__builtin_huge_val();

template <class T>
static inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
static inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
static inline Vec<T> fill(T value) {
  return Vec<T>{} + value;
}
template <class T>
static inline Vec<T> maximum(Vec<T> a, Vec<T> b) {  // ignores NaN in b: the sum of exponentials carries it
  return b > a ? b : a;
}
template <class T>
static inline T largest(Vec<T> v) {
  T most = v[0];
  for (int l = 1; l < kLanes<T>; ++l) most = v[l] > most ? v[l] : most;
  return most;
}
template <class T>
static inline T total(Vec<T> v) {
  T sum = 0;
  for (int l = 0; l < kLanes<T>; ++l) sum += v[l];
  return sum;
}
template <class T>
static inline Vec<T> finite_reference(Vec<T> m) {
  return m == kNegInf<T> ? Vec<T>{} : m;
}
template <class T>
static inline T finite_reference(T m) {
  return m == kNegInf<T> ? T(0) : m;
}

// exp(x - low) * 2^shift, 0 where x < lowest, NaN where x is: x = n ln2 + r, |r| <= ln2 / 2, Taylor in r, times
// 2^(n + shift), which must be a normal number. As accurate for a large x as for a small one, up to kExact.
template <class T>
static inline Vec<T> exp_shifted(Vec<T> x, Vec<T> low, int shift, T lowest) {
  using L = Lanes<T>;
  constexpr T kLog2E = T(1.44269504088896340736);
  const Vec<T> rounded = x * kLog2E + L::kRound;
  const Vec<T> n = rounded - L::kRound;
  const Vec<T> r = ((x - n * L::kLn2Hi) - n * L::kLn2Lo) - low;
  constexpr double kInverseFactorial[] = {
      1.,        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  Vec<T> p = fill(T(kInverseFactorial[L::kTerms]));
#pragma GCC unroll 16
  for (int k = L::kTerms - 1; k >= 0; --k) p = p * r + T(kInverseFactorial[k]);
  typename L::BitVec bits;  // unsigned: for a NaN the sum may wrap round
  __builtin_memcpy(&bits, &rounded, sizeof bits);
  bits = (bits + typename L::Bits(L::kExponentBias + shift)) << L::kMantissa;
  Vec<T> power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return x < lowest ? Vec<T>{} : p * power;
}

// exp(x) for x <= 0 (up to rounding), -inf or NaN.
template <class T>
static inline Vec<T> exp_nonpositive(Vec<T> x) {
  return exp_shifted<T>(x, Vec<T>{}, 0, Lanes<T>::kLowest);
}

// log(1 + u) for u in [0, 1] or NaN, to full relative precision: with z = u / (2 + u) <= 1/3 it is
// 2 (z + z^3 / 3 + z^5 / 5 + ...).
template <class T>
static inline Vec<T> log1p_unit(Vec<T> u) {
  const Vec<T> z = u / (u + T(2)), z2 = z * z;
  constexpr int kTerms = Lanes<T>::kLogTerms;
  Vec<T> p = fill(T(1) / T(2 * kTerms + 1));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 0; --k) p = p * z2 + T(1) / T(2 * k + 1);
  return p * z * T(2);
}

// exp(-|s|), from which softplus(s) = max(s, 0) + log(1 + u) and sigmoid(s) = (1 or u) / (1 + u) are made.
template <class T>
static inline Vec<T> exp_minus_abs(Vec<T> s) {
  return exp_nonpositive<T>(s < T(0) ? s : -s);
}

static inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
