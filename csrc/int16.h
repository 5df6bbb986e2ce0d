// Pairs of int16: the arithmetic of machines without products of bf16, and of those where int16's are faster.
#pragma once

#include "arithmetic.h"

namespace mla {
namespace {

// Pairs of int16, summed exactly in int32: twice the products per instruction of fp32 on machines without bf16
// dot products. A part of a row is scaled to the length 32767; then, by Cauchy and Schwarz, no partial sum of a
// product of two parts exceeds 2^30, and each carries a rounding error of 0.29 sqrt(width) / 32767 of its length,
// 2e-4 at a width of 512: a fifth of what bf16 itself rounds away.
// `Machine` has lanes, multiply_add(sum, b, a), interleave(rows, stride, to) and, with 16 lanes, spread_four as an
// arithmetic has, and blend(low, high): the lower halves of `low` and the upper ones of `high`, whose lower ones are
// zero.
template <class Machine> struct Int16 {
  static constexpr int lanes = Machine::lanes, per_unit = 2, together = 4;
  static constexpr bool shifted = false;
  static constexpr float second = 0.0f;
  static constexpr bool holds(Type) { return true; }
  static constexpr bool stored(Type) { return false; }
  using V = Vec<lanes>;
  using F = typename V::F;
  using Unit = typename V::U;
  using Sum = typename V::I;

  static MLA_INLINE Unit spread(const uint32_t* a) { return V::all(*a); }
  static MLA_INLINE Unit spread_four(const uint32_t* a) { return Machine::spread_four(a); }
  static MLA_INLINE Sum dot(Sum sum, Unit b, Unit a) { return Machine::multiply_add(sum, b, a); }
  static MLA_INLINE F value(Sum sum) { return __builtin_convertvector(sum, F); }
  static MLA_INLINE Unit join(F even, F odd) { return Machine::blend(V::nearest(even), V::nearest(odd) << 16); }

  template <Type type> static MLA_INLINE float squares(const char* row, int count) {
    using R = Read<lanes, type>;
    F a{}, b{}, c{}, d{}; // as many as hide the latency of an addition
    const auto add = [](const char* p, F& x, F& y) {
      F even, odd;
      R::pair(p, even, odd);
      x += even * even;
      y += odd * odd;
    };
    const int whole = count / (4 * lanes) * (4 * lanes);
    for (int i = 0; i < whole; i += 4 * lanes) {
      add(row + i * R::bytes, a, b);
      add(row + (i + 2 * lanes) * R::bytes, c, d);
    }
    walk<2 * lanes, R::bytes>(row + whole * R::bytes, count - whole, [&](const char* p, int) { add(p, a, b); });
    return V::sum((a + b) + (c + d));
  }
  template <Type type> static MLA_INLINE void pack(const char* row, int count, float factor, uint32_t* units) {
    using R = Read<lanes, type>;
    walk<2 * lanes, R::bytes>(row, count, [&](const char* p, int i) {
      F even, odd;
      R::pair(p, even, odd);
      V::store(units + i / 2, join(even * factor, odd * factor));
    });
  }
  static MLA_INLINE Unit weights(const F* p) { return join(p[0], p[1]); }
  // The probabilities of a row and tile add up to 32767, so that no sum of products overflows.
  static constexpr float limit = 32767.0f;
  static MLA_INLINE F collect(F so_far, F p) { return so_far + p; }
  template <int> static MLA_INLINE void interleave(const uint32_t* rows, int64_t stride, Unit (&to)[2]) {
    Machine::interleave(rows, stride, to);
  }

  using Rest = Int16;
  // The lengths of a row's parts.
  struct Measure {
    float a, b;
  };
  template <Type type> static MLA_INLINE Measure measure(const Parts& parts) {
    return {length_of<type>(parts.a), length_of<beside(type)>(parts.b)};
  }
  template <Type type> static MLA_INLINE Factors pack_key(const Parts& parts, Measure lengths, uint32_t* units) {
    return {pack_part<type>(parts.a, lengths.a, units),
            pack_part<beside(type)>(parts.b, lengths.b, units + units_of<Int16>(parts.a.count)), 0.0f};
  }
  template <Type type> static Factors pack_query(const Parts& parts, uint32_t* units) {
    return pack_key<type>(parts, measure<type>(parts), units);
  }
  template <Type type> static MLA_INLINE float length_of(const Part& part) {
    const float length = __builtin_sqrtf(squares<type>(part.data, part.count));
    // Zeros and NaN, or squares that fp32 does not hold.
    return type == Type::i8 || (length > 1e-15f && length <= __FLT_MAX__) ? length : exact_length(part, type);
  }
  // The sign of a factor goes into the numbers: times a probability the factor becomes a weight, which has none.
  template <Type type> static MLA_INLINE float pack_part(Part part, float length, uint32_t* units) {
    const float factor = length * (__builtin_fabsf(part.factor) * (1.0f / limit)); // NaN where the part holds one
    part.factor = __builtin_copysignf(1.0f, part.factor);
    if (factor == factor)
      mla::pack<Int16, type>(part, length > 1e-33f ? limit / length : 0.0f, units); // below, it would be infinite
    else // NaN's own bits would be integers of any size, whose sums overflow
      std::memset(units, 0, static_cast<size_t>(units_of<Int16>(part.count)) * 4);
    return factor;
  }
  // Rare enough to be summed one by one.
  static __attribute__((noinline)) float exact_length(const Part& part, Type type) {
    double exact = 0;
    const int bytes = bytes_of(type);
    for (int i = 0; i < part.count; ++i) {
      float x = 0; // bf16 is the upper half of it
      std::memcpy(reinterpret_cast<char*>(&x) + 4 - bytes, part.data + i * bytes, static_cast<size_t>(bytes));
      exact += static_cast<double>(x) * x;
    }
    return static_cast<float>(__builtin_sqrt(exact));
  }
};

} // namespace
} // namespace mla
