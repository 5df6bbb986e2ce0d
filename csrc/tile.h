// The steps of attention over one tile of keys, for one tile of query rows, in any arithmetic.
//
// Rows lie in lanes: a row tile is one or two vectors wide (`groups`), and holds lanes * groups rows. Packed
// rows, scores, probabilities and sums are all [something][row of the tile], so that every step of the softmax
// is vertical and nothing is ever summed across a vector.
#pragma once

#include <type_traits>

#include "arithmetic.h"

namespace mla {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
constexpr int kKeys = 120; // keys per tile: a multiple of every wide_x and narrow_x
constexpr float kLength = 32767.0f;

// Hands out aligned pieces of one allocation; with no memory behind it, it only counts.
class Carver {
public:
  explicit Carver(char* base) : base_(base) {}
  template <class T> T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

private:
  char* base_;
  int64_t used_ = 0;
};

// A stride that is an odd multiple of 16 bytes: walking along it does not fall into few sets of a cache.
inline int64_t odd_stride(int64_t units) { return up(units, 4) | 4; }

template <class A> float squares(const Part& part) {
  switch (part.type) {
  case Type::f32: return A::template squares<Type::f32>(part.data, part.count);
  case Type::bf16: return A::template squares<Type::bf16>(part.data, part.count);
  default: return A::template squares<Type::i8>(part.data, part.count);
  }
}

template <class A> void pack(const Part& part, float factor, uint32_t* units) {
  factor *= part.factor;
  switch (part.type) {
  case Type::f32: return A::template pack<Type::f32>(part.data, part.count, factor, units);
  case Type::bf16: return A::template pack<Type::bf16>(part.data, part.count, factor, units);
  default: return A::template pack<Type::i8>(part.data, part.count, factor, units);
  }
}

template <class A> constexpr int units_of(int count) { return (count + A::per_unit - 1) / A::per_unit; }

template <class A> constexpr bool kMixed = !std::is_void_v<typename A::Rest>;

// Units of a row of two parts, the second from its own unit on.
template <class A> constexpr int units_of(int a, int b) {
  if constexpr (kMixed<A>)
    return units_of<A>(a) + units_of<typename A::Rest>(b);
  else
    return units_of<A>(a) + units_of<A>(b);
}

// One row of two parts as units of one arithmetic. Writes whole vectors: up to 2 * lanes units beyond the row. Returns the factor of the row; `gain` multiplies every number.
template <class A> float pack_row(const Parts& parts, float gain, uint32_t* units) {
  const Part &a = parts.a, &b = parts.b;
  float inner = gain, outer = 1.0f;
  if constexpr (A::scaled) {
    const float length = __builtin_sqrtf(a.factor * a.factor * squares<A>(a) + b.factor * b.factor * squares<A>(b));
    inner = length > 0 ? kLength / length : 0.0f;
    outer = length * (gain / kLength); // NaN where the row holds one
  }
  pack<A>(a, inner, units);
  pack<A>(b, inner, units + units_of<A>(a.count));
  return outer;
}

// `count` rows -> [unit][row of the tile] for each row tile in turn, with their factors. Lanes beyond `count`
// are zero. row(i) gives the two parts of row i; `line` is room for one row of units.
template <class A, class Row>
void pack_lanes(int count, int units, float gain, Row&& row, uint32_t* packed, float* factors, uint32_t* line) {
  const int padded = static_cast<int>(up(count, A::lanes));
  for (int i = 0; i < padded; ++i) {
    const int first = i / (2 * A::lanes) * 2 * A::lanes;
    const int width = static_cast<int>(least(2 * A::lanes, padded - first));
    uint32_t* lane = packed + static_cast<int64_t>(first) * units + (i - first);
    if (i < count) {
      if constexpr (kMixed<A>)
        factors[i] = A::pack_query(row(i), gain, line);
      else
        factors[i] = pack_row<A>(row(i), gain, line);
      for (int u = 0; u < units; ++u) lane[static_cast<int64_t>(u) * width] = line[u];
    } else {
      factors[i] = 0.0f;
      for (int u = 0; u < units; ++u) lane[static_cast<int64_t>(u) * width] = 0;
    }
  }
}

// A stride of one unit, which the compiler sees.
struct One {};

// The X units that one step of a product broadcasts: a[x * across]. With a stride that is not known, every third
// is the base of an address with an index of once or twice the stride; left alone, the compiler keeps a register
// for each and runs out of them.
template <int X, class Across> class Broadcasts {
public:
  MLA_INLINE Broadcasts(const uint32_t* a, Across across) : across_(across) {
    for (int i = 0; i < X / 3; ++i) {
      base_[i] = a + 3 * i * across;
      asm("" : "+r"(base_[i]));
    }
  }
  MLA_INLINE const uint32_t* operator[](int x) const { return base_[x / 3] + x % 3 * across_; }
  MLA_INLINE void step(int64_t along) {
#pragma GCC unroll 8
    for (int i = 0; i < X / 3; ++i) base_[i] += along;
  }

private:
  static_assert(X % 3 == 0);
  const uint32_t* base_[X / 3];
  Across across_;
};

template <int X> class Broadcasts<X, One> {
public:
  MLA_INLINE Broadcasts(const uint32_t* a, One) : a_(a) {}
  MLA_INLINE const uint32_t* operator[](int x) const { return a_ + x; }
  MLA_INLINE void step(int64_t along) { a_ += along; }

private:
  const uint32_t* a_;
};

// sums[x][g] = sum over k of packed[k][g] . spread(a[x * across + k * along]), then done(x, g, sum).
template <class A, int X, int G, class Across, class Done>
MLA_INLINE void product(const uint32_t* packed, int length, const uint32_t* a, Across across, int64_t along,
                        Done&& done) {
  using V = typename A::V;
  typename A::Sum sums[X][G] = {};
  Broadcasts<X, Across> from(a, across);
#pragma GCC unroll 2
  for (int k = 0; k < length; ++k, packed += G * A::lanes, from.step(along)) {
    typename A::Unit rows[G];
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) rows[g] = V::template load<typename A::Unit>(packed + g * A::lanes);
#pragma GCC unroll 24
    for (int x = 0; x < X; ++x) {
      const typename A::Unit one = A::spread(from[x]);
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) sums[x][g] = A::dot(sums[x][g], rows[g], one);
    }
  }
#pragma GCC unroll 24
  for (int x = 0; x < X; ++x)
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) done(x, g, A::value(sums[x][g]));
}

// A tile of keys (or values) of `A`: rows of units, and what belongs to each of them.
template <class A> struct Tile {
  int64_t stride;   // units from row to row
  uint32_t* rows;   // [kKeys][stride]
  float* factors;   // [kKeys]
  float* biases;    // [kKeys] 0, or -inf for a key that nobody sees
  float* offsets;   // [kKeys] what is to be taken from the products of a mixed row

  void carve(Carver& carver, int units) {
    stride = odd_stride(units);
    rows = carver.take<uint32_t>(kKeys * stride + 4 * A::lanes + 32);
    factors = carver.take<float>(kKeys);
    biases = carver.take<float>(kKeys);
    offsets = carver.take<float>(kKeys);
  }
  uint32_t* row(int i) { return rows + i * stride; }
  // Rows 0..count-1 from memory, all of the same types; a row without data is one that nobody sees.
  void pack(const Parts* parts, int count) {
    int some = 0;
    while (some < count && !parts[some].a.data) ++some;
    const Type type = some < count ? parts[some].a.type : Type::f32;
    if (type == Type::f32)
      pack_as<Type::f32, Type::f32>(parts, count);
    else if (type == Type::bf16)
      pack_as<Type::bf16, Type::bf16>(parts, count);
    else
      pack_as<Type::i8, Type::bf16>(parts, count);
  }

  template <Type a, Type b> void pack_as(const Parts* parts, int count) {
    float inner[kKeys];
    if constexpr (A::scaled && !kMixed<A>) {
      // Step by step over all rows: within one, each step would wait for the one before.
      for (int i = 0; i < count; ++i) {
        const Parts& x = parts[i];
        inner[i] = !x.a.data ? 0.0f
                             : x.a.factor * x.a.factor * A::template squares<a>(x.a.data, x.a.count) +
                                   x.b.factor * x.b.factor * A::template squares<b>(x.b.data, x.b.count);
      }
      for (int i = 0; i < count; ++i) {
        const float length = __builtin_sqrtf(inner[i]);
        factors[i] = length * (1.0f / kLength); // NaN where the row holds one
        inner[i] = length > 0 ? kLength / length : 0.0f;
      }
    }
    for (int i = 0; i < count; ++i) {
      const Parts& x = parts[i];
      if (!x.a.data) {
        erase(i);
        continue;
      }
      biases[i] = 0.0f;
      if constexpr (kMixed<A>) {
        factors[i] = A::pack_key(x, row(i), offsets[i]);
      } else {
        if constexpr (!A::scaled) factors[i] = inner[i] = 1.0f;
        A::template pack<a>(x.a.data, x.a.count, x.a.factor * inner[i], row(i));
        A::template pack<b>(x.b.data, x.b.count, x.b.factor * inner[i], row(i) + units_of<A>(x.a.count));
      }
    }
  }

  void erase(int i) {
    std::memset(row(i), 0, static_cast<size_t>(stride) * 4);
    factors[i] = offsets[i] = 0.0f;
    biases[i] = -kInfinity;
  }
};

// The transpose of a tile's first `width` numbers: [key / per_unit][number] units, for weighted sums.
template <class A> struct Columns {
  int64_t stride = 0;
  uint32_t* units = nullptr;

  void carve(Carver& carver, int width) {
    if constexpr (A::per_unit > 1) {
      stride = odd_stride(up(width, A::per_unit * A::lanes) + 24);
      units = carver.take<uint32_t>(kKeys / A::per_unit * stride);
    }
  }
  // `tokens` a multiple of per_unit.
  void fill(Tile<A>& tile, int tokens, int width) {
    if constexpr (A::per_unit == 1) {
      units = tile.rows;
      stride = tile.stride;
    } else {
      constexpr int numbers = A::per_unit * A::lanes;
      for (int t = 0; t < tokens; t += A::per_unit)
        for (int d = 0; d < width; d += numbers)
          A::transpose(tile.row(t) + d / A::per_unit, tile.stride, units + t / A::per_unit * stride + d);
    }
  }
};

// The running softmax of a set of rows: maximum and sum in powers of two, and the weighted sums.
struct State {
  float* maximum; // [rows]
  float* total;   // [rows]
  float* sums;    // row tile by row tile: [width, padded][row of the tile]
  int width;      // padded to a multiple of `step`

  void carve(Carver& carver, int64_t rows, int numbers, int step) {
    width = static_cast<int>(up(numbers, step));
    maximum = carver.take<float>(rows);
    total = carver.take<float>(rows);
    sums = carver.take<float>(rows * width);
  }
  void clear(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) maximum[i] = -kInfinity, total[i] = 0.0f;
    std::memset(sums, 0, static_cast<size_t>(rows) * static_cast<size_t>(width) * sizeof(float));
  }
};

// What one row tile needs besides its state.
template <class A> struct Weights {
  float* scores;   // [kKeys][row of the tile]
  uint32_t* units; // [kKeys / per_unit][row of the tile]
  float* factors;  // [row of the tile]

  void carve(Carver& carver) {
    scores = carver.take<float>(kKeys * 2 * A::lanes);
    units = carver.take<uint32_t>(kKeys * 2 * A::lanes);
    factors = carver.take<float>(2 * A::lanes);
  }
};

// The scores of `tokens` keys (a multiple of X): scores[t][row] in powers of two. `first` units of a row belong to
// its first part.
template <class A, int X, int G, class Before>
void score(const uint32_t* packed, const float* row_factors, int first, int units, const Tile<A>& keys, int tokens,
           float* scores, const Before& before) {
  using V = typename A::V;
  using F = typename A::F;
  F factors[G];
  for (int g = 0; g < G; ++g) factors[g] = V::template load<F>(row_factors + g * A::lanes);
  const int length = kMixed<A> ? first : units;
  for (int t = 0; t < tokens; t += X) {
    before(t, X);
    const uint32_t* rows = keys.rows + t * keys.stride;
    float* to = scores + t * G * A::lanes;
    product<A, X, G>(packed, length, rows, keys.stride, 1, [&](int x, int g, F value) MLA_INLINE_LAMBDA {
      if constexpr (kMixed<A>) value = value - keys.offsets[t + x];
      if constexpr (A::scaled) value = value * (factors[g] * keys.factors[t + x]);
      V::store(to + (x * G + g) * A::lanes, value + keys.biases[t + x]);
    });
    if constexpr (kMixed<A>)
      product<typename A::Rest, X, G>(packed + first * G * A::lanes, units - first, rows + first, keys.stride, 1,
                                      [&](int x, int g, F value) MLA_INLINE_LAMBDA {
                                        float* at = to + (x * G + g) * A::lanes;
                                        V::store(at, V::template load<F>(at) + value);
                                      });
  }
}

// Scores -> probabilities relative to the running maximum, as units. `limits`: keys below it are seen, per row,
// counted from the tile's first key; null where all rows see all keys. `value_factors`: those of the rows that
// the weighted sum will run over.
template <class A, int G>
void soften(int tokens, const float* value_factors, const int32_t* limits, int64_t row, State& state,
            float* sums, Weights<A>& weights) {
  using V = typename A::V;
  using F = typename A::F;
  using I = typename V::I;
  constexpr int lanes = A::lanes;
  for (int g = 0; g < G; ++g) {
    float* scores = weights.scores + g * lanes;
    F top = V::all(-kInfinity);
    if (limits) {
      const I limit = V::template load<I>(limits + g * lanes);
      for (int t = 0; t < tokens; ++t) {
        const F x = V::template load<F>(scores + t * G * lanes);
        const F seen = (I{} + t) < limit ? x : V::all(-kInfinity);
        V::store(scores + t * G * lanes, seen);
        top = V::max(top, seen);
      }
    } else {
      for (int t = 0; t < tokens; ++t) top = V::max(top, V::template load<F>(scores + t * G * lanes));
    }
    // The maximum only keeps exp2 in range: it is let rise when it must, by 2^8 or from nothing.
    const F old = V::template load<F>(state.maximum + row + g * lanes);
    const F now = top > old + 8.0f ? top : old;
    const F finite = now == -kInfinity ? F{} : now;
    F total = V::template load<F>(state.total + row + g * lanes);
    if (V::any(now != old)) {
      const F shrink = V::exp2(old - finite);
      total *= shrink;
      V::store(state.maximum + row + g * lanes, now);
      for (int d = 0; d < state.width; ++d) {
        float* at = sums + (static_cast<int64_t>(d) * G + g) * lanes;
        V::store(at, V::template load<F>(at) * shrink);
      }
    }
    F weighted{};
    for (int t = 0; t < tokens; ++t) {
      F e = V::exp2(V::template load<F>(scores + t * G * lanes) - finite);
      total += e;
      if constexpr (A::scaled) {
        e *= value_factors[t];
        weighted = A::collect(weighted, e);
      }
      V::store(scores + t * G * lanes, e);
    }
    V::store(state.total + row + g * lanes, total);
    F inner = V::all(1.0f);
    if constexpr (A::scaled) {
      // Below the smallest normal number its inverse would be infinite.
      inner = weighted > 1e-37f ? A::limit / weighted : F{};
      V::store(weights.factors + g * lanes, weighted / A::limit);
    }
    for (int t = 0; t < tokens; t += A::per_unit) {
      F p[A::per_unit];
      for (int i = 0; i < A::per_unit; ++i)
        p[i] = V::template load<F>(scores + (t + i) * G * lanes) * inner;
      V::store(weights.units + (t / A::per_unit * G + g) * lanes, A::weights(p));
    }
  }
}

// sums[d][row] += sum over keys of probability * value, for every number d of the width.
template <class A, int X, int G>
void weigh(int tokens, const Columns<A>& columns, int width, float* sums, const Weights<A>& weights) {
  using V = typename A::V;
  using F = typename A::F;
  F factors[G];
  for (int g = 0; g < G; ++g) factors[g] = V::template load<F>(weights.factors + g * A::lanes);
  for (int d = 0; d < width; d += X)
    product<A, X, G>(weights.units, tokens / A::per_unit, columns.units + d, One{}, columns.stride,
                     [&](int x, int g, F value) MLA_INLINE_LAMBDA {
                       float* at = sums + (static_cast<int64_t>(d + x) * G + g) * A::lanes;
                       if constexpr (A::scaled) value = value * factors[g];
                       V::store(at, V::template load<F>(at) + value);
                     });
}

// One row tile against one tile of keys.
template <class A, int X, int G, class Before>
void attend(const uint32_t* packed, const float* row_factors, int first, int units, const Tile<A>& keys,
            const float* value_factors, const Columns<A>& values, int tokens, const int32_t* limits, int64_t row,
            State& state, Weights<A>& weights, const Before& before) {
  float* sums = state.sums + row * state.width;
  score<A, X, G>(packed, row_factors, first, units, keys, tokens, weights.scores, before);
  soften<A, G>(tokens, value_factors, limits, row, state, sums, weights);
  weigh<A, X, G>(tokens, values, state.width, sums, weights);
}

} // namespace
} // namespace mla
