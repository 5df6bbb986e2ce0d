// Pairs of bf16, which multiply as they lie in the cache.
#pragma once

#include "avx512.h"

namespace mla {
namespace {

// Numbers 0, 16, 1, 17 and so on: two vectors side by side -> pairs.
alignas(64) constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

struct Bf16 {
  static constexpr int lanes = 16, per_unit = 2, together = 1;
  using V = Vec<lanes>;
  using F = V::F;
  using Unit = V::U;
  using Sum = F;

  static MLA_INLINE Unit spread(const uint32_t* a) { return V::all(*a); }
  static MLA_INLINE Unit spread_four(const uint32_t* a) { return mla::spread_four(a); }
  static MLA_INLINE Sum dot(Sum sum, Unit b, Unit a) {
    return V::as<Sum>(_mm512_dpbf16_ps(V::as<__m512>(sum), V::as<__m512bh>(b), V::as<__m512bh>(a)));
  }
  static MLA_INLINE F value(Sum sum) { return sum; }
  // Rounded to the nearest; half-way cases away from zero.
  static MLA_INLINE Unit join(F even, F odd) { return (rounded(even) >> 16) | (rounded(odd) & 0xffff0000u); }
  // In the upper halves. NaN is apart: what is added would carry through all its bits and make zero of some.
  static MLA_INLINE Unit rounded(F x) { return x == x ? V::as<Unit>(x) + 0x8000u : Unit{} + 0x7fc00000u; }

  static constexpr bool stored(Type type) { return type == Type::bf16; }
  template <Type type> static MLA_INLINE void pack(const char* row, int count, float factor, uint32_t* units) {
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
  static MLA_INLINE Unit weights(const F* p) {
#ifdef MLA_EMULATE_AVX512
    return join(p[0], p[1]);
#else
    const __m512bh both = _mm512_cvtne2ps_pbh(V::as<__m512>(p[1]), V::as<__m512>(p[0]));
    return V::as<Unit>(_mm512_permutexvar_epi16(V::load<__m512i>(kPairs), V::as<__m512i>(both)));
#endif
  }
  template <int> static MLA_INLINE void interleave(const uint32_t* rows, int64_t stride, Unit (&to)[2]) {
    interleave_pairs(rows, stride, to);
  }
  using Rest = void;
};

#ifdef MLA_EMULATE_AVX512
bool has_bf16() { return true; }
#else
bool has_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

} // namespace
} // namespace mla
