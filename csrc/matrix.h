// Attention in matrix registers: 16 rows of 16 units each meet 16 columns of as many units in one instruction.
//
// Keys are rows as they lie in the cache, queries columns as Lanes packs them, so that scores come as in any other
// arithmetic: [key][row of the tile]. In the weighted sums probabilities are rows, and interleaved values columns.
#pragma once

#include "tile.h"

namespace mla {
namespace {

// What a thread holds while it multiplies.
struct Nothing {};
template <class A, bool matrix = kMatrix<A>> struct Holding {
  using type = Nothing;
};
template <class A> struct Holding<A, true> {
  using type = typename A::Matrix::Hold;
};
template <class A> using Hold = typename Holding<A>::type;

constexpr int kSide = 16; // rows, columns and units of a register

// 32 rows from `rows` on, `stride` units apart, times G * 16 columns, which lie [unit][G * 16] -> sums [row][column],
// `line` numbers apart.
template <class A, int G, class Ahead> MLA_INLINE void matrix_product(const uint32_t* columns, int units,
                                                                      const uint32_t* rows, int64_t stride, void* sums,
                                                                      int64_t line, Ahead& ahead) {
  using M = typename A::Matrix;
  M::fence();
  M::template zero<0>(), M::template zero<2>();
  if constexpr (G == 2) M::template zero<1>(), M::template zero<3>();
  for (int u = 0; u < units; u += kSide, rows += kSide, columns += kSide * kSide * G) {
    M::template load<6>(columns, G * kSide * 4);
    M::template load<4>(rows, stride * 4);
    M::template score<0, 4, 6>();
    if constexpr (G == 2) {
      M::template load<7>(columns + kSide, G * kSide * 4);
      M::template score<1, 4, 7>();
    }
    M::template load<5>(rows + kSide * stride, stride * 4);
    M::template score<2, 5, 6>();
    if constexpr (G == 2) M::template score<3, 5, 7>();
    ahead.steps();
  }
  float *upper = static_cast<float*>(sums), *lower = upper + kSide * line;
  M::template store<0>(upper, line * 4);
  M::template store<2>(lower, line * 4);
  if constexpr (G == 2) {
    M::template store<1>(upper + kSide, line * 4);
    M::template store<3>(lower + kSide, line * 4);
  }
  M::fence();
}

// As ceiling().
template <class A> double matrix_ceiling(int64_t rounds) {
  using M = typename A::Matrix;
  const typename M::Hold hold;
  // Not zeros, which are faster.
  typename A::Unit numbers[kSide];
  for (auto& row : numbers) row = A::V::all(0x3f803f80u);
  M::fence();
  M::template load<4>(numbers, 64), M::template load<5>(numbers, 64);
  M::template load<6>(numbers, 64), M::template load<7>(numbers, 64);
  for (int64_t i = 0; i < rounds; ++i) {
    M::template score<0, 4, 6>(), M::template score<1, 4, 7>();
    M::template score<2, 5, 6>(), M::template score<3, 5, 7>();
  }
  return 2.0 * 4 * kSide * kSide * kSide * A::per_unit * static_cast<double>(rounds);
}

// As score().
template <class A, int G, class Ahead> void score_matrix(const Lanes<A>& queries, int row, int first,
                                                         const Tile<A>& keys, int tokens, float* scores, Ahead& ahead) {
  using V = typename A::V;
  using F = typename A::F;
  constexpr int size = 2 * kSide, line = G * kSide;
  const uint32_t* columns = queries.tile(row);
  F factors[G], rests[G];
  bool finer = false;
  for (int g = 0; g < G; ++g) {
    factors[g] = V::template load<F>(queries.factors + row + g * kSide);
    rests[g] = V::template load<F>(queries.rests + row + g * kSide);
  }
  if constexpr (kDigits<A>)
    for (int i = 0; i < line; ++i) finer |= queries.second[row + i];
  const int rest = kSplit<A> ? queries.units - first - (kDigits<A> ? first : 0) : 0;
  const int length = kSplit<A> ? first : queries.units;
  // Sums of 32 keys, `each` of which becomes part of a score.
  const auto add = [&](const auto* sums, int t, auto&& each) MLA_INLINE_LAMBDA {
    for (int x = 0; x < size; ++x)
      for (int g = 0; g < G; ++g) {
        float* at = scores + ((t + x) * G + g) * kSide;
        V::store(at, each(at, sums + x * line + g * kSide, t + x, g));
      }
  };
  for (int t = 0; t < tokens; t += size) {
    const uint32_t* rows = keys.rows + t * keys.stride;
    float* to = scores + t * line;
    matrix_product<A, G>(columns, length, rows, keys.stride, to, line, ahead);
    const auto whole = [&](const float* sums, int x, int g) MLA_INLINE_LAMBDA {
      if constexpr (kSplit<A>)
        return (A::value(V::template load<typename A::Sum>(sums)) - keys.offsets[x]) * (factors[g] * keys.factors[x]);
      else
        return V::template load<F>(sums) * factors[g];
    };
    add(to, t, [&](float*, const float* sums, int x, int g) MLA_INLINE_LAMBDA { return whole(sums, x, g); });
    if constexpr (kSplit<A>) {
      alignas(64) float more[size * line];
      matrix_product<typename A::Rest, G>(columns + first * line, rest, rows + first, keys.stride, more, line, ahead);
      add(more, t, [&](float* at, const float* sums, int x, int g) MLA_INLINE_LAMBDA {
        return V::template load<F>(at) + V::template load<F>(sums) * (rests[g] * keys.rests[x]);
      });
      if (kDigits<A> && finer) {
        matrix_product<A, G>(columns + (first + rest) * line, first, rows, keys.stride, more, line, ahead);
        add(more, t, [&](float* at, const float* sums, int x, int g) MLA_INLINE_LAMBDA {
          return V::template load<F>(at) + whole(sums, x, g) * (1.0f / A::second);
        });
      }
    }
    for (int x = t; x < t + size; ++x)
      for (int g = 0; keys.hidden[x] && g < G; ++g) V::store(scores + (x * G + g) * kSide, V::all(-kInfinity));
  }
}

// Units [keys / per_unit][row of the tile] -> registers of [row][units of as many keys as a step has], step by step.
template <class A, int G> void turn_shares(int tokens, const uint32_t* units, uint32_t* to) {
  using V = typename A::V;
  using F = typename A::F;
  for (int i = 0; i < tokens / A::per_unit; i += kSide)
    for (int g = 0; g < G; ++g, to += kSide * kSide) {
      F rows[kSide];
      for (int j = 0; j < kSide; ++j) rows[j] = V::template load<F>(units + ((i + j) * G + g) * kSide);
      V::transpose(rows);
      for (int j = 0; j < kSide; ++j) V::store(to + j * kSide, rows[j]);
    }
}

// Numbers d to d + 31 of the values of `tokens` keys -> registers of columns, two for every step.
template <class A> void interleave_values(int tokens, const Tile<A>& values, int d, uint32_t* to) {
  using V = typename A::V;
  constexpr int both = 2 * kSide, chunk = A::per_unit * kSide;
  const auto each = [&](auto pair) MLA_INLINE_LAMBDA {
    const uint32_t* from = values.rows + (d - both * pair()) / A::per_unit;
    for (int i = 0; i < tokens / A::per_unit; ++i) {
      typename A::Unit vectors[2];
      A::template interleave<pair()>(from + i * A::per_unit * values.stride, values.stride, vectors);
      uint32_t* at = to + (i / kSide * both + i % kSide) * kSide;
      V::store(at, vectors[0]);
      V::store(at + kSide * kSide, vectors[1]);
    }
  };
  if (d % chunk == 0)
    each(std::integral_constant<int, 0>());
  else if constexpr (chunk > both)
    each(std::integral_constant<int, 1>());
}

// 32 numbers of the sums of a row tile += probabilities times interleaved values.
template <class A, int G, class Ahead> MLA_INLINE void weigh_matrix(int tokens, const uint32_t* shares,
                                                                    const float* factors, const uint32_t* values,
                                                                    float* sums, int64_t line, Ahead& ahead) {
  using M = typename A::Matrix;
  using V = typename A::V;
  using F = typename A::F;
  constexpr int size = kSide * kSide;
  alignas(64) float integers[kSplit<A> ? G * 2 * size : 1];
  // Sums of integers are of one tile of keys.
  float* to = kSplit<A> ? integers : sums;
  const int64_t step = kSplit<A> ? 2 * kSide : line;
  if constexpr (kSplit<A>) {
    M::template zero<0>(), M::template zero<1>();
    if constexpr (G == 2) M::template zero<2>(), M::template zero<3>();
  } else {
    M::template load<0>(to, step * 4), M::template load<1>(to + kSide, step * 4);
    if constexpr (G == 2) {
      M::template load<2>(to + kSide * step, step * 4);
      M::template load<3>(to + kSide * step + kSide, step * 4);
    }
  }
  for (int t = 0; t < tokens; t += kSide * A::per_unit, shares += G * size, values += 2 * size) {
    M::template load<4>(shares, kSide * 4);
    M::template load<6>(values, kSide * 4);
    M::template weigh<0, 4, 6>();
    M::template load<7>(values + size, kSide * 4);
    M::template weigh<1, 4, 7>();
    if constexpr (G == 2) {
      M::template load<5>(shares + size, kSide * 4);
      M::template weigh<2, 5, 6>();
      M::template weigh<3, 5, 7>();
    }
    ahead.steps();
  }
  M::template store<0>(to, step * 4), M::template store<1>(to + kSide, step * 4);
  if constexpr (G == 2) {
    M::template store<2>(to + kSide * step, step * 4);
    M::template store<3>(to + kSide * step + kSide, step * 4);
  }
  if constexpr (kSplit<A>) {
    M::fence();
    for (int i = 0; i < G * kSide; ++i)
      for (int g = 0; g < 2; ++g) {
        float* at = sums + i * line + g * kSide;
        const F value = A::value(V::template load<typename A::Sum>(integers + (2 * i + g) * kSide));
        V::store(at, V::template load<F>(at) + value * factors[i]);
      }
  }
}

// Row tiles from row `begin` on, up to kTogether rows, against one tile of keys: first the probabilities of all of
// them, then their sums, so that values are interleaved once.
template <class A> class MatrixRows {
public:
  MatrixRows(const Weights<A>& weights, State& state, int begin) : weights_(weights), state_(state), begin_(begin) {}

  // Of a product, of `rows` rows in all.
  int64_t steps(int rows, int tokens, int units) const {
    const int64_t tiles = (rows + 2 * kSide - 1) / (2 * kSide);
    return tiles *
           (tokens / (2 * kSide) * (units / kSide) + tokens / (kSide * A::per_unit) * (state_.width / kSide / 2));
  }

  // A row tile that begins with `row`, as attend().
  template <int G, class Ahead> void soften(const Lanes<A>& queries, int row, int first, const Tile<A>& keys,
                                            const Tile<A>& values, int tokens, const int32_t* limits, Ahead& ahead) {
    score_matrix<A, G>(queries, row, first, keys, tokens, weights_.scores, ahead);
    Weights<A> own = weights_;
    own.factors += row - begin_;
    own.parts += row - begin_;
    const bool finer = mla::soften<A, G>(tokens, values.factors, limits, row, state_, own);
    turn_shares<A, G>(tokens, own.units, shares(row, own.shares));
    if (finer) turn_shares<A, G>(tokens, own.digits, shares(row, own.more_shares));
    seen_[(row - begin_) / (2 * kSide)] = {row, tokens, G, finer};
    tiles_ = (row - begin_) / (2 * kSide) + 1;
    tokens_ = static_cast<int>(most(tokens_, tokens));
  }

  template <class Ahead> void weigh(const Tile<A>& values, Ahead& ahead) {
    using M = typename A::Matrix;
    for (int d = 0; d < state_.width; d += 2 * kSide) {
      interleave_values<A>(tokens_, values, d, weights_.values);
      M::fence();
      for (int i = 0; i < tiles_; ++i) {
        const Seen& tile = seen_[i];
        if (tile.groups == 0) continue;
        weigh_tile(tile, d, weights_.shares, weights_.factors, ahead);
        if (tile.finer) weigh_tile(tile, d, weights_.more_shares, weights_.parts, ahead);
      }
      M::fence();
    }
  }

private:
  struct Seen {
    int row = 0, tokens = 0, groups = 0; // none of a tile that sees no key
    bool finer = false;
  };
  template <class Ahead>
  MLA_INLINE void weigh_tile(const Seen& tile, int d, uint32_t* all, const float* factors, Ahead& ahead) {
    const uint32_t* own = shares(tile.row, all);
    float* sums = state_.row(tile.row) + d;
    factors += tile.row - begin_;
    if (tile.groups == 2)
      weigh_matrix<A, 2>(tile.tokens, own, factors, weights_.values, sums, state_.line, ahead);
    else
      weigh_matrix<A, 1>(tile.tokens, own, factors, weights_.values, sums, state_.line, ahead);
  }
  uint32_t* shares(int row, uint32_t* all) const { return all + (row - begin_) * (kKeys<A> / A::per_unit); }

  const Weights<A>& weights_;
  State& state_;
  const int begin_;
  int tiles_ = 0, tokens_ = 0;
  Seen seen_[kTogether / (2 * kSide)];
};

} // namespace
} // namespace mla
