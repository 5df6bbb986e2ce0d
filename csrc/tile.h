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

// A stride that is an odd number of cache lines: whole vectors are stored within one, and walking along it does not
// fall into few sets of a cache.
inline int64_t odd_stride(int64_t units) { return up(units, 16) | 16; }

template <class A> constexpr bool kSplit = !std::is_void_v<typename A::Rest>;

// Units of a row of two parts, the second from its own unit on.
template <class A> constexpr int units_of(int a, int b) {
  if constexpr (kSplit<A>)
    return units_of<A>(a) + units_of<typename A::Rest>(b);
  else
    return units_of<A>(a) + units_of<A>(b);
}

// The same with the second digits, if there are any.
template <class A> constexpr int query_units_of(int a, int b) {
  if constexpr (kSplit<A>)
    return units_of<A>(a, b) + (A::second > 0 ? units_of<A>(a) : 0);
  else
    return units_of<A>(a, b);
}

// Rows of queries or of output channels, in lanes.
template <class A> struct Lanes {
  uint32_t* packed; // row tile by row tile: [unit][row of the tile]
  float* factors;   // [rows] of the first part
  float* rests;     // [rows] of the second part
  bool* second;     // [rows] whether the second digits matter
  uint32_t* line;   // room for one row
  int units;        // of a row

  void carve(Carver& carver, int64_t rows, int row_units) {
    units = row_units;
    packed = carver.take<uint32_t>(up(rows, A::lanes) * units);
    factors = carver.take<float>(up(rows, A::lanes));
    rests = carver.take<float>(up(rows, A::lanes));
    second = carver.take<bool>(up(rows, A::lanes));
    line = carver.take<uint32_t>(units + 4 * A::lanes);
  }
  const uint32_t* tile(int row) const { return packed + static_cast<int64_t>(row) * units; }

  // row(i) gives the parts of row i; lanes beyond `count` are zero. `gain` multiplies every number.
  template <class Row> void pack(int count, float gain, Row&& row) {
    const int padded = static_cast<int>(up(count, A::lanes));
    for (int i = 0; i < padded; ++i) {
      const int first = i / (2 * A::lanes) * 2 * A::lanes;
      const int width = static_cast<int>(least(2 * A::lanes, padded - first));
      uint32_t* lane = packed + static_cast<int64_t>(first) * units + (i - first);
      factors[i] = rests[i] = 0.0f;
      second[i] = false;
      if (i >= count) {
        for (int u = 0; u < units; ++u) lane[static_cast<int64_t>(u) * width] = 0;
        continue;
      }
      const Parts parts = row(i);
      with(parts.a.type, [&](auto type) {
        if constexpr (type() == Type::i8) {
          // no query is
        } else if constexpr (kSplit<A>) {
          const Factors own = A::template pack_query<type()>(parts, line);
          factors[i] = own.first * gain;
          rests[i] = own.rest * gain;
          second[i] = own.second;
        } else {
          mla::pack<A, type()>(parts.a, gain, line);
          mla::pack<A, type()>(parts.b, gain, line + units_of<A>(parts.a.count));
        }
      });
      for (int u = 0; u < units; ++u) lane[static_cast<int64_t>(u) * width] = line[u];
    }
  }
};

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

// What a product calls at every step to fetch memory that will be read later, here nothing.
struct NoAhead {
  void step() {}
};

// sums[x][g] = sum over k of packed[k][g] . spread(a[x * across + k * along]), then done(x, g, sum).
template <class A, int X, int G, class Across, class Ahead, class Done>
MLA_INLINE void product(const uint32_t* packed, int length, const uint32_t* a, Across across, int64_t along,
                        Ahead& ahead, Done&& done) {
  using V = typename A::V;
  typename A::Sum sums[X][G] = {};
  Broadcasts<X, Across> from(a, across);
#pragma GCC unroll 2
  for (int k = 0; k < length; ++k, packed += G * A::lanes, from.step(along)) {
    ahead.step();
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
  int64_t stride; // units from row to row
  uint32_t* rows; // [kKeys][stride]
  float* factors; // [kKeys] of the first part
  float* rests;   // [kKeys] of the second part
  float* offsets; // [kKeys] what is to be taken from products with the first part
  float* biases;  // [kKeys] 0, or -inf for a key that nobody sees

  void carve(Carver& carver, int units) {
    stride = odd_stride(units);
    rows = carver.take<uint32_t>(kKeys * stride + 4 * A::lanes + 32);
    factors = carver.take<float>(kKeys);
    rests = carver.take<float>(kKeys);
    offsets = carver.take<float>(kKeys);
    biases = carver.take<float>(kKeys);
  }
  uint32_t* row(int i) const { return rows + i * stride; }
  // Rows 0..count-1, whose first parts are of `type`. row(i, take), called in order, hands the parts to take(parts) and
  // returns true, or false for a row that nobody sees; after(i) follows every row.
  template <class Row, class After> void pack(Type type, int count, Row&& row, After&& after) {
    with(type, [&](auto constant) {
      for (int i = 0; i < count; ++i) {
        const bool seen = row(i, [&](const Parts& parts) MLA_INLINE_LAMBDA { pack_row<constant()>(i, parts); });
        if (!seen) erase(i);
        after(i);
      }
    });
  }

private:
  template <Type type> MLA_INLINE void pack_row(int i, const Parts& parts) {
    biases[i] = 0.0f;
    if constexpr (!kSplit<A>) {
      mla::pack<A, type>(parts.a, 1.0f, row(i));
      mla::pack<A, beside(type)>(parts.b, 1.0f, row(i) + units_of<A>(parts.a.count));
    } else if constexpr (A::holds(type)) {
      const Factors own = A::template pack_key<type>(parts, row(i));
      factors[i] = own.first;
      rests[i] = own.rest;
      offsets[i] = own.offset;
    }
  }
  void erase(int i) {
    std::memset(row(i), 0, static_cast<size_t>(stride) * 4);
    factors[i] = rests[i] = offsets[i] = 0.0f;
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
  // Those of the last rows up to i, where these make a group: to be called after every row, so that a group is read
  // again while it lies in the nearest cache. Row by row it would wait for what was just written.
  MLA_INLINE void fill(const Tile<A>& tile, int i, int width) {
    constexpr int group = 12; // divides the rows of every tile
    if constexpr (A::per_unit == 1) {
      units = tile.rows;
      stride = tile.stride;
    } else if (i % group == group - 1) {
      constexpr int numbers = A::per_unit * A::lanes;
      const int64_t across = tile.stride;
      for (int t = i + 1 - group; t < i; t += A::per_unit) {
        const uint32_t* from = tile.row(t);
        uint32_t* to = units + t / A::per_unit * stride;
        for (int d = 0; d < width; d += numbers, from += A::lanes, to += numbers) A::transpose(from, across, to);
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

// The scores of `tokens` keys (a multiple of X): scores[t][row] in powers of two. `first` units of a row belong to
// its first part.
template <class A, int X, int G, class Ahead>
void score(const Lanes<A>& queries, int row, int first, const Tile<A>& keys, int tokens, float* scores, Ahead& ahead) {
  using V = typename A::V;
  using F = typename A::F;
  const uint32_t* packed = queries.tile(row);
  F factors[G], rests[G];
  for (int g = 0; g < G; ++g) {
    factors[g] = V::template load<F>(queries.factors + row + g * A::lanes);
    rests[g] = V::template load<F>(queries.rests + row + g * A::lanes);
  }
  int length = queries.units, rest = 0;
  bool finer = false;
  if constexpr (kSplit<A>) {
    length = first;
    rest = queries.units - first - (A::second > 0 ? first : 0);
    for (int i = 0; i < G * A::lanes; ++i) finer |= queries.second[row + i];
  }
  for (int t = 0; t < tokens; t += X) {
    const uint32_t* rows = keys.rows + t * keys.stride;
    float* to = scores + t * G * A::lanes;
    product<A, X, G>(packed, length, rows, keys.stride, 1, ahead, [&](int x, int g, F value) MLA_INLINE_LAMBDA {
      if constexpr (kSplit<A>) {
        if constexpr (A::shifted) value = value - keys.offsets[t + x];
        value = value * (factors[g] * keys.factors[t + x]);
      }
      V::store(to + (x * G + g) * A::lanes, value + keys.biases[t + x]);
    });
    if constexpr (kSplit<A>) {
      const auto add = [&](int x, int g, F value) MLA_INLINE_LAMBDA {
        float* at = to + (x * G + g) * A::lanes;
        V::store(at, V::template load<F>(at) + value);
      };
      product<typename A::Rest, X, G>(packed + first * G * A::lanes, rest, rows + first, keys.stride, 1, ahead,
                                      [&](int x, int g, F value)
                                          MLA_INLINE_LAMBDA { add(x, g, value * (rests[g] * keys.rests[t + x])); });
      if constexpr (A::second > 0) {
        if (finer)
          product<A, X, G>(packed + (first + rest) * G * A::lanes, first, rows, keys.stride, 1, ahead,
                           [&](int x, int g, F value) MLA_INLINE_LAMBDA {
                             value = value - keys.offsets[t + x];
                             add(x, g, value * (factors[g] * (1.0f / A::second) * keys.factors[t + x]));
                           });
      }
    }
  }
}

// Scores -> probabilities relative to the running maximum, as units. `limits`: keys below it are seen, per row,
// counted from the tile's first key; null where all rows see all keys. `value_factors`: those of the rows that
// the weighted sum will run over.
template <class A, int G> void soften(int tokens, const float* value_factors, const int32_t* limits, int64_t row,
                                      State& state, float* sums, Weights<A>& weights) {
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
      if constexpr (kSplit<A>) {
        e *= value_factors[t];
        weighted = A::collect(weighted, e);
      }
      V::store(scores + t * G * lanes, e);
    }
    V::store(state.total + row + g * lanes, total);
    F inner = V::all(1.0f);
    if constexpr (kSplit<A>) {
      // Below that the quotient would be infinite.
      inner = weighted > 1e-34f ? A::limit / weighted : F{};
      V::store(weights.factors + g * lanes, weighted / A::limit);
    }
    for (int t = 0; t < tokens; t += A::per_unit) {
      F p[A::per_unit];
      for (int i = 0; i < A::per_unit; ++i) p[i] = V::template load<F>(scores + (t + i) * G * lanes) * inner;
      V::store(weights.units + (t / A::per_unit * G + g) * lanes, A::weights(p));
    }
  }
}

// sums[d][row] += sum over keys of probability * value, for every number d of the width.
template <class A, int X, int G, class Ahead>
void weigh(int tokens, const Columns<A>& columns, int width, float* sums, const Weights<A>& weights, Ahead& ahead) {
  using V = typename A::V;
  using F = typename A::F;
  F factors[G];
  for (int g = 0; g < G; ++g) factors[g] = V::template load<F>(weights.factors + g * A::lanes);
  for (int d = 0; d < width; d += X)
    product<A, X, G>(weights.units, tokens / A::per_unit, columns.units + d, One{}, columns.stride, ahead,
                     [&](int x, int g, F value) MLA_INLINE_LAMBDA {
                       float* at = sums + (static_cast<int64_t>(d + x) * G + g) * A::lanes;
                       if constexpr (kSplit<A>) value = value * factors[g];
                       V::store(at, V::template load<F>(at) + value);
                     });
}

// One row tile against one tile of keys.
template <class A, int X, int G, class Ahead> void attend(const Lanes<A>& queries, int row, int first,
                                                          const Tile<A>& keys, const float* value_factors,
                                                          const Columns<A>& values, int tokens, const int32_t* limits,
                                                          State& state, Weights<A>& weights, Ahead& ahead) {
  float* sums = state.sums + static_cast<int64_t>(row) * state.width;
  score<A, X, G>(queries, row, first, keys, tokens, weights.scores, ahead);
  soften<A, G>(tokens, value_factors, limits, row, state, sums, weights);
  weigh<A, X, G>(tokens, values, state.width, sums, weights, ahead);
}

} // namespace
} // namespace mla
