// AVX2 and FMA: bf16 and int8 latents multiply as pairs of int16, fp32 ones as they are.
#include <immintrin.h>

#include "int16.h"

namespace mla {
namespace {

struct Avx2 {
  static constexpr int lanes = 8;
  using V = Vec<lanes>;
  using U = V::U;
  using I = V::I;

  static MLA_INLINE I multiply_add(I sum, U b, U a) {
    return sum + V::as<I>(_mm256_madd_epi16(V::as<__m256i>(b), V::as<__m256i>(a)));
  }
  static MLA_INLINE U blend(U low, U high) {
    return V::as<U>(_mm256_blend_epi16(V::as<__m256i>(low), V::as<__m256i>(high), 0xaa));
  }
  static MLA_INLINE void interleave(const uint32_t* rows, int64_t stride, U (&to)[2]) {
    const __m256i a = V::load<__m256i>(rows), b = V::load<__m256i>(rows + stride);
    to[0] = V::as<U>(_mm256_unpacklo_epi16(a, b));
    to[1] = V::as<U>(_mm256_unpackhi_epi16(a, b));
  }
};

struct Isa {
  using Half = Int16<Avx2>;
  using Full = Float32<8>;
  using Byte = Int16<Avx2>;
};

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

} // namespace
} // namespace mla

#define MLA_KERNELS avx2_kernels
#define MLA_NAME "avx2"
#include "kernels.h"
