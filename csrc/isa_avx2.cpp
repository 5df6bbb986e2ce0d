// AVX2 and FMA: bf16 and int8 latents multiply as pairs of int16, fp32 ones as they are.
#include <immintrin.h>

#include "arithmetic.h"

namespace mla {
namespace {

// Pairs of int16, summed exactly in int32: twice the products per instruction of fp32 on machines without bf16
// dot products. A packed row is scaled to the length 32767; then, by Cauchy and Schwarz, no partial sum of a
// product of two rows exceeds 2^30, and each row carries a rounding error of 0.29 sqrt(width) / 32767 of its
// length, 2e-4 at a width of 576: a fifth of what bf16 itself rounds away.
struct Int16 {
  static constexpr int lanes = 8, per_unit = 2;
  static constexpr bool scaled = true;
  using V = Vec<lanes>;
  using F = V::F;
  using U = V::U;
  using Unit = U;
  using Sum = V::I;

  static MLA_INLINE Unit spread(const uint32_t* a) { return V::all(*a); }
  static MLA_INLINE Sum dot(Sum sum, Unit b, Unit a) {
    return sum + V::as<Sum>(_mm256_madd_epi16(V::as<__m256i>(b), V::as<__m256i>(a)));
  }
  static MLA_INLINE F value(Sum sum) { return __builtin_convertvector(sum, F); }
  static MLA_INLINE Unit join(F even, F odd) {
    const __m256i low = V::as<__m256i>(V::nearest(even)), high = V::as<__m256i>(V::nearest(odd) << 16);
    return V::as<Unit>(_mm256_blend_epi16(low, high, 0xaa));
  }

  template <Type type> static float squares(const char* row, int count) {
    using R = Read<lanes, type>;
    F a{}, b{};
    walk<2 * lanes, R::bytes>(row, count, [&](const char* p, int) {
      F even, odd;
      R::pair(p, even, odd);
      a += even * even;
      b += odd * odd;
    });
    return V::sum(a + b);
  }
  template <Type type> static void pack(const char* row, int count, float factor, uint32_t* units) {
    using R = Read<lanes, type>;
    walk<2 * lanes, R::bytes>(row, count, [&](const char* p, int i) {
      F even, odd;
      R::pair(p, even, odd);
      V::store(units + i / 2, join(even * factor, odd * factor));
    });
  }
  static MLA_INLINE Unit weights(const F* p) { return join(p[0], p[1]); }
  // Two rows of units (number pairs) -> for each column, the pair of both rows' numbers, in order.
  static MLA_INLINE void interleave(Unit row0, Unit row1, Unit& first, Unit& second) {
    const __m256i low = _mm256_unpacklo_epi16(V::as<__m256i>(row0), V::as<__m256i>(row1));
    const __m256i high = _mm256_unpackhi_epi16(V::as<__m256i>(row0), V::as<__m256i>(row1));
    first = V::as<Unit>(_mm256_permute2x128_si256(low, high, 0x20));
    second = V::as<Unit>(_mm256_permute2x128_si256(low, high, 0x31));
  }
};

struct Isa {
  using Half = Int16;
  using Full = Float32<8>;
  // Vectors of rows by broadcast units held in registers at a time: 12 sums of 16 registers.
  static constexpr int wide_x = 6, narrow_x = 12;
};

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

} // namespace
} // namespace mla

#define MLA_KERNELS avx2_kernels
#define MLA_NAME "avx2"
#include "kernels.h"
