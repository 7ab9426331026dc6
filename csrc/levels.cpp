// Compiles tile.inl and max_sim.inl once per instruction set and picks one when the extension is first used.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "max_sim_kernels.h"
#include "tile.h"

#if defined(__x86_64__) && defined(__clang__)
#define FC_TARGET_BEGIN_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define FC_TARGET_BEGIN_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512dq,avx512vl,fma\"))), apply_to = function)")
#define FC_TARGET_END _Pragma("clang attribute pop")
#elif defined(__x86_64__)
#define FC_TARGET_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define FC_TARGET_BEGIN_AVX512 _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512dq,avx512vl,fma\")")
#define FC_TARGET_END _Pragma("GCC pop_options")
#endif

namespace fc {

// SSE2 on x86-64, NEON on arm64: what every CPU of the architecture has.
namespace baseline {
#define FC_VECTOR_BYTES 16
#include "tile.inl"
#include "max_sim.inl"
#undef FC_VECTOR_BYTES
}  // namespace baseline

#ifdef __x86_64__
FC_TARGET_BEGIN_AVX2
namespace avx2 {
#define FC_VECTOR_BYTES 32
#include "tile.inl"
#include "max_sim.inl"
#undef FC_VECTOR_BYTES
}  // namespace avx2
FC_TARGET_END

FC_TARGET_BEGIN_AVX512
namespace avx512 {
#define FC_VECTOR_BYTES 64
#include "tile.inl"
#include "max_sim.inl"
#undef FC_VECTOR_BYTES
}  // namespace avx512
FC_TARGET_END
#endif

namespace {

enum Level { kBaseline, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Level best_level() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

Level chosen_level() {
  static const Level level = [] {
    const Level best = best_level();
    const char* asked = std::getenv("FUSED_CONTRASTIVE_CPU_LEVEL");
    if (!asked || !*asked) return best;
    for (int l = kBaseline; l <= best; ++l)
      if (!std::strcmp(asked, kNames[l])) return static_cast<Level>(l);
    throw std::invalid_argument(std::string("FUSED_CONTRASTIVE_CPU_LEVEL: got '") + asked +
                                "', expected baseline, avx2 or avx512, at most what this CPU has: " + kNames[best]);
  }();
  return level;
}

}  // namespace

const char* vector_level() {
  return kNames[chosen_level()];
}

template <class T>
const Kernels<T>& kernels() {
#ifdef __x86_64__
  static const Kernels<T> tables[] = {baseline::table<T>(), avx2::table<T>(), avx512::table<T>()};
#else
  static const Kernels<T> tables[] = {baseline::table<T>()};
#endif
  return tables[chosen_level()];
}

template <class T>
const MaxSimKernels<T>& max_sim_kernels() {
#ifdef __x86_64__
  static const MaxSimKernels<T> tables[] = {baseline::max_sim_table<T>(), avx2::max_sim_table<T>(),
                                            avx512::max_sim_table<T>()};
#else
  static const MaxSimKernels<T> tables[] = {baseline::max_sim_table<T>()};
#endif
  return tables[chosen_level()];
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const MaxSimKernels<float>& max_sim_kernels<float>();
template const MaxSimKernels<double>& max_sim_kernels<double>();

}  // namespace fc
