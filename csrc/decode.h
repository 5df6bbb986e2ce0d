// Absorbed attention over the latent cache: every head reads the same rows.
//
// An item is a sequence and up to kRows of its query rows (token by token, head by head); its stripes of a few keys are
// the work. All stripes of all items lie on one line, of which each thread takes an equal stretch, so that one
// long sequence uses every core, and goes through it in tiles. An item that a stretch boundary cuts is finished from
// partial sums, in the order of the keys: the result depends on the number of threads (by rounding), never on their
// timing.
#pragma once

#include <vector>

#include "rows.h"
#include "threads.h"

namespace mla {
namespace {

constexpr int kRows = 128;
constexpr int64_t kWorth = 120;        // keys that are worth a thread
constexpr int64_t kMergedAlone = 4096; // numbers in partial sums that cost less to add than to share out

struct Item {
  int sequence, first, rows; // rows first.. of the s * h of this sequence
  int64_t tokens;            // keys that any of them sees
  int64_t before, stripes;   // of all items before this one, and its own
};

template <class A> class Decoder {
public:
  // Serves the sequences whose length lies in `lengths`.
  static void run(const Decode& call, Lengths lengths) {
    Decoder decoder(call, lengths);
    if (!decoder.items_.empty()) decoder.run();
  }

private:
  static constexpr int stripe = kNarrow<A>; // keys

  // The partial sums of one thread: at most its first and its last item are shared with others.
  struct Piece {
    int item = -1;
    State state;
  };
  struct Scratch {
    Lanes<A> queries;
    Limits limits;
    Tile<A> keys;
    Weights<A> weights;
    State state;
    Piece pieces[2];

    void carve(Carver& carver, const Decoder& d) {
      queries.carve(carver, d.rows_, query_units_of<A>(d.r_, d.call_.attention.cache.p));
      limits.carve(carver, d.rows_, A::lanes);
      keys.carve(carver, d.units_);
      weights.carve(carver);
      state.template carve<A>(carver, d.rows_, d.r_);
      if (d.threads_ > 1)
        for (Piece& piece : pieces) piece.state.template carve<A>(carver, d.rows_, d.r_);
    }
  };

  Decoder(const Decode& call, Lengths lengths) : call_(call), attention_(call.attention) {
    const Cache& cache = attention_.cache;
    r_ = cache.r;
    units_ = units_of<A>(cache.r, cache.p);
    // Whether rows hold both parts as a product reads them, and the numbers that weighted sums reach for.
    borrows_ = may_lie<A>(attention_) && joined(cache) && fills<A>(cache.p) && State::width_of<A>(r_) <= r_ + cache.p;
    const int all = attention_.s * attention_.h;
    rows_ = static_cast<int>(up(least(all, kRows), A::lanes));
    for (int sequence = 0; sequence < attention_.b; ++sequence) {
      if (!lengths.hold(attention_.lengths[sequence])) continue;
      for (int first = 0; first < all; first += kRows) {
        const int rows = static_cast<int>(least(kRows, all - first));
        const int64_t tokens = visible(attention_, sequence, (first + rows - 1) / attention_.h);
        items_.push_back({sequence, first, rows, tokens, stripes_, (tokens + stripe - 1) / stripe});
        stripes_ += items_.back().stripes;
      }
    }
    threads_ = static_cast<int>(most(1, least(attention_.threads, stripes_ * stripe / kWorth)));
  }

  void run() {
    Carver count(nullptr);
    for (int i = 0; i < threads_; ++i) Scratch().carve(count, *this);
    Memory memory(count.used());
    Carver carver(memory.data);
    scratch_.resize(static_cast<size_t>(threads_));
    for (Scratch& scratch : scratch_) scratch.carve(carver, *this);
    team(attention_.threads, threads_, [this](int i) { stretch(i); });
    if (threads_ == 1) return;
    const int64_t partial = int64_t{threads_ - 1} * rows_ * r_; // a boundary between two stretches cuts one item
    const int mergers = partial <= kMergedAlone ? 1 : threads_;
    team(attention_.threads, mergers, [&](int i) { merge(i, mergers); });
  }

  int64_t start(int thread) const { return stripes_ * thread / threads_; }

  void stretch(int thread) {
    [[maybe_unused]] const Hold<A> hold;
    Scratch& scratch = scratch_[static_cast<size_t>(thread)];
    const int64_t from = start(thread), to = start(thread + 1);
    for (int i = 0; i < static_cast<int>(items_.size()); ++i) {
      const Item& item = items_[static_cast<size_t>(i)];
      const int64_t first = most(from, item.before), last = least(to, item.before + item.stripes);
      if (item.stripes == 0 && thread == 0) { // nothing to see: no thread's stretch holds it
        scratch.state.clear(up(item.rows, A::lanes));
        write(item, scratch.state, 0, item.rows);
      }
      if (first >= last) continue;
      const bool whole = last - first == item.stripes;
      Piece& piece = scratch.pieces[first == from ? 0 : 1];
      State& state = whole ? scratch.state : piece.state;
      if (!whole) piece.item = i;
      attend_keys(item, (first - item.before) * stripe, least((last - item.before) * stripe, item.tokens), state,
                  scratch);
      if (whole) write(item, state, 0, item.rows);
    }
  }

  void attend_keys(const Item& item, int64_t from, int64_t end, State& state, Scratch& scratch) {
    const int padded = static_cast<int>(up(item.rows, A::lanes));
    state.clear(padded);
    const auto parts = [&](int i) {
      const int row = item.first + i, s = row / attention_.h, h = row % attention_.h;
      return Parts{{head(call_.q_latent, item.sequence, s, h), call_.q_latent.type, r_, 1.0f},
                   {head(call_.q_rope, item.sequence, s, h), call_.q_rope.type, attention_.cache.p, 1.0f}};
    };
    scratch.queries.pack(item.rows, attention_.scale * kLog2E, parts, takes_fours<A>(r_, attention_.cache.p));
    scratch.limits.fill(attention_, item.sequence, item.rows, padded,
                        [&](int i) { return (item.first + i) / attention_.h; });
    for (int64_t count; from < end; from += count) {
      // A tile that has to be filled up, or that goes beyond its page, cannot be borrowed: what does not fill a stripe
      // comes last, by itself, and so does a stripe that two pages share. Small tiles cost many rows more than packing.
      count = least(kKeys<A>, end - from);
      if (borrows_ && attention_.cache.page_size >= (item.rows > 2 * A::lanes ? kKeys<A> : 2 * stripe)) {
        const int64_t left = attention_.cache.page_size - from % attention_.cache.page_size;
        count = least(count, most(left, stripe));
      }
      if (count > stripe) count -= count % stripe;
      attend_tile(item, from, static_cast<int>(count), end, state, scratch);
    }
  }

  void attend_tile(const Item& item, int64_t from, int count, int64_t end, State& state, Scratch& scratch) {
    const Cache& cache = attention_.cache;
    const int tokens = static_cast<int>(up(count, stripe));
    const char* rows = borrows_ && tokens == count ? lying<A>(attention_, item.sequence, from, count) : nullptr;
    if (rows)
      scratch.keys.borrow(rows, cache.c_kv.row_stride, count);
    else
      fill(attention_, item.sequence, from, count, tokens, scratch.keys,
           [&](int, const Cursor& cursor) { return Parts{latent(cache, cursor), rotary(cache, cursor)}; });
    RowsAhead ahead(cache, item.sequence, from + count, least(kKeys<A>, end - from - count));
    attend_rows<A>(scratch.queries, item.rows, units_of<A>(r_), scratch.keys, scratch.keys, from, count, tokens,
                   scratch.limits, state, scratch.weights, ahead);
  }

  void write(const Item& item, const State& state, int begin, int end) {
    finish<A>(attention_, state, begin, end, r_, call_.out.type, [&](int i) {
      const int all = item.first + i, s = all / attention_.h, h = all % attention_.h;
      return Place{head(call_.out, item.sequence, s, h), lse_of(attention_, item.sequence, s, h), h};
    });
  }

  // The rows of all cut items, four at a time, dealt out to `mergers` threads in turn. Allocates nothing: an exception
  // could not leave a thread of OpenMP.
  void merge(int thread, int mergers) {
    int turn = 0;
    for (int i = 0; i < static_cast<int>(items_.size()); ++i) {
      State* sum = nullptr;
      each_part(i, [&](State& part) { sum = sum ? sum : &part; });
      if (!sum) continue;
      const Item& item = items_[static_cast<size_t>(i)];
      for (int row = 0; row < item.rows; row += 4) {
        if (turn++ % mergers != thread) continue;
        const int end = static_cast<int>(least(row + 4, item.rows));
        each_part(i, [&](State& part) {
          for (int each = row; each < end && &part != sum; ++each) add(part, *sum, each);
        });
        write(item, *sum, row, end);
      }
    }
  }

  // The partial sums of an item, in the order of the keys.
  template <class Take> void each_part(int item, Take&& take) {
    for (Scratch& scratch : scratch_)
      for (Piece& piece : scratch.pieces)
        if (piece.item == item) take(piece.state);
  }

  static void add(const State& from, State& to, int row) {
    using V = typename A::V;
    using F = typename A::F;
    const auto power = [](float x) { return V::exp2(V::all(x))[0]; };
    const float old = to.maximum[row], other = from.maximum[row], top = old > other ? old : other;
    const float finite = top == -kInfinity ? 0.0f : top;
    const float mine = power(old - finite), theirs = power(other - finite);
    to.maximum[row] = top;
    to.total[row] = to.total[row] * mine + from.total[row] * theirs;
    float* sums = to.row(row);
    const float* more = from.row(row);
    for (int d = 0; d < to.width; d += A::lanes)
      V::store(sums + d, V::template load<F>(sums + d) * mine + V::template load<F>(more + d) * theirs);
  }

  const Decode& call_;
  const Attention& attention_;
  int r_, units_, rows_, threads_;
  bool borrows_;
  int64_t stripes_ = 0;
  std::vector<Item> items_;
  std::vector<Scratch> scratch_;
};

} // namespace
} // namespace mla
