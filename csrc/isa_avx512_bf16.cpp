// AVX-512 with BF16 and VNNI: bf16 pairs and int8 quads multiply as they lie in the cache.
#include "avx512.h"

namespace mla {
namespace {

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
  static MLA_INLINE Unit weights(const F* p) { return join(p[0], p[1]); }
  template <int> static MLA_INLINE void interleave(const uint32_t* rows, int64_t stride, Unit (&to)[2]) {
    interleave_pairs(rows, stride, to);
  }
  using Rest = void;
};

struct Isa {
  using Half = Bf16;
  using Full = Float32<16>;
  using Byte = Int8<Bf16>;
  static constexpr int wide_x = 12, narrow_x = 24;
};

#ifdef MLA_EMULATE_AVX512
bool supported() { return true; }
#else
bool supported() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

} // namespace
} // namespace mla

#define MLA_KERNELS avx512_bf16_kernels
#define MLA_NAME "avx512_bf16"
#include "kernels.h"
