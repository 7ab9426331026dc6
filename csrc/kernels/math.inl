// Exponential functions of vectors; levels.cpp includes this after vector.inl. "Max ULP" is the largest error, in units
// of the distance of neighbouring numbers at the exact value: over every float32 of the range, and random float64s.
// tests/backends/cpp/test_vector_math.py measures it.

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;  // kLn2Hi * n is exact
  static constexpr float kLowest = -87.f;  // exp of anything lower is below the smallest normal number
  static constexpr int kTerms = 7, kLogTerms = 7, kMantissa = 23, kExponentBias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double kRound = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93145751953125e-1, kLn2Lo = 1.42860682030941723212e-6;
  static constexpr double kLowest = -708.;
  static constexpr int kTerms = 13, kLogTerms = 16, kMantissa = 52, kExponentBias = 1023;
};

// exp_shifted has its stated accuracy for references (maxima, log-normalisers) up to this size.
template <class T>
constexpr T kMaxReference = T(1e4);

// exp(x - low) * 2^shift, but 0 where x < lowest and NaN where x is NaN. With x = n ln2 + r, |r| <= ln2 / 2, it is
// Taylor's polynomial of exp(r - low) times 2^(n + shift), which must be a normal number. Max ULP 3 (float64: 5) for
// |x| <= 10100 and |low| up to half an ULP of x.
template <class T>
static inline Vec<T> exp_shifted(Vec<T> x, Vec<T> low, int shift, T lowest) {
  using C = ExpConstants<T>;
  constexpr T kLog2E = T(1.44269504088896340736);
  const Vec<T> rounded = x * kLog2E + C::kRound;
  const Vec<T> n = rounded - C::kRound;
  const Vec<T> r = ((x - n * C::kLn2Hi) - n * C::kLn2Lo) - low;
  constexpr double kInverseFactorial[] = {
      1.,        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  Vec<T> p = fill(T(kInverseFactorial[C::kTerms]));
#pragma GCC unroll 16
  for (int k = C::kTerms - 1; k >= 0; --k) p = p * r + T(kInverseFactorial[k]);
  typename Lanes<T>::BitVec bits;  // unsigned: for a NaN the sum may wrap round
  __builtin_memcpy(&bits, &rounded, sizeof bits);
  bits = (bits + typename Lanes<T>::Bits(C::kExponentBias + shift)) << C::kMantissa;
  Vec<T> power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return x < lowest ? Vec<T>{} : p * power;
}

// exp(x) for x <= 0 (up to rounding), -inf or NaN; 0 below kLowest. Max ULP 1.3 (float64: 1.3) from kLowest on.
template <class T>
static inline Vec<T> exp_nonpositive(Vec<T> x) {
  return exp_shifted<T>(x, Vec<T>{}, 0, ExpConstants<T>::kLowest);
}

// log(1 + u) for u in [0, 1] or NaN. With z = u / (2 + u) <= 1/3 it is 2 (z + z^3 / 3 + z^5 / 5 + ...).
// Max ULP 3 (float64: 3) for u = 0 and from the smallest normal number on.
template <class T>
static inline Vec<T> log1p_unit(Vec<T> u) {
  const Vec<T> z = u / (u + T(2)), z2 = z * z;
  constexpr int kTerms = ExpConstants<T>::kLogTerms;
  Vec<T> p = fill(T(1) / T(2 * kTerms + 1));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 0; --k) p = p * z2 + T(1) / T(2 * k + 1);
  return p * z * T(2);
}

template <class T>
static inline Vec<T> exp_minus_abs(Vec<T> s) {
  return exp_nonpositive<T>(s < T(0) ? s : -s);
}

// log(1 + exp(s)); 0 below kLowest. Max ULP 4 (float64: 3) from kLowest on.
template <class T>
static inline Vec<T> softplus(Vec<T> s) {
  return (s > T(0) ? s : Vec<T>{}) + log1p_unit<T>(exp_minus_abs<T>(s));
}

// 1 / (1 + exp(-s)); 0 below kLowest. Max ULP 2.5 (float64: 2.5) from kLowest on.
template <class T>
static inline Vec<T> sigmoid(Vec<T> s) {
  const Vec<T> u = exp_minus_abs<T>(s);
  return (s > T(0) ? fill<T>(1) : u) / (u + T(1));
}

// A value that is subtracted before exp() must be finite: excluded logits then give exp(-inf) = 0 even in a row
// whose pairs are all excluded, so that its maximum is -inf.
template <class T>
static inline Vec<T> finite_reference(Vec<T> m) {
  return m == kNegInf<T> ? Vec<T>{} : m;
}
template <class T>
static inline T finite_reference(T m) {
  return m == kNegInf<T> ? T(0) : m;
}
