// The steps of attention over one tile of keys, for one tile of query rows, in any arithmetic.
//
// Rows lie in lanes: a row tile is one or two vectors wide (`groups`), and holds lanes * groups rows. Scores and
// probabilities are all [something][row of the tile], and so are packed rows but for the last few (Lanes): every step
// of the softmax is vertical. In the weighted sums the numbers of a value lie in lanes: a row of sums is a row of the
// output, and lanes without a row cost nothing there.
#pragma once

#include "operands.h"

namespace mla {
namespace {

// The running softmax of a set of rows: maximum and sum in powers of two, and the weighted sums.
struct State {
  float* maximum; // [rows]
  float* total;   // [rows]
  float* sums;    // [rows][line], numbers in the order of place_of
  int width;      // padded to whole pairs of vectors and whole chunks
  int64_t line;   // numbers from row to row

  template <class A> static int width_of(int numbers) {
    return static_cast<int>(up(numbers, A::lanes * (A::per_unit > 2 ? A::per_unit : 2)));
  }
  template <class A> void carve(Carver& carver, int64_t rows, int numbers) {
    width = width_of<A>(numbers);
    maximum = carver.take<float>(rows);
    total = carver.take<float>(rows);
    line = kMatrix<A> ? odd_stride(width) : width; // many rows are read side by side there
    sums = carver.take<float>(rows * line);
  }
  void clear(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) maximum[i] = -kInfinity, total[i] = 0.0f;
    std::memset(sums, 0, static_cast<size_t>(rows * line) * sizeof(float));
  }
  float* row(int64_t i) const { return sums + i * line; }
};

// What weighted sums multiply values by.
struct Shares {
  const uint32_t* units; // [keys / per_unit][row of the tile]
  const float* factors;  // [row of the tile], of integers
};

// Rows that meet the same interleaved values, in matrix registers.
constexpr int kTogether = 256;

// What one row tile needs besides its state.
template <class A> struct Weights {
  float* scores;    // [kKeys][row of the tile]
  uint32_t* units;  // [kKeys / per_unit][row of the tile]
  float* factors;   // [row of the tile]
  uint32_t* digits; // second ones of the units, and their factors, where the arithmetic has any
  float* parts;
  // In matrix registers, where factors and parts are those of kTogether rows: these rows' units and second digits, and
  // one chunk of values.
  uint32_t *shares, *more_shares, *values;

  void carve(Carver& carver) {
    constexpr int rows = kMatrix<A> ? kTogether : 2 * A::lanes;
    scores = carver.take<float>(kKeys<A> * 2 * A::lanes);
    units = carver.take<uint32_t>(kKeys<A> * 2 * A::lanes);
    factors = carver.take<float>(rows);
    digits = carver.take<uint32_t>(kDigits<A> ? kKeys<A> * 2 * A::lanes : 0);
    parts = carver.take<float>(kDigits<A> ? rows : 0);
    shares = carver.take<uint32_t>(kMatrix<A> ? rows * kKeys<A> / A::per_unit : 0);
    more_shares = carver.take<uint32_t>(kMatrix<A> && kDigits<A> ? rows * kKeys<A> / A::per_unit : 0);
    values = carver.take<uint32_t>(kMatrix<A> ? kKeys<A> * A::lanes : 0);
  }
};

// The scores of `tokens` keys (a multiple of X): scores[t][row] in powers of two. `first` units of a row belong to
// its first part. `fours`: how the queries are packed.
template <class A, int X, int G, int fours, class Ahead>
void score(const Lanes<A>& queries, int row, int first, const Tile<A>& keys, int tokens, float* scores, Ahead& ahead) {
  using V = typename A::V;
  using F = typename A::F;
  // Of `length` units from `unit` on, with X keys from `keys_from` on.
  const auto multiply = [&](auto arithmetic, int unit, int length, const uint32_t* keys_from,
                            auto&& done) MLA_INLINE_LAMBDA {
    using B = decltype(arithmetic);
    using Step = std::integral_constant<int, (fours ? fours : G) * A::lanes>;
    if constexpr (fours > 0) {
      F sums[fours];
      product<B, X, fours, false, true>(Ready<B, Step>{queries.tile(row) + unit * 4 * fours, {}}, length / 4, keys_from,
                                        keys.stride, 4, ahead, [&](int x, int g, F value) MLA_INLINE_LAMBDA {
                                          sums[g] = value;
                                          if (g == fours - 1) done(x, 0, V::sums_of_four(sums));
                                        });
    } else {
      product<B, X, G>(Ready<B, Step>{queries.tile(row) + unit * G * A::lanes, {}}, length, keys_from, keys.stride, 1,
                       ahead, done);
    }
  };
  F factors[G], rests[G];
  for (int g = 0; g < G; ++g) {
    factors[g] = V::template load<F>(queries.factors + row + g * A::lanes);
    rests[g] = V::template load<F>(queries.rests + row + g * A::lanes);
  }
  int length = queries.units, rest = 0;
  bool finer = false;
  if constexpr (kSplit<A>) {
    length = first;
    rest = queries.units - first - (kDigits<A> ? first : 0);
    for (int i = 0; i < G * A::lanes; ++i) finer |= queries.second[row + i];
  }
  for (int t = 0; t < tokens; t += X) {
    const uint32_t* rows = keys.rows + t * keys.stride;
    float* to = scores + t * G * A::lanes;
    multiply(A(), 0, length, rows, [&](int x, int g, F value) MLA_INLINE_LAMBDA {
      if constexpr (kSplit<A>) {
        if constexpr (A::shifted) value = value - keys.offsets[t + x];
        value = value * (factors[g] * keys.factors[t + x]);
      } else {
        value = value * factors[g];
      }
      V::store(to + (x * G + g) * A::lanes, value);
    });
    if constexpr (kSplit<A>) {
      const auto add = [&](int x, int g, F value) MLA_INLINE_LAMBDA {
        float* at = to + (x * G + g) * A::lanes;
        V::store(at, V::template load<F>(at) + value);
      };
      multiply(typename A::Rest(), first, rest, rows + first,
               [&](int x, int g, F value) MLA_INLINE_LAMBDA { add(x, g, value * (rests[g] * keys.rests[t + x])); });
      if constexpr (kDigits<A>) {
        if (finer)
          multiply(A(), first + rest, first, rows, [&](int x, int g, F value) MLA_INLINE_LAMBDA {
            value = value - keys.offsets[t + x];
            add(x, g, value * (factors[g] * (1.0f / A::second) * keys.factors[t + x]));
          });
      }
    }
    // In place of what was computed, which NaN in a query would have made NaN.
    for (int x = 0; x < X; ++x) {
      if (!keys.hidden[t + x]) continue;
      for (int g = 0; g < G; ++g) V::store(to + (x * G + g) * A::lanes, V::all(-kInfinity));
    }
  }
}

// The scores of one row tile, whichever way its rows are packed. By fours fewer keys go at a time: as many, in threes,
// as registers hold the sums of.
template <class A, int X, int G, class Ahead> void
score_tile(const Lanes<A>& queries, int row, int first, const Tile<A>& keys, int tokens, float* scores, Ahead& ahead) {
  if constexpr (kFours<A> && G == 1)
    if (row >= queries.whole)
      return with_count<kMostFours>(queries.fours, [&](auto fours) MLA_INLINE_LAMBDA {
        score<A, (X >> (fours() - 1)), 1, fours()>(queries, row, first, keys, tokens, scores, ahead);
      });
  score<A, X, G, 0>(queries, row, first, keys, tokens, scores, ahead);
}

// Whether a tile of keys needs more digits for its probabilities: one key outweighs the others, whose share would be
// rounded away, and the tile counts beside those before it.
template <class A, class F> MLA_INLINE bool needs_digits(F largest, F sum, F top, F total) {
  return A::V::any((sum < largest * A::peak) & (total < top * A::counts));
}

// The largest score of every row of a vector; those of keys from its limit on become -infinity.
template <class A, int G> MLA_INLINE auto largest(int tokens, const int32_t* limits, float* scores) {
  using V = typename A::V;
  using F = typename A::F;
  using I = typename V::I;
  F top = V::all(-kInfinity);
  if (!limits) {
    for (int t = 0; t < tokens; ++t) top = V::max(top, V::template load<F>(scores + t * G * A::lanes));
    return top;
  }
  const I limit = V::template load<I>(limits);
  for (int t = 0; t < tokens; ++t) {
    float* at = scores + t * G * A::lanes;
    const F seen = (I{} + t) < limit ? V::template load<F>(at) : V::all(-kInfinity);
    V::store(at, seen);
    top = V::max(top, seen);
  }
  return top;
}

// Probabilities, times the factor of their row -> units, and second digits where they are needed. Where they are not,
// what rounding takes from one key is added to the next but few: beside a large one, many small ones would all become
// zero. (To the very next one, each would have to wait for the one before.)
template <class A, int G, class F>
MLA_INLINE void write_units(int tokens, const F (&inner)[G], bool finer, Weights<A>& weights) {
  using V = typename A::V;
  constexpr int lanes = A::lanes;
  F carry[G][A::per_unit] = {};
  for (int t = 0; t < tokens; t += A::per_unit)
    for (int g = 0; g < G; ++g) {
      const int64_t to = (t / A::per_unit * G + g) * lanes;
      F p[A::per_unit];
      for (int i = 0; i < A::per_unit; ++i)
        p[i] = V::template load<F>(weights.scores + ((t + i) * G + g) * lanes) * inner[g];
      if constexpr (kDigits<A>) {
        if (finer) {
          F more[A::per_unit];
          for (int i = 0; i < A::per_unit; ++i) more[i] = A::split(p[i]);
          V::store(weights.digits + to, A::weights(more));
        } else {
          for (int i = 0; i < A::per_unit; ++i) p[i] = A::whole(p[i], carry[g][i]);
        }
      }
      V::store(weights.units + to, A::weights(p));
    }
}

// Scores -> probabilities relative to the running maximum, as units. `limits`: keys below it are seen, per row,
// counted from the tile's first key; null where all rows see all keys. `value_factors`: those of the rows that
// the weighted sum will run over. Returns whether the second digits are needed.
template <class A, int G> bool soften(int tokens, const float* value_factors, const int32_t* limits, int64_t row,
                                      State& state, Weights<A>& weights) {
  using V = typename A::V;
  using F = typename A::F;
  constexpr int lanes = A::lanes;
  [[maybe_unused]] F inner[G];
  bool finer = false;
  for (int g = 0; g < G; ++g) {
    float* scores = weights.scores + g * lanes;
    const F top = largest<A, G>(tokens, limits ? limits + g * lanes : nullptr, scores);
    // The maximum only keeps exp2 in range: it is let rise when it must, by 2^8 or from nothing.
    const F old = V::template load<F>(state.maximum + row + g * lanes);
    const F now = top > old + 8.0f ? top : old;
    const F finite = now == -kInfinity ? F{} : now;
    F total = V::template load<F>(state.total + row + g * lanes);
    if (V::any(now != old)) {
      const F shrink = V::exp2(old - finite);
      total *= shrink;
      V::store(state.maximum + row + g * lanes, now);
      for (int i = 0; i < lanes; ++i)
        if (shrink[i] != 1.0f) {
          float* sums = state.row(row + g * lanes + i);
          for (int d = 0; d < state.width; d += lanes) V::store(sums + d, V::template load<F>(sums + d) * shrink[i]);
        }
    }
    // By themselves first: beside the total of a long context a key's share would lose its last digits.
    F sum{}, weighted{}, all{};
    for (int t = 0; t < tokens; t += A::per_unit) {
      F e[A::per_unit];
      for (int i = 0; i < A::per_unit; ++i) {
        float* at = scores + (t + i) * G * lanes;
        e[i] = V::exp2(V::template load<F>(at) - finite);
        sum += e[i];
        if constexpr (kSplit<A>) {
          // A hidden key's factor may be NaN; where the score is, the total says so, and integers have no NaN.
          e[i] = e[i] > 0.0f ? e[i] * value_factors[t + i] : F{};
          weighted = A::collect(weighted, e[i]);
          if constexpr (kDigits<A>) all += e[i];
          V::store(at, e[i]);
        }
      }
      if constexpr (!kSplit<A>) V::store(weights.units + (t / A::per_unit * G + g) * lanes, A::weights(e));
    }
    total += sum;
    V::store(state.total + row + g * lanes, total);
    if constexpr (kSplit<A>) {
      // Below that the quotient would be infinite.
      inner[g] = weighted > 1e-34f ? A::limit / weighted : F{};
      V::store(weights.factors + g * lanes, weighted / A::limit);
      if constexpr (kDigits<A>) {
        V::store(weights.parts + g * lanes, weighted / (A::limit * A::limit));
        finer |= needs_digits<A>(weighted, all, V::exp2(top - finite), total);
      }
    }
  }
  if constexpr (kSplit<A>) write_units<A, G>(tokens, inner, finer, weights);
  return finer;
}

// X rows from `i` of a row tile that is `lanes` wide and begins with `row`: sums += probability * value, over the keys
// and 2 * A::lanes numbers from `d` on.
template <class A, int X, class Values, class Ahead> void weigh_rows(int tokens, Values values, int d, int lanes, int i,
                                                                     int64_t row, State& state, const Shares& shares,
                                                                     Ahead& ahead) {
  using V = typename A::V;
  using F = typename A::F;
  product<A, X, 2, true>(values, tokens / A::per_unit, shares.units + i, One{}, lanes, ahead,
                         [&](int x, int g, F value) MLA_INLINE_LAMBDA {
                           float* at = state.row(row + i + x) + d + g * A::lanes;
                           if constexpr (kSplit<A>) value = value * shares.factors[i + x];
                           V::store(at, V::template load<F>(at) + value);
                         });
}

// As many rows as registers hold the sums of, beside two vectors of values.
template <class A> constexpr int kSums = A::lanes == 16 ? 12 : 4;

// The same for the first `rows` rows of the tile, in as few pieces as there must be, which are about alike.
template <class A, class Values, class Ahead> void weigh_numbers(int tokens, Values values, int d, int rows, int lanes,
                                                                 int64_t row, State& state, const Shares& shares,
                                                                 Ahead& ahead) {
  for (int i = 0, pieces = (rows + kSums<A> - 1) / kSums<A>, count = 0; pieces > 0; --pieces, i += count) {
    // Whole fours: 32 rows go 3% faster by 12, 12 and 8 than by 11, 11 and 10.
    count = pieces > 1 ? static_cast<int>(up((rows - i + pieces - 1) / pieces, 4)) : rows - i;
    with_count<kSums<A>>(count, [&](auto x) MLA_INLINE_LAMBDA {
      weigh_rows<A, x()>(tokens, values, d, lanes, i, row, state, shares, ahead);
    });
  }
}

// The same for all numbers.
template <class A, class Ahead> void weigh(int tokens, const Tile<A>& values, int rows, int lanes, int64_t row,
                                           State& state, const Shares& shares, Ahead& ahead) {
  constexpr int both = 2 * A::lanes, chunk = A::per_unit * A::lanes;
  for (int d = 0; d < state.width; d += both) {
    const auto all = [&](auto vectors) MLA_INLINE_LAMBDA {
      weigh_numbers<A>(tokens, vectors, d, rows, lanes, row, state, shares, ahead);
    };
    if constexpr (A::per_unit == 1)
      all(Ready<A, int64_t>{values.rows + d, values.stride});
    else if (d % chunk == 0)
      all(Interleaved<A, 0>{values.rows + d / A::per_unit, values.stride});
    else if constexpr (chunk > both)
      all(Interleaved<A, 1>{values.rows + (d - both) / A::per_unit, values.stride});
  }
}

// One row tile, of which `rows` rows count, against one tile of keys.
template <class A, int X, int G, class Ahead>
void attend(const Lanes<A>& queries, int row, int rows, int first, const Tile<A>& keys, const Tile<A>& values,
            int tokens, const int32_t* limits, State& state, Weights<A>& weights, Ahead& ahead) {
  score_tile<A, X, G>(queries, row, first, keys, tokens, weights.scores, ahead);
  const bool finer = soften<A, G>(tokens, values.factors, limits, row, state, weights);
  weigh<A>(tokens, values, rows, G * A::lanes, row, state, {weights.units, weights.factors}, ahead);
  if (finer) weigh<A>(tokens, values, rows, G * A::lanes, row, state, {weights.digits, weights.parts}, ahead);
}

} // namespace
} // namespace mla
