// Compiles the kernels once per instruction set and picks one when the extension is first used.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <sys/syscall.h>
#include <unistd.h>
#define FC_AMX  // the compiler supports AMX, and the system can be asked for it
#endif

#include "kernels/max_sim_kernels.h"
#include "kernels/product_kernels.h"
#include "kernels/target.h"
#include "kernels/tile_kernels.h"

namespace fc {

// SSE2 on x86-64, NEON on arm64: what every CPU of the architecture has.
namespace baseline {
#define FC_VECTOR_BYTES 16
#include "kernels/vector.inl"
#include "kernels/tile_sweeps.inl"
#include "kernels/max_sim.inl"
#include "kernels/product.inl"
#undef FC_VECTOR_BYTES
}  // namespace baseline

#ifdef __x86_64__
FC_TARGET_BEGIN("avx2,fma")
namespace avx2 {
#define FC_VECTOR_BYTES 32
#include "kernels/vector.inl"
#include "kernels/tile_sweeps.inl"
#include "kernels/max_sim.inl"
#include "kernels/product.inl"
#undef FC_VECTOR_BYTES
}  // namespace avx2
FC_TARGET_END

FC_TARGET_BEGIN("avx512f,avx512dq,avx512vl,fma")
namespace avx512 {
#define FC_VECTOR_BYTES 64
#include "kernels/vector.inl"
#include "kernels/tile_sweeps.inl"
#include "kernels/max_sim.inl"
#include "kernels/product.inl"
#undef FC_VECTOR_BYTES
}  // namespace avx512
FC_TARGET_END

// Only the products differ from avx512: bfloat16 is multiplied as it is.
FC_TARGET_BEGIN("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma")
namespace avx512_bf16 {
#define FC_VECTOR_BYTES 64
#define FC_BF16
#include "kernels/vector.inl"
#include "kernels/product.inl"
#undef FC_BF16
#undef FC_VECTOR_BYTES
}  // namespace avx512_bf16
FC_TARGET_END
#endif

#ifdef FC_AMX
FC_TARGET_BEGIN("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma,amx-tile,amx-bf16")
namespace amx_bf16 {
#define FC_VECTOR_BYTES 64
#define FC_BF16
#include "kernels/vector.inl"
#include "kernels/product.inl"
#include "kernels/product_amx.inl"
#undef FC_BF16
#undef FC_VECTOR_BYTES
}  // namespace amx_bf16
FC_TARGET_END
#endif

namespace {

enum Level { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// Linux lets a process use AMX's large registers only once it has asked for them.
bool has_amx() {
#ifdef FC_AMX
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kBf16) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Level best_level() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512bf16")) return kAvx512;
    return has_amx() ? kAmxBf16 : kAvx512Bf16;
  }
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
    throw std::invalid_argument(
        std::string("FUSED_CONTRASTIVE_CPU_LEVEL: got '") + asked +
        "', expected baseline, avx2, avx512, avx512_bf16 or amx_bf16, at most what this CPU has: " + kNames[best]);
  }();
  return level;
}

}  // namespace

const char* vector_level() {
  return kNames[chosen_level()];
}

// Levels above avx512 differ from it in the products of bfloat16 alone.
template <class T>
const TileKernels<T>& tile_kernels() {
#ifdef __x86_64__
  static const TileKernels<T> tables[] = {baseline::tile_kernel_table<T>(), avx2::tile_kernel_table<T>(),
                                          avx512::tile_kernel_table<T>()};
#else
  static const TileKernels<T> tables[] = {baseline::tile_kernel_table<T>()};
#endif
  return tables[std::min(chosen_level(), kAvx512)];
}

template <class T>
const MaxSimKernels<T>& max_sim_kernels() {
#ifdef __x86_64__
  static const MaxSimKernels<T> tables[] = {baseline::max_sim_kernel_table<T>(), avx2::max_sim_kernel_table<T>(),
                                            avx512::max_sim_kernel_table<T>()};
#else
  static const MaxSimKernels<T> tables[] = {baseline::max_sim_kernel_table<T>()};
#endif
  return tables[std::min(chosen_level(), kAvx512)];
}

// The baseline leaves all matrix products to the vendor's library, which can use more than SSE2 or NEON.
template <class E>
const ProductKernels<E>& product_kernels() {
  static const ProductKernels<E> none{};
#ifdef __x86_64__
  static const ProductKernels<E> tables[] = {none, avx2::product_kernel_table<E>(), avx512::product_kernel_table<E>()};
  return tables[std::min(chosen_level(), kAvx512)];
#else
  return none;
#endif
}

template <>
const ProductKernels<Bf16Pair>& product_kernels<Bf16Pair>() {
  static const ProductKernels<Bf16Pair> none{};
#ifdef FC_AMX
  static const ProductKernels<Bf16Pair> amx = amx_bf16::amx_kernel_table();
  if (chosen_level() == kAmxBf16) return amx;
#endif
#ifdef __x86_64__
  static const ProductKernels<Bf16Pair> pairs = avx512_bf16::product_kernel_table<Bf16Pair>();
  if (chosen_level() == kAvx512Bf16) return pairs;
#endif
  return none;
}

template const TileKernels<float>& tile_kernels<float>();
template const TileKernels<double>& tile_kernels<double>();
template const ProductKernels<float>& product_kernels<float>();
template const ProductKernels<double>& product_kernels<double>();
template const MaxSimKernels<float>& max_sim_kernels<float>();
template const MaxSimKernels<double>& max_sim_kernels<double>();

}  // namespace fc
