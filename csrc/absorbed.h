// Absorbed attention from queries to outputs: the keys' up-projection goes into the queries and the values' comes out
// of the weighted sums, head by head; between them is attention over the latents.
//
// A head's rows are its queries of all sequences. Heads are dealt to threads in equal stretches, and weights are
// multiplied where they lie: with few queries, reading them is all that it costs.
#pragma once

#include "decode.h"
#include "linear.h"

namespace mla {
namespace {

template <class A> class Absorber {
public:
  // `decode` is attention over the latents.
  static void run(const Projected& call, void (*decode)(const Decode&)) {
    const Absorber absorber(call);
    // Two pieces: the C library keeps pieces of up to 32 MiB for the next call, larger ones have to be cleared anew.
    const int64_t rows = absorber.rows_ * absorber.h_ * 4;
    const Memory queries_memory(rows * (absorber.r_ + absorber.p_)), sums_memory(rows * absorber.r_);
    float* queries = reinterpret_cast<float*>(queries_memory.data);
    float* sums = reinterpret_cast<float*>(sums_memory.data);
    absorber.each_head([&](int h, Scratch& scratch) { absorber.absorb(h, queries, scratch); });
    const Heads q_latent = absorber.heads(queries, absorber.r_ + absorber.p_), out = absorber.heads(sums, absorber.r_);
    Heads q_rope = q_latent;
    q_rope.data += absorber.r_ * 4;
    decode({call.attention, q_latent, q_rope, out});
    absorber.each_head([&](int h, Scratch& scratch) { absorber.project(h, out, scratch); });
  }

private:
  static constexpr int kMost = LinearRows<A>::kMost;

  struct Scratch {
    LinearRows<A> rows;
    Lanes<A> lanes;
    Tile<A> weights;
    State sums;

    void carve(Carver& carver, const Absorber& a) {
      rows.carve(carver, a.block_, a.r_);
      lanes.carve(carver, a.block_, units_of<A>(a.n_));
      weights.carve(carver, units_of<A>(a.r_));
      sums.template carve<A>(carver, a.block_, a.r_);
    }
  };

  explicit Absorber(const Projected& call)
      : call_(call), attention_(call.attention), rows_(int64_t{attention_.b} * attention_.s), h_(attention_.h),
        n_(call.n), r_(attention_.cache.r), p_(attention_.cache.p),
        block_(static_cast<int>(up(least(rows_, kMost), A::lanes))) {}

  // [b, s, h, width] in fp32.
  Heads heads(float* data, int64_t width) const {
    const int64_t token = h_ * width * 4;
    return {reinterpret_cast<char*>(data), Type::f32, attention_.s * token, token, width * 4};
  }

  template <class Work> void each_head(Work&& work) const {
    const int threads = static_cast<int>(least(attention_.threads, h_));
    Carver count(nullptr);
    Scratch().carve(count, *this);
    Memory memory(count.used() * threads);
    team(attention_.threads, threads, [&](int i) {
      Carver carver(memory.data + count.used() * i);
      Scratch scratch;
      scratch.carve(carver, *this);
      for (int h = h_ * i / threads; h < h_ * (i + 1) / threads; ++h) work(h, scratch);
    });
  }

  // Blocks of a head's rows: block(first, rows).
  template <class Block> void each_block(Block&& block) const {
    for (int64_t first = 0; first < rows_; first += kMost) block(first, static_cast<int>(least(kMost, rows_ - first)));
  }

  char* at(const Heads& x, int64_t row, int h) const {
    return head(x, static_cast<int>(row / attention_.s), static_cast<int>(row % attention_.s), h);
  }

  // The head after h, for the memory.
  LinesAhead after(const Weight& w, int h, int rows) const {
    return {w.data + (h + 1) * w.stride_h, h + 1 < h_ ? rows * w.stride_row : 0};
  }

  // Queries of one head, times its up-projection of keys -> the latent space; rotary parts follow.
  void absorb(int h, float* queries, Scratch& scratch) const {
    const Heads to = heads(queries, r_ + p_);
    LinesAhead ahead = after(call_.w_uk, h, n_);
    each_block([&](int64_t first, int rows) {
      scratch.lanes.pack(
          rows, 1.0f, [&](int i) { return Parts{{at(call_.q_nope, first + i, h), call_.q_nope.type, n_, 1.0f}, {}}; });
      scratch.sums.clear(up(rows, A::lanes));
      for (int from = 0; from < n_; from += kKeys<A>) {
        const int count = static_cast<int>(least(kKeys<A>, n_ - from));
        const int tokens = static_cast<int>(up(count, A::per_unit));
        const Weight& w = call_.w_uk;
        load(w.data + h * w.stride_h + from * w.stride_row, w, count, tokens, scratch);
        for (int row = 0; row < rows; row += 2 * A::lanes) {
          const int some = static_cast<int>(least(2 * A::lanes, rows - row));
          const int lanes = static_cast<int>(up(some, A::lanes));
          weigh<A>(tokens, scratch.weights, some, lanes, row, scratch.sums,
                   {scratch.lanes.tile(row) + from / A::per_unit * lanes, nullptr}, ahead);
        }
      }
      for (int i = 0; i < rows; ++i) {
        char* out = at(to, first + i, h);
        write_sums<A>(scratch.sums.row(i), 1.0f, r_, Type::f32, out);
        widen(at(call_.q_rope, first + i, h), reinterpret_cast<float*>(out) + r_);
      }
    });
  }

  // `count` rows of a weight as a tile of `tokens` rows; where they lie, if whole tiles can be read there.
  void load(const char* data, const Weight& w, int count, int tokens, Scratch& scratch) const {
    if (count == tokens && scratch.sums.width == r_ && Tile<A>::lendable(w.type, data, w.stride_row))
      return scratch.weights.borrow(data, w.stride_row, count);
    scratch.weights.pack(w.type, tokens, [&](int i, auto&& take) {
      if (i < count) take(Parts{{data + i * w.stride_row, w.type, r_, 1.0f}, {}});
      return i < count;
    });
  }

  void widen(const char* rotary, float* to) const {
    if (p_ == 0) return; // then there may be no memory either
    if (call_.q_rope.type == Type::f32) {
      std::memcpy(to, rotary, static_cast<size_t>(p_) * 4);
      return;
    }
    for (int i = 0; i < p_; ++i) {
      uint16_t upper;
      std::memcpy(&upper, rotary + 2 * i, 2);
      const uint32_t bits = static_cast<uint32_t>(upper) << 16;
      std::memcpy(to + i, &bits, 4);
    }
  }

  // Weighted sums of one head, times its up-projection of values -> its output.
  void project(int h, const Heads& sums, Scratch& scratch) const {
    const Weight& w = call_.w_uv;
    LinesAhead ahead = after(w, h, call_.v);
    each_block([&](int64_t first, int rows) {
      scratch.rows.set(rows, r_, sums.type, [&](int i) { return at(sums, first + i, h); });
      with(w.type, [&](auto type) {
        if constexpr (type() == Type::bf16 || A::stored(type()))
          scratch.rows.template multiply<type()>(w.data + h * w.stride_h, w.stride_row, call_.v, call_.out.type, ahead,
                                                 [&](int row, int from) { return out(h, first + row, from); });
      });
    });
  }

  // Output `from` of a row of a head.
  char* out(int h, int64_t row, int from) const { return at(call_.out, row, h) + from * bytes_of(call_.out.type); }

  const Projected& call_;
  const Attention& attention_;
  const int64_t rows_; // of a head
  const int h_, n_, r_, p_, block_;
};

} // namespace
} // namespace mla
