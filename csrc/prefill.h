// Expanded attention: for one head at a time, a tile of keys and values is rebuilt from the latents, used by
// every query of a chunk, and overwritten by the next.
//
// An item is a sequence, a head and a chunk of queries; items are independent of one another, so that threads
// take them as they come, and the result depends on nothing but the inputs.
#pragma once

#include <atomic>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace mla {
namespace {

constexpr int kQueries = 4096; // queries per item at most: what bounds the scratch memory

// Of a type of its own: functions of std::vector<int> would be merged across instruction sets.
struct Sequence {
  int index;
};

template <class A> class Prefiller {
public:
  // Serves the sequences whose length lies in `lengths`.
  static void run(const Projected& call, Lengths lengths) {
    Prefiller prefiller(call, lengths);
    if (!prefiller.sequences_.empty()) prefiller.run();
  }

private:
  struct Scratch {
    Lanes<A> queries, uk, uv; // the latter two: an up-projection of one head, its output channels in the lanes
    float *key_floats, *value_floats;
    Limits limits;
    Tile<A> latents, keys, values;
    Weights<A> weights;
    State state;
    int key_channels, value_channels; // n and v in whole vectors
    int key_line, value_line;         // floats from token to token

    void carve(Carver& carver, const Prefiller& p) {
      const Projected& call = p.call_;
      const int r = call.attention.cache.r, width = call.attention.cache.p, slack = 4 * A::lanes;
      uk.carve(carver, call.n, units_of<A>(r));
      uv.carve(carver, call.v, units_of<A>(r));
      key_channels = static_cast<int>(up(call.n, A::lanes));
      value_channels = static_cast<int>(up(call.v, A::lanes));
      key_line = key_channels + width + slack;
      value_line = value_channels + slack;
      queries.carve(carver, p.chunk_, p.units_);
      limits.carve(carver, up(p.chunk_, A::lanes), A::lanes);
      key_floats = carver.take<float>(static_cast<int64_t>(kKeys<A>) * key_line);
      value_floats = carver.take<float>(static_cast<int64_t>(kKeys<A>) * value_line);
      latents.carve(carver, units_of<A>(r));
      keys.carve(carver, p.units_);
      values.carve(carver, units_of<A>(call.v));
      weights.carve(carver);
      state.template carve<A>(carver, up(p.chunk_, A::lanes), call.v);
    }
  };

  Prefiller(const Projected& call, Lengths lengths) : call_(call), attention_(call.attention) {
    for (int sequence = 0; sequence < attention_.b; ++sequence)
      if (lengths.hold(attention_.lengths[sequence])) sequences_.push_back({sequence});
    units_ = units_of<A>(call.n, attention_.cache.p);
    // As few chunks as give every thread an item: each chunk rebuilds the keys that it sees.
    const int64_t heads = static_cast<int64_t>(sequences_.size()) * attention_.h;
    const int64_t wanted = most((attention_.threads + heads - 1) / most(1, heads), 1);
    const int64_t size = most((attention_.s + wanted - 1) / wanted, least(attention_.s, 4 * A::lanes));
    chunk_ = static_cast<int>(most(1, least(size, kQueries)));
    chunks_ = (attention_.s + chunk_ - 1) / chunk_;
    items_ = heads * chunks_;
    threads_ = static_cast<int>(most(1, least(attention_.threads, items_)));
  }

  void run() {
    Carver count(nullptr);
    for (int i = 0; i < threads_; ++i) Scratch().carve(count, *this);
    Memory memory(count.used());
    std::atomic<int64_t> next{0};
    const int64_t each = count.used() / threads_;
    team(attention_.threads, threads_, [&](int i) {
      [[maybe_unused]] const Hold<A> hold;
      Carver carver(memory.data + i * each);
      Scratch scratch;
      scratch.carve(carver, *this);
      for (int64_t item = next++; item < items_; item = next++) attend_item(item, scratch);
    });
  }

  void attend_item(int64_t item, Scratch& scratch) {
    // The last chunk first: with a causal limit it is the longest.
    const int64_t heads = static_cast<int64_t>(sequences_.size()) * attention_.h;
    const int first = static_cast<int>(chunks_ - 1 - item / heads) * chunk_;
    const int sequence = sequences_[static_cast<size_t>(item % heads / attention_.h)].index;
    const int h = static_cast<int>(item % attention_.h);
    const int rows = static_cast<int>(least(chunk_, attention_.s - first));
    const int padded = static_cast<int>(up(rows, A::lanes));
    State& state = scratch.state;
    state.clear(padded);
    const int64_t tokens = visible(attention_, sequence, first + rows - 1);
    if (tokens > 0) pack(sequence, h, first, rows, scratch);
    for (int64_t from = 0; from < tokens; from += kKeys<A>) {
      const int count = static_cast<int>(least(kKeys<A>, tokens - from));
      const int filled = static_cast<int>(up(count, kNarrow<A>));
      expand(sequence, from, count, filled, scratch);
      NoAhead ahead;
      attend_rows<A>(scratch.queries, rows, units_of<A>(call_.n), scratch.keys, scratch.values, from, count, filled,
                     scratch.limits, state, scratch.weights, ahead);
    }
    finish<A>(attention_, state, 0, rows, call_.v, call_.out.type, [&](int i) {
      return Place{head(call_.out, sequence, first + i, h), lse_of(attention_, sequence, first + i, h), h};
    });
  }

  // The queries of an item, its limits, and its head's two projections.
  void pack(int sequence, int h, int first, int rows, Scratch& scratch) {
    const int p = attention_.cache.p, r = attention_.cache.r;
    const auto parts = [&](int i) {
      return Parts{{head(call_.q_nope, sequence, first + i, h), call_.q_nope.type, call_.n, 1.0f},
                   {head(call_.q_rope, sequence, first + i, h), call_.q_rope.type, p, 1.0f}};
    };
    scratch.queries.pack(rows, attention_.scale * kLog2E, parts, takes_fours<A>(call_.n, p));
    scratch.limits.fill(attention_, sequence, rows, static_cast<int>(up(rows, A::lanes)),
                        [&](int i) { return first + i; });
    const auto project = [&](const Weight& w, int channels, Lanes<A>& to) {
      to.pack(channels, 1.0f,
              [&](int i) { return Parts{{w.data + h * w.stride_h + i * w.stride_row, w.type, r, 1.0f}, {}}; });
    };
    project(call_.w_uk, call_.n, scratch.uk);
    project(call_.w_uv, call_.v, scratch.uv);
  }

  // The tile's latents -> its keys and values of the item's head.
  void expand(int sequence, int64_t from, int count, int filled, Scratch& scratch) {
    using Floats = Float32<A::lanes>;
    const Cache& cache = attention_.cache;
    if (const char* rows = filled == count ? lying<A>(attention_, sequence, from, count) : nullptr)
      scratch.latents.borrow(rows, cache.c_kv.row_stride, count);
    else
      fill(attention_, sequence, from, count, filled, scratch.latents,
           [&](int, const Cursor& cursor) { return Parts{latent(cache, cursor), {}}; });
    Cursor cursor(cache, sequence, from);
    for (int i = 0; i < count; ++i, cursor.next()) {
      if (cursor.stale()) cursor.turn();
      if (scratch.latents.hidden[i]) continue;
      float* to = scratch.key_floats + static_cast<int64_t>(i) * scratch.key_line + scratch.key_channels;
      const Part part = rotary(cache, cursor);
      with(part.type, [&](auto type) { mla::pack<Floats, type()>(part, 1.0f, reinterpret_cast<uint32_t*>(to)); });
    }
    multiply(scratch.uk, scratch.key_channels, scratch.latents, filled, scratch.key_floats, scratch.key_line);
    multiply(scratch.uv, scratch.value_channels, scratch.latents, filled, scratch.value_floats, scratch.value_line);
    const auto seen = [&](int t) { return !scratch.latents.hidden[t]; };
    scratch.keys.pack(Type::f32, filled, [&](int t, auto&& take) {
      const float* key = scratch.key_floats + static_cast<int64_t>(t) * scratch.key_line;
      if (seen(t)) take(Parts{floats(key, call_.n), floats(key + scratch.key_channels, cache.p)});
      return seen(t);
    });
    scratch.values.pack(Type::f32, filled, [&](int t, auto&& take) {
      const float* value = scratch.value_floats + static_cast<int64_t>(t) * scratch.value_line;
      if (seen(t)) take(Parts{floats(value, call_.v), {}});
      return seen(t);
    });
  }

  static Part floats(const float* data, int count) {
    return {reinterpret_cast<const char*>(data), Type::f32, count, 1.0f};
  }

  // to[token][channel] = latents of the token . row of the channel.
  static void multiply(const Lanes<A>& w, int channels, const Tile<A>& latents, int tokens, float* to, int64_t line) {
    for (int channel = 0; channel < channels; channel += 2 * A::lanes) {
      if (channels - channel >= 2 * A::lanes)
        multiply_tile<kWide<A>, 2>(w, latents, tokens, to, line, channel);
      else
        multiply_tile<kNarrow<A>, 1>(w, latents, tokens, to, line, channel);
    }
  }

  template <int X, int G> static void multiply_tile(const Lanes<A>& w, const Tile<A>& latents, int tokens, float* to,
                                                    int64_t line, int channel) {
    using V = typename A::V;
    using F = typename A::F;
    NoAhead ahead;
    if constexpr (kMatrix<A>) {
      for (int t = 0; t < tokens; t += 2 * kSide)
        matrix_product<A, G>(w.tile(channel), w.units, latents.rows + t * latents.stride, latents.stride,
                             to + t * line + channel, line, ahead);
    } else {
      F factors[G];
      for (int g = 0; g < G; ++g) factors[g] = V::template load<F>(w.factors + channel + g * A::lanes);
      for (int t = 0; t < tokens; t += X)
        product<A, X, G>(Ready<A, std::integral_constant<int, G * A::lanes>>{w.tile(channel), {}}, w.units,
                         latents.rows + t * latents.stride, latents.stride, 1, ahead,
                         [&](int x, int g, F value) MLA_INLINE_LAMBDA {
                           if constexpr (kSplit<A>) value = value * (factors[g] * latents.factors[t + x]);
                           V::store(to + (t + x) * line + channel + g * A::lanes, value);
                         });
    }
  }

  const Projected& call_;
  const Attention& attention_;
  int units_, chunk_, threads_;
  int64_t chunks_, items_;
  std::vector<Sequence> sequences_;
};

} // namespace
} // namespace mla
