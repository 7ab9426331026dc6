// Vectors of one instruction set, by the compiler's portable vector types. levels.cpp includes this file once per
// instruction set, inside a namespace and a target pragma, with FC_VECTOR_BYTES set. No standard inline function is
// called here: the linker keeps one copy of it, which could then need instructions that an older CPU lacks.

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef int32_t Int;
  typedef uint32_t Bits;
  typedef float Vec __attribute__((vector_size(FC_VECTOR_BYTES)));
  typedef int32_t IntVec __attribute__((vector_size(FC_VECTOR_BYTES)));
  typedef uint32_t BitVec __attribute__((vector_size(FC_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  typedef int64_t Int;
  typedef uint64_t Bits;
  typedef double Vec __attribute__((vector_size(FC_VECTOR_BYTES)));
  typedef int64_t IntVec __attribute__((vector_size(FC_VECTOR_BYTES)));
  typedef uint64_t BitVec __attribute__((vector_size(FC_VECTOR_BYTES)));
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
constexpr T kNaN = T(__builtin_nan(""));

static inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

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

// A NaN in b is ignored, since the sum of exponentials becomes NaN anyway.
template <class T>
static inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
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
