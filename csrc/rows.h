// From the caller's memory to tiles, and from sums back to it.
#pragma once

#include <cstdlib>
#include <new>

#include "matrix.h"

namespace mla {
namespace {

// The scratch memory of one call.
struct Memory {
  explicit Memory(int64_t bytes)
      : data(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(up(bytes, 64))))) {
    if (!data) throw std::bad_alloc();
  }
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data;
};

// Lengths of sequences from `first` up to, not including, `last`.
struct Lengths {
  int64_t first, last;
  bool hold(int64_t length) const { return first <= length && length < last; }
};

// Where the result of one query row goes.
struct Place {
  char* out;
  float* lse;
  int h;
};

// Finds the rows of consecutive tokens of one sequence, looking a page up only once.
class Cursor {
public:
  Cursor(const Cache& cache, int sequence, int64_t token) : cache_(cache), sequence_(sequence) {
    page_ = token / cache.page_size;
    offset_ = token % cache.page_size;
    turn();
  }
  bool exists() const { return id_ >= 0; }
  const char* at(const Rows& rows) const { return rows.data + id_ * rows.page_stride + offset_ * rows.row_stride; }
  void next(int64_t count = 1) { // no further than to the end of the page
    if ((offset_ += count) == cache_.page_size) {
      offset_ = 0;
      ++page_;
      stale_ = true;
    }
  }
  int64_t left_in_page() const { return cache_.page_size - offset_; }
  // To be called before a row is read: the entry after the last token may not be there to look at.
  void turn() {
    id_ = cache_.table ? cache_.table[sequence_ * cache_.table_stride + page_] : sequence_;
    stale_ = false;
  }
  bool stale() const { return stale_; }

private:
  const Cache& cache_;
  int64_t sequence_, page_, offset_, id_;
  bool stale_;
};

inline Part latent(const Cache& cache, const Cursor& cursor) {
  float factor = 1.0f;
  if (cache.type == Type::i8) std::memcpy(&factor, cursor.at(cache.scale), 4);
  return {cursor.at(cache.c_kv), cache.type, cache.r, factor};
}

inline Part rotary(const Cache& cache, const Cursor& cursor) {
  return {cursor.at(cache.k_rope), beside(cache.type), cache.p, 1.0f};
}

// Bytes of a latent and of a rotary key.
inline int64_t latent_bytes(const Cache& cache) { return cache.r * bytes_of(cache.type); }
inline int64_t rotary_bytes(const Cache& cache) { return cache.p * bytes_of(beside(cache.type)); }

// Whether every rotary key, if there are any, follows its latent at once.
inline bool joined(const Cache& cache) {
  return cache.p == 0 ||
         (cache.k_rope.data == cache.c_kv.data + latent_bytes(cache) &&
          cache.k_rope.row_stride == cache.c_kv.row_stride && cache.k_rope.page_stride == cache.c_kv.page_stride);
}

// Whether any rows may be borrowed: not if they are no units, or if some are masked.
template <class A> bool may_lie(const Attention& call) {
  return A::stored(call.cache.type) && fills<A>(call.cache.r) && !call.key_mask;
}

// The latents of tokens first..first+count-1 of a sequence where they lie, if a tile of `A` can borrow them from there:
// as units, side by side, all seen. Null otherwise.
template <class A> const char* lying(const Attention& call, int sequence, int64_t first, int64_t count) {
  const Cache& cache = call.cache;
  if (!may_lie<A>(call)) return nullptr;
  const Cursor cursor(cache, sequence, first);
  if (!cursor.exists() || cursor.left_in_page() < count) return nullptr;
  const char* data = cursor.at(cache.c_kv);
  return Tile<A>::lendable(cache.type, data, cache.c_kv.row_stride) ? data : nullptr;
}

// Tokens first..first+count-1 of a sequence as a tile of `tokens` rows; those beyond, and those that are masked
// or do not exist, are empty. row(i, cursor) says where the parts of one that does lie.
template <class A, class Row>
void fill(const Attention& call, int sequence, int64_t first, int count, int tokens, Tile<A>& tile, Row&& row) {
  const uint8_t* mask = call.key_mask ? call.key_mask + sequence * call.key_mask_stride + first : nullptr;
  Cursor cursor(call.cache, sequence, first);
  const auto next = [&](int i, auto&& take) MLA_INLINE_LAMBDA {
    if (i >= count) return false;
    if (cursor.stale()) cursor.turn();
    const bool seen = cursor.exists() && (!mask || mask[i]);
    if (seen) take(row(i, cursor));
    cursor.next();
    return seen;
  };
  tile.pack(call.cache.type, tokens, next);
}

// Brings the rows of tokens first..first+count-1 into the second-level cache, a line at every step of a product:
// more at once would wait for one another.
class RowsAhead {
public:
  RowsAhead(const Cache& cache, int sequence, int64_t first, int64_t count)
      : cache_(cache), cursor_(cache, sequence, count > 0 ? first : 0), left_(most(0, count)) {
    dense_ = joined(cache) && cache.c_kv.row_stride == latent_bytes(cache) + rotary_bytes(cache);
  }
  // All of it within so many steps.
  void pace(int64_t steps) {
    const int64_t lines = left_ * ((latent_bytes(cache_) + 63) / 64 + (rotary_bytes(cache_) + 63) / 64);
    each_ = static_cast<int>((lines + steps - 1) / most(1, steps));
  }
  MLA_INLINE void steps() {
    for (int i = 0; i < each_; ++i) step();
  }
  MLA_INLINE void step() {
    if (at_ < end_) {
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
    } else if (left_ > 0) {
      turn();
    }
  }

private:
  // The next run of bytes: the rest of a page where rows lie side by side, else a latent or a rotary key.
  __attribute__((noinline)) void turn() {
    if (cursor_.stale()) cursor_.turn();
    at_ = end_ = nullptr;
    if (!cursor_.exists()) return advance(1);
    at_ = end_ = cursor_.at(rotary_ ? cache_.k_rope : cache_.c_kv);
    if (dense_) {
      const int64_t count = least(left_, cursor_.left_in_page());
      end_ += count * cache_.c_kv.row_stride;
      return advance(count);
    }
    end_ += rotary_ ? rotary_bytes(cache_) : latent_bytes(cache_);
    rotary_ = !rotary_;
    if (!rotary_) advance(1);
  }
  void advance(int64_t count) {
    cursor_.next(count);
    left_ -= count;
  }

  const Cache& cache_;
  Cursor cursor_;
  int64_t left_;
  bool dense_, rotary_ = false;
  int each_ = 1;
  const char *at_ = nullptr, *end_ = nullptr;
};

inline char* head(const Heads& x, int b, int s, int h) {
  return x.data + b * x.stride_b + s * x.stride_s + h * x.stride_h;
}

inline float* lse_of(const Attention& call, int b, int s, int h) {
  return call.lse + (static_cast<int64_t>(b) * call.s + s) * call.h + h;
}

// How many keys query i of a sequence sees.
inline int64_t visible(const Attention& call, int sequence, int i) {
  const int64_t length = call.lengths[sequence];
  return call.causal ? most(0, length - call.s + i + 1) : length;
}

// What a set of query rows sees, and how far. Rows are in the order of their tokens, so are their limits.
struct Limits {
  int32_t* seen;     // [rows, padded] keys that each row sees
  int32_t* relative; // [row of the tile] the same, counted from a tile's first key

  void carve(Carver& carver, int64_t rows, int lanes) {
    seen = carver.take<int32_t>(rows);
    relative = carver.take<int32_t>(2 * lanes);
  }
  // query(i) is the query token of row i.
  template <class Query> void fill(const Attention& call, int sequence, int rows, int padded, Query&& query) {
    for (int i = 0; i < padded; ++i)
      seen[i] = static_cast<int32_t>(visible(call, sequence, query(static_cast<int>(least(i, rows - 1)))));
  }
};

// The row tiles from row `begin` to `end` that see any of `tokens` keys, `count` of which are there, from key `from`
// on: step(row, some, enough, relative, groups), with the rows of the tile that count, the keys that the last of them
// sees, the limits of all of them if there are any, and the vectors of a tile.
template <class A, class Step> MLA_INLINE void each_row_tile(const Lanes<A>& queries, int begin, int end, int64_t from,
                                                             int64_t count, int tokens, Limits& limits, Step&& step) {
  for (int row = begin, some = 0; row < end; row += some) {
    some = queries.rows_of_tile(row, end);
    const int lanes = static_cast<int>(up(some, A::lanes));
    const int32_t *seen = limits.seen + row, *relative = nullptr;
    if (seen[lanes - 1] <= from) continue;
    if (seen[0] < from + count) {
      for (int i = 0; i < lanes; ++i) limits.relative[i] = static_cast<int32_t>(most(0, seen[i] - from));
      relative = limits.relative;
    }
    const int64_t left = seen[lanes - 1] - from;
    if (lanes > A::lanes)
      step(row, some, static_cast<int>(least(tokens, up(left, kWide<A>))), relative, std::integral_constant<int, 2>());
    else
      step(row, some, static_cast<int>(least(tokens, up(left, kNarrow<A>))), relative,
           std::integral_constant<int, 1>());
  }
}

// All row tiles of `rows` rows against one tile of keys, `count` from key `from` on, filled up to `tokens`.
// `first`: units of a row's first part.
template <class A, class Ahead> void attend_rows(const Lanes<A>& queries, int rows, int first, const Tile<A>& keys,
                                                 const Tile<A>& values, int64_t from, int64_t count, int tokens,
                                                 Limits& limits, State& state, Weights<A>& weights, Ahead& ahead) {
  if constexpr (kMatrix<A>) {
    for (int begin = 0; begin < rows; begin += kTogether) {
      const int end = static_cast<int>(least(begin + kTogether, rows));
      MatrixRows<A> together(weights, state, begin);
      ahead.pace(together.steps(end - begin, tokens, queries.units));
      each_row_tile(queries, begin, end, from, count, tokens, limits,
                    [&](int row, int, int enough, const int32_t* relative, auto groups) MLA_INLINE_LAMBDA {
                      together.template soften<groups()>(queries, row, first, keys, values, enough, relative, ahead);
                    });
      together.weigh(values, ahead);
    }
  } else {
    each_row_tile(queries, 0, rows, from, count, tokens, limits,
                  [&](int row, int some, int enough, const int32_t* relative, auto groups) MLA_INLINE_LAMBDA {
                    constexpr int x = groups() == 2 ? kWide<A> : kNarrow<A>;
                    attend<A, x, groups()>(queries, row, some, first, keys, values, enough, relative, state, weights,
                                           ahead);
                  });
  }
}

// A row of `width` numbers of a type; four(d) gives four of them from d on.
template <class Four> MLA_INLINE void write_fours(int width, Type type, char* to, Four&& four) {
  using V = Vec<4>;
  const auto write = [&](auto&& rounded) MLA_INLINE_LAMBDA {
    constexpr int bytes = sizeof(rounded(V::F())) / 4;
    int d = 0;
    for (; d + 4 <= width; d += 4) V::store(to + d * bytes, rounded(four(d)));
    if (d == width) return;
    const auto last = rounded(four(d));
    std::memcpy(to + d * bytes, &last, static_cast<size_t>(width - d) * bytes);
  };
  if (type == Type::f32)
    write([](V::F x) { return x; });
  else
    write(V::to_bf16);
}

// A line of floats -> `width` numbers of a type; reads up to three more.
inline void write_line(const float* line, int width, Type type, char* to) {
  using V = Vec<4>;
  write_fours(width, type, to, [&](int d) MLA_INLINE_LAMBDA { return V::load<V::F>(line + d); });
}

// A row of sums, times a factor -> a row of `width` numbers of a type.
template <class A> void write_sums(const float* sums, float factor, int width, Type type, char* to) {
  using V = Vec<4>;
  write_fours(width, type, to, [&](int d) MLA_INLINE_LAMBDA { return V::load<V::F>(sums + place_of<A>(d)) * factor; });
}

// Rows begin to end - 1 of the sums -> rows of the output and their lse. where(row) says where a row goes.
template <class A, class Where>
void finish(const Attention& call, const State& state, int begin, int end, int width, Type type, Where&& where) {
  for (int row = begin; row < end; ++row) {
    const float total = state.total[row];
    // A total of zero: no key was seen. NaN is neither.
    const bool empty = total == 0.0f;
    const float lse = empty ? -kInfinity : (state.maximum[row] + __builtin_log2f(total)) * kLn2;
    const Place place = where(row);
    *place.lse = lse;
    float factor = empty ? 0.0f : 1.0f / total;
    // exp(lse) / (exp(lse) + exp(sink)): the share of the softmax that the sink leaves to the keys.
    if (call.sinks && !empty) factor /= 1.0f + __builtin_expf(call.sinks[place.h] - lse);
    write_sums<A>(state.row(row), factor, width, type, place.out);
  }
}

} // namespace
} // namespace mla
