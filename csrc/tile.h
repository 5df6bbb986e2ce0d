// The steps of attention over one tile of keys, for one tile of query rows, in any arithmetic.
//
// Rows lie in lanes: a row tile is one or two vectors wide (`groups`), and holds lanes * groups rows. Packed
// rows, scores, probabilities and sums are all [something][row of the tile], so that every step of the softmax
// is vertical and nothing is ever summed across a vector.
#pragma once

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

// A run of numbers in memory that becomes one part of a packed row.
struct Part {
  const char* data;
  Type type;
  int count;
  float factor;
};

struct Parts {
  Part a, b;
};

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

// One row of two parts as units, the second part from its own unit on. Writes whole vectors: up to 2 * lanes
// units beyond the row. Returns the factor of the row; `gain` multiplies every number.
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
      const Parts parts = row(i);
      factors[i] = pack_row<A>(parts, gain, line);
      for (int u = 0; u < units; ++u) lane[static_cast<int64_t>(u) * width] = line[u];
    } else {
      factors[i] = 0.0f;
      for (int u = 0; u < units; ++u) lane[static_cast<int64_t>(u) * width] = 0;
    }
  }
}

// sums[x][g] = sum over k of packed[k][g] . spread(a[x * across + k * along]), then done(x, g, sum).
template <class A, int X, int G, class Across, class Done>
MLA_INLINE void product(const uint32_t* packed, int length, const uint32_t* a, Across across, int64_t along,
                        Done&& done) {
  using V = typename A::V;
  typename A::Sum sums[X][G] = {};
#pragma GCC unroll 2
  for (int k = 0; k < length; ++k, packed += G * A::lanes, a += along) {
    typename A::Unit rows[G];
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) rows[g] = V::template load<typename A::Unit>(packed + g * A::lanes);
#pragma GCC unroll 24
    for (int x = 0; x < X; ++x) {
      const typename A::Unit one = A::spread(a + x * across);
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) sums[x][g] = A::dot(sums[x][g], rows[g], one);
    }
  }
#pragma GCC unroll 24
  for (int x = 0; x < X; ++x)
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) done(x, g, A::value(sums[x][g]));
}

struct One { // a stride of one unit that the compiler sees
  constexpr operator int64_t() const { return 1; }
};
MLA_INLINE constexpr int64_t operator*(int x, One) { return x; }

// A tile of keys (or values) of `A`: rows of units, and what belongs to each of them.
template <class A> struct Tile {
  int64_t stride;   // units from row to row
  uint32_t* rows;   // [kKeys][stride]
  float* factors;   // [kKeys]
  float* biases;    // [kKeys] 0, or -inf for a key that nobody sees

  void carve(Carver& carver, int units) {
    stride = odd_stride(units);
    rows = carver.take<uint32_t>(kKeys * stride + 4 * A::lanes + 32);
    factors = carver.take<float>(kKeys);
    biases = carver.take<float>(kKeys);
  }
  uint32_t* row(int i) { return rows + i * stride; }
  void erase(int i) {
    std::memset(row(i), 0, static_cast<size_t>(stride) * 4);
    factors[i] = 0.0f;
    biases[i] = -kInfinity;
  }
};

// The transpose of a tile's first `width` numbers: [key / per_unit][number] units, for weighted sums.
template <class A> struct Columns {
  int64_t stride = 0;
  uint32_t* units = nullptr;

  void carve(Carver& carver, int width) {
    if constexpr (A::per_unit > 1) {
      stride = odd_stride(up(width, 2 * A::lanes) + 24);
      units = carver.take<uint32_t>(kKeys / A::per_unit * stride);
    }
  }
  // `tokens` a multiple of per_unit.
  void fill(Tile<A>& tile, int tokens, int width) {
    using V = typename A::V;
    using Unit = typename A::Unit;
    if constexpr (A::per_unit == 1) {
      units = tile.rows;
      stride = tile.stride;
    } else {
      for (int t = 0; t < tokens; t += 2) {
        const uint32_t *row0 = tile.row(t), *row1 = tile.row(t + 1);
        uint32_t* to = units + t / 2 * stride;
        for (int u = 0; 2 * u < width; u += A::lanes) {
          Unit first, second;
          A::interleave(V::template load<Unit>(row0 + u), V::template load<Unit>(row1 + u), first, second);
          V::store(to + 2 * u, first);
          V::store(to + 2 * u + A::lanes, second);
        }
      }
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

// The scores of `tokens` keys (a multiple of X): scores[t][row] in powers of two.
template <class A, int X, int G, class Before>
void score(const uint32_t* packed, const float* row_factors, int units, const Tile<A>& keys, int tokens,
           float* scores, const Before& before) {
  using V = typename A::V;
  using F = typename A::F;
  F factors[G];
  for (int g = 0; g < G; ++g) factors[g] = V::template load<F>(row_factors + g * A::lanes);
  for (int t = 0; t < tokens; t += X) {
    before(t, X);
    product<A, X, G>(packed, units, keys.rows + t * keys.stride, keys.stride, 1,
                     [&](int x, int g, F value) MLA_INLINE_LAMBDA {
                       if constexpr (A::scaled) value = value * (factors[g] * keys.factors[t + x]);
                       V::store(scores + ((t + x) * G + g) * A::lanes, value + keys.biases[t + x]);
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
        weighted += e;
      }
      V::store(scores + t * G * lanes, e);
    }
    V::store(state.total + row + g * lanes, total);
    // Integers: the probabilities of a row and tile add up to 32767, so that no sum of products overflows.
    F inner = V::all(1.0f);
    if constexpr (A::scaled) {
      inner = weighted > 0.0f ? kLength / weighted : F{};
      V::store(weights.factors + g * lanes, weighted / kLength);
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
void attend(const uint32_t* packed, const float* row_factors, int units, const Tile<A>& keys,
            const float* value_factors, const Columns<A>& values, int tokens, const int32_t* limits, int64_t row,
            State& state, Weights<A>& weights, const Before& before) {
  float* sums = state.sums + row * state.width;
  score<A, X, G>(packed, row_factors, units, keys, tokens, weights.scores, before);
  soften<A, G>(tokens, value_factors, limits, row, state, sums, weights);
  weigh<A, X, G>(tokens, values, state.width, sums, weights);
}

} // namespace
} // namespace mla
