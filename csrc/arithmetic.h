// Arithmetics: how numbers are held in the operands of a product, and the one instruction that multiplies them.
//
// A product runs over 32-bit units: one float, two bf16 or int16, or four int8. One side lies in the lanes of vectors
// (heads, queries or output channels; numbers of values in weighted sums), the other is broadcast unit by unit. An
// arithmetic gives
//
//   lanes, per_unit      units per vector; numbers per unit
//   Sum, dot, value      the accumulator; one step of the product, queries or probabilities first, then keys or values;
//                        the accumulator as floats
//   spread, spread_four  one unit in all lanes; with 16 lanes, four units in every four of them
//   pack                 a row of numbers -> its units, each number times a factor; Int8 packs whole rows only
//   weights              `per_unit` vectors of probabilities as one vector of units
//   stored               whether units are what a cache of a type holds
//   interleave           a vector of units of each of `per_unit` rows -> as many vectors of units that hold a number of
//                        each row, of which this is one pair; every 16 bytes keep to themselves, so that numbers end
//                        up where place_of says
//   Rest                 void, or (integers) the arithmetic of the second part of a row; then each part of a row
//                        has a factor of its own, and there are
//   pack_key, pack_query a whole row, for either side, with its factors; the type is that of the first part
//   Measure, measure     what has to be known of a whole key before it is packed
//   together             keys that are measured before any of them is packed: a measure is the end of a long chain
//   holds                of what types a key's first part may be
//   shifted              whether keys have an offset
//   second               0, or by what the first part of a query is finer in the second digits that follow its row
//   collect, limit       of a row's probabilities in one tile, what may reach `limit`
//   peak, counts, split  with second digits: when those of probabilities are needed, and what they are
//   whole                where they are not: a probability in whole steps, and what is carried on to the next key
//   Matrix               of arithmetics that multiply in matrix registers: those (matrix.h)
#pragma once

#include <type_traits>

#include "attention.h"
#include "vectors.h"

namespace mla {
namespace {

// Vectors of `lanes` consecutive numbers, read from memory as floats; Type is a parameter for the sake of speed.
template <int lanes, Type type> struct Read {
  using V = Vec<lanes>;
  using F = typename V::F;
  static constexpr int bytes = bytes_of(type);

  static MLA_INLINE F one(const char* p) {
    if constexpr (type == Type::f32) return V::template load<F>(p);
    if constexpr (type == Type::bf16)
      return V::template as<F>(__builtin_convertvector(V::template load<typename V::H>(p), typename V::U) << 16);
    if constexpr (type == Type::i8) return __builtin_convertvector(V::template load<typename V::B>(p), F);
  }

  template <int first> struct Every {
    static constexpr int of(int i) { return 2 * i + first; }
  };
  // 2 * lanes numbers, those at even places apart from those at odd ones.
  static MLA_INLINE void pair(const char* p, F& even, F& odd) {
    using U = typename V::U;
    using I = typename V::I;
    if constexpr (type == Type::bf16) {
      const U both = V::template load<U>(p);
      even = V::template as<F>(both << 16);
      odd = V::template as<F>(both & 0xffff0000u);
    } else if constexpr (type == Type::i8) {
      const U both = __builtin_convertvector(V::template load<typename V::H>(p), U);
      even = __builtin_convertvector(V::template as<I>(both << 24) >> 24, F);
      odd = __builtin_convertvector(V::template as<I>(both << 16) >> 24, F);
    } else {
      const F a = one(p), b = one(p + 4 * lanes);
      even = V::template pick<Every<0>>(a, b);
      odd = V::template pick<Every<1>>(a, b);
    }
  }
};

// Calls step(pointer, unit) for whole vectors of units; the numbers beyond `count` read as zeros.
template <int numbers, int bytes, class Step> MLA_INLINE void walk(const char* row, int count, Step&& step) {
  int i = 0;
#pragma GCC unroll 4
  for (; i + numbers <= count; i += numbers) step(row + static_cast<int64_t>(i) * bytes, i);
  if (i < count) {
    alignas(64) char tail[numbers * bytes];
    copy_some<numbers * bytes>(tail, row + static_cast<int64_t>(i) * bytes, (count - i) * bytes);
    step(tail, i);
  }
}

// A run of numbers in memory that becomes one part of a packed row.
struct Part {
  const char* data = nullptr;
  Type type = Type::f32;
  int count = 0;
  float factor = 1.0f;
};

struct Parts {
  Part a, b;
};

// What the integers of a packed row are to be multiplied by, what those of a key have too much, and whether a query
// needs its second digits.
struct Factors {
  float first, rest, offset;
  bool second = false;
};

template <class A, class = void> constexpr bool kMatrix = false;
template <class A> constexpr bool kMatrix<A, std::void_t<typename A::Matrix>> = !std::is_void_v<typename A::Matrix>;

// Units of a part of a row; with matrix registers a part ends with whole vectors of units, of zeros where it has none.
template <class A> constexpr int units_of(int count) {
  const int units = (count + A::per_unit - 1) / A::per_unit;
  return kMatrix<A> ? (units + A::lanes - 1) / A::lanes * A::lanes : units;
}

// Whether a part of so many numbers is its units, without zeros behind it.
template <class A> constexpr bool fills(int count) { return units_of<A>(count) * A::per_unit == count; }

// The type of the rotary keys beside latents of a type, or of the second part of a row beside the first.
constexpr Type beside(Type latents) { return latents == Type::f32 ? Type::f32 : Type::bf16; }

// step(type), which then is a constant.
template <class Step> MLA_INLINE auto with(Type type, Step&& step) {
  switch (type) {
  case Type::f32:
    return step(std::integral_constant<Type, Type::f32>());
  case Type::bf16:
    return step(std::integral_constant<Type, Type::bf16>());
  default:
    return step(std::integral_constant<Type, Type::i8>());
  }
}

// Writes whole vectors: up to 2 * lanes units beyond the part.
template <class A, Type type> MLA_INLINE void pack(const Part& part, float factor, uint32_t* units) {
  A::template pack<type>(part.data, part.count, factor * part.factor, units);
}

// Floats as they are: the arithmetic that every machine has, and that of fp32 caches.
template <int lanes_> struct Float32 {
  static constexpr int lanes = lanes_, per_unit = 1, together = 1;
  using V = Vec<lanes>;
  using F = typename V::F;
  using Unit = F;
  using Sum = F;

  static MLA_INLINE Unit spread(const uint32_t* a) {
    float x;
    std::memcpy(&x, a, 4);
    return V::all(x);
  }
  static MLA_INLINE Sum dot(Sum sum, Unit b, Unit a) { return sum + b * a; }
  static MLA_INLINE F value(Sum sum) { return sum; }

  static constexpr bool stored(Type type) { return type == Type::f32; }
  template <Type type> static MLA_INLINE void pack(const char* row, int count, float factor, uint32_t* units) {
    using R = Read<lanes, type>;
    walk<lanes, R::bytes>(row, count, [&](const char* p, int i) { V::store(units + i, R::one(p) * factor); });
  }
  static MLA_INLINE Unit weights(const F* p) { return p[0]; }
  using Rest = void;
};

} // namespace
} // namespace mla
