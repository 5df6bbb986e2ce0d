// AVX-512 with BF16 and VNNI: bf16 pairs multiply as they lie in the cache.
#ifdef MLA_EMULATE_AVX512 // the same source on a machine without AVX-512, for tests
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "arithmetic.h"

namespace mla {
namespace {

struct Bf16 {
  static constexpr int lanes = 16, per_unit = 2;
  static constexpr bool scaled = false;
  using V = Vec<lanes>;
  using F = V::F;
  using Unit = V::U;
  using Sum = F;

  static MLA_INLINE Unit spread(const uint32_t* a) { return V::all(*a); }
  static MLA_INLINE Sum dot(Sum sum, Unit b, Unit a) {
    return V::as<Sum>(_mm512_dpbf16_ps(V::as<__m512>(sum), V::as<__m512bh>(b), V::as<__m512bh>(a)));
  }
  static MLA_INLINE F value(Sum sum) { return sum; }
  // Rounded to the nearest; half-way cases away from zero.
  static MLA_INLINE Unit join(F even, F odd) {
    return ((V::as<Unit>(even) + 0x8000u) >> 16) | ((V::as<Unit>(odd) + 0x8000u) & 0xffff0000u);
  }

  template <Type type> static float squares(const char*, int) { return 0; }
  template <Type type> static void pack(const char* row, int count, float factor, uint32_t* units) {
    using R = Read<lanes, type>;
    walk<2 * lanes, R::bytes>(row, count, [&](const char* p, int i) {
      if (type == Type::bf16 && factor == 1.0f) { // the cache's own numbers
        V::store(units + i / 2, V::load<Unit>(p));
      } else {
        F even, odd;
        R::pair(p, even, odd);
        V::store(units + i / 2, join(even * factor, odd * factor));
      }
    });
  }
  static MLA_INLINE Unit weights(const F* p) { return join(p[0], p[1]); }
  static MLA_INLINE void interleave(Unit row0, Unit row1, Unit& first, Unit& second) {
    const Unit even = (row0 & 0xffffu) | (row1 << 16), odd = (row0 >> 16) | (row1 & 0xffff0000u);
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    first = V::as<Unit>(_mm512_permutex2var_epi32(V::as<__m512i>(even), low, V::as<__m512i>(odd)));
    second = V::as<Unit>(_mm512_permutex2var_epi32(V::as<__m512i>(even), high, V::as<__m512i>(odd)));
  }
};

struct Isa {
  using Half = Bf16;
  using Full = Float32<16>;
  static constexpr int wide_x = 12, narrow_x = 24;
};

bool supported() {
#ifdef MLA_EMULATE_AVX512
  return true;
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
}

} // namespace
} // namespace mla

#define MLA_KERNELS avx512_kernels
#define MLA_NAME "avx512"
#include "kernels.h"
