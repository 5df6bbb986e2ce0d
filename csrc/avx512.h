// What the instruction sets with 512-bit vectors share.
#pragma once

#ifdef MLA_EMULATE_AVX512 // the same source on a machine without AVX-512, for tests
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "arithmetic.h"

namespace mla {
namespace {

// Two rows of pairs of 16 bits.
MLA_INLINE void interleave_pairs(const uint32_t* rows, int64_t stride, Vec<16>::U (&to)[2]) {
  using V = Vec<16>;
  const __m512i a = V::load<__m512i>(rows), b = V::load<__m512i>(rows + stride);
  to[0] = V::as<V::U>(_mm512_unpacklo_epi16(a, b));
  to[1] = V::as<V::U>(_mm512_unpackhi_epi16(a, b));
}

MLA_INLINE Vec<16>::U spread_four(const uint32_t* a) {
  return Vec<16>::as<Vec<16>::U>(_mm512_broadcast_i32x4(Vec<16>::load<__m128i>(a)));
}

// Quads of int8 for int8 latents, beside rotary keys in another arithmetic. The instruction takes one side unsigned:
// queries are stored as q + 128, and 128 times the sum of its numbers is taken from every key's score again. Where
// eight bits are too few for a query, a second product adds eight more.
template <class Rest_, class Matrix_ = void> struct Int8 {
  static constexpr int lanes = 16, per_unit = 4, together = 1;
  static constexpr bool shifted = true;
  static constexpr bool holds(Type type) { return type == Type::i8; }
  static constexpr bool stored(Type) { return false; } // a key's sum and sign are not
  // Eight bits are enough for a query whose largest number is so many times the root of its mean square. Those of
  // trained models often have channels far beyond: then all others would be rounded away.
  static constexpr float crest = 4.5f, second = 254.0f;
  using V = Vec<lanes>;
  using F = V::F;
  using Unit = V::U;
  using Sum = V::I;
  using Rest = Rest_;
  using Matrix = Matrix_;

  static MLA_INLINE Unit spread(const uint32_t* a) { return V::all(*a); }
  static MLA_INLINE Unit spread_four(const uint32_t* a) { return mla::spread_four(a); }
  static MLA_INLINE Sum dot(Sum sum, Unit b, Unit a) {
    return V::as<Sum>(_mm512_dpbusd_epi32(V::as<__m512i>(sum), V::as<__m512i>(b), V::as<__m512i>(a)));
  }
  static MLA_INLINE F value(Sum sum) { return __builtin_convertvector(sum, F); }

  struct Measure {};
  template <Type type> static MLA_INLINE Measure measure(const Parts&) { return {}; }
  // The cache's own bytes. The sign of a factor goes into them, because times a probability the factor becomes a
  // weight, which has none; -128, which quantising never gives, then becomes 127.
  template <Type type> static MLA_INLINE Factors pack_key(const Parts& parts, Measure, uint32_t* units) {
    static_assert(type == Type::i8);
    const int count = parts.a.count;
    const bool negative = parts.a.factor < 0;
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    walk<64, 1>(parts.a.data, count, [&](const char* p, int i) {
      __m512i bytes = V::load<__m512i>(p);
      if (negative) bytes = _mm512_subs_epi8(_mm512_setzero_si512(), bytes);
      sum = _mm512_dpbusd_epi32(sum, ones, bytes);
      V::store(units + i / 4, bytes);
    });
    const float rest = pack_rest<Type::bf16>(parts.b, units + units_of<Int8>(count));
    return {__builtin_fabsf(parts.a.factor), rest, 128.0f * V::sum(value(V::as<Sum>(sum)))};
  }
  template <Type type> static Factors pack_query(const Parts& parts, uint32_t* units) {
    using R = Read<lanes, type>;
    const int count = parts.a.count;
    F tops = {}, poison = {}, squares = {}; // a maximum forgets NaN
    walk<lanes, R::bytes>(parts.a.data, count, [&](const char* p, int) {
      const F x = R::one(p);
      tops = V::max(tops, V::max(x, -x));
      poison += 0.0f * x;
      squares += x * x;
    });
    float top = 0;
    for (int i = 0; i < lanes; ++i) top = top > tops[i] ? top : tops[i];
    top += V::sum(poison);
    const float inner = top > 0 ? 127.0f / top : 0.0f;
    const auto write = [&](uint32_t* to, auto&& digits) {
      walk<lanes, R::bytes>(parts.a.data, count, [&](const char* p, int i) {
        const Unit numbers = V::nearest(digits(R::one(p) * inner)) + 128u;
        V::store(reinterpret_cast<uint8_t*>(to) + i, __builtin_convertvector(numbers, V::B));
      });
    };
    write(units, [](F x) { return x; });
    units += units_of<Int8>(count);
    const float rest = pack_rest<beside(type)>(parts.b, units);
    // What rounding took away.
    write(units + units_of<Rest>(parts.b.count), [](F x) { return (x - ((x + V::rounding) - V::rounding)) * second; });
    return {top / 127.0f, rest, 0.0f, top * top * static_cast<float>(count) > crest * crest * V::sum(squares)};
  }
  // Returns the factor of the rotary part.
  template <Type type> static MLA_INLINE float pack_rest(const Part& part, uint32_t* units) {
    if constexpr (std::is_void_v<typename Rest::Rest>) {
      mla::pack<Rest, type>(part, 1.0f, units);
      return 1.0f;
    } else {
      return Rest::template pack_part<type>(part, Rest::template length_of<type>(part), units);
    }
  }

  // The largest probability of a row and tile becomes 255.
  static constexpr float limit = 255.0f;
  static MLA_INLINE F collect(F so_far, F p) { return V::max(so_far, p); }
  // Where all of a row and tile are less than so many times the largest, those beside it are a few steps of rounding
  // each, or none. That is of no account where the largest is less than a 32nd of all that came before.
  static constexpr float peak = 4.0f, counts = 32.0f;
  // Leaves whole steps, and returns what is beyond them in steps of its own.
  static MLA_INLINE F split(F& p) {
    const F whole = __builtin_convertvector(__builtin_convertvector(p, typename V::I), F);
    const F beyond = p - whole;
    p = whole;
    return beyond * limit;
  }
  // The nearest step; of few steps counting what is carried, and what is beyond it is carried on. Many steps are
  // rounded up as often as down, and would only come to err by two roundings instead of one.
  static constexpr float few = 4.0f;
  static MLA_INLINE F whole(F p, F& carry) {
    const F x = p < few ? p + carry : p;
    const F step = (x + V::rounding) - V::rounding;
    carry = p < few ? x - step : carry;
    return step;
  }
  static MLA_INLINE Unit weights(const F* p) {
    return (V::nearest(p[0]) & 0xffu) | ((V::nearest(p[1]) & 0xffu) << 8) | ((V::nearest(p[2]) & 0xffu) << 16) |
           (V::nearest(p[3]) << 24);
  }
  template <int pair> static MLA_INLINE void interleave(const uint32_t* rows, int64_t stride, Unit (&to)[2]) {
    const auto both = [&](int i) MLA_INLINE_LAMBDA {
      const __m512i a = V::load<__m512i>(rows + i * stride), b = V::load<__m512i>(rows + (i + 1) * stride);
      return pair == 0 ? _mm512_unpacklo_epi8(a, b) : _mm512_unpackhi_epi8(a, b);
    };
    const __m512i ab = both(0), cd = both(2);
    to[0] = V::as<Unit>(_mm512_unpacklo_epi16(ab, cd));
    to[1] = V::as<Unit>(_mm512_unpackhi_epi16(ab, cd));
  }
};

#ifdef MLA_EMULATE_AVX512
bool has_avx512() { return true; }
#else
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") &&
         // What the compiler takes for granted there; a virtual machine may hide it.
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
#endif

} // namespace
} // namespace mla
