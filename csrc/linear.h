// Linear layers for up to a hundred rows or so.
//
// With few, reading the weight is all that they cost. It is read one row after the other, in the order in which it
// lies: memory comes half as fast where four rows are read side by side (docs/performance.md). With more, rows lie in
// lanes and meet pieces of the weight that the second-level cache holds, while the next piece is on its way there.
#pragma once

#include "rows.h"

namespace mla {
namespace {

// Rows of `k` numbers that meet every row of a weight of a type, as units of A side by side.
template <class A, Type type> class FewRows {
  using V = typename A::V;
  using Unit = typename A::Unit;
  static constexpr int bytes = bytes_of(type), vector = A::lanes * A::per_unit, some = 4;

public:
  static int64_t units(int k) { return up(k, some * vector) / A::per_unit; }

  // Room for `rows` rows of units(k); `line` has room for kKeys outputs of each.
  FewRows(int rows, int k, uint32_t* units, float* line) : rows_(rows), k_(k), units_(units), line_(line) {}

  void set(int row, const char* data, Type from) {
    uint32_t* to = units_ + row * units(k_);
    std::memset(to + k_ / A::per_unit, 0, static_cast<size_t>(units(k_) - k_ / A::per_unit) * 4);
    with(from, [&](auto known) {
      if constexpr (known() != Type::i8) A::template pack<known()>(data, k_, 1.0f, to);
    });
  }

  // Times `count` rows of a weight; where(row, first) says where the outputs of a row go, from `first` on.
  template <class Ahead, class Where>
  void multiply(const char* w, int64_t stride, int count, Type out, Ahead& ahead, Where&& where) {
    for (int first = 0; first < count; first += kKeys) {
      const int part = static_cast<int>(least(kKeys, count - first));
      for (int n = 0; n < part; ++n) dots(w + (first + n) * stride, n, ahead);
      for (int row = 0; row < rows_; ++row) write_line(line_ + row * kKeys, part, out, where(row, first));
    }
  }

private:
  // Two rows at a time; the next two find the weights in the cache.
  template <class Ahead> MLA_INLINE void dots(const char* w, int n, Ahead& ahead) {
    int row = 0;
    for (; row + 2 <= rows_; row += 2) dots<2>(w, row, n, ahead);
    if (row < rows_) dots<1>(w, row, n, ahead);
  }

  template <int rows, class Ahead> MLA_INLINE void dots(const char* w, int row, int n, Ahead& ahead) {
    constexpr int chains = some / rows; // a sum waits for itself
    const uint32_t* x = units_ + row * units(k_);
    const int64_t stride = units(k_);
    typename A::Sum sums[rows][chains] = {};
    walk<some * vector, bytes>(w, k_, [&](const char* p, int i) MLA_INLINE_LAMBDA {
      ahead.step();
#pragma GCC unroll 4
      for (int j = 0; j < some; ++j) {
        const Unit weight = unit(p + j * vector * bytes);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
          sums[r][j % chains] = A::dot(sums[r][j % chains],
                                       V::template load<Unit>(x + r * stride + i / A::per_unit + j * A::lanes), weight);
      }
    });
    for (int r = 0; r < rows; ++r) {
      for (int j = 1; j < chains; ++j) sums[r][0] += sums[r][j];
      line_[(row + r) * kKeys + n] = V::sum(A::value(sums[r][0]));
    }
  }

  static MLA_INLINE Unit unit(const char* p) {
    if constexpr (A::stored(type))
      return V::template load<Unit>(p);
    else
      return Read<A::lanes, type>::one(p);
  }

  int rows_, k_;
  uint32_t* units_;
  float* line_;
};

// Brings memory that lies in one piece into the second-level cache, two lines at every step of a product.
class LinesAhead {
public:
  LinesAhead(const char* data, int64_t bytes) : at_(data), end_(data + bytes) {}
  MLA_INLINE void step() {
    if (at_ >= end_) return;
    __builtin_prefetch(at_, 0, 2);
    __builtin_prefetch(at_ + 64, 0, 2);
    at_ += 128;
  }

private:
  const char *at_, *end_;
};

// `count` rows of a weight, `width` numbers each, as a tile of `tokens` rows; where they lie, if `there`.
template <class A>
void load(const char* data, int64_t stride, Type type, int width, int count, int tokens, bool there, Tile<A>& tile) {
  if (there && count == tokens && Tile<A>::lendable(type, data, stride)) return tile.borrow(data, stride, count);
  tile.pack(type, tokens, [&](int i, auto&& take) {
    if (i < count) take(Parts{{data + i * stride, type, width, 1.0f}, {}});
    return i < count;
  });
}

// Rows of `k` numbers, in lanes, that meet every row of a weight.
template <class A, int wide_x, int narrow_x> struct ManyRows {
  static constexpr int kMost = 128;         // rows
  static constexpr int64_t kCrowded = 1024; // bytes

  Lanes<A> lanes;
  Tile<A> weights;
  float *scores, *line; // [kKeys][row of the tile], [kKeys]
  int k, rows;

  // `most`: rows that there may be; `units` of the longest of them.
  void carve(Carver& carver, int most, int units) {
    lanes.carve(carver, most, units);
    weights.carve(carver, units);
    scores = carver.take<float>(kKeys * 2 * A::lanes);
    line = carver.take<float>(kKeys + 4);
  }

  // row(i) says where a row is, of a type.
  template <class Row> void set(int count, int width, Type type, Row&& row) {
    k = width;
    rows = count;
    lanes.units = units_of<A>(width);
    lanes.pack(count, 1.0f, [&](int i) { return Parts{{row(i), type, width, 1.0f}, {}}; });
  }

  // Times `count` rows of a weight; where(row, first) says where the outputs of a row go, from `first` on.
  template <class Ahead, class Where>
  void multiply(const char* w, int64_t stride, Type type, int count, Type out, Ahead& ahead, Where&& where) {
    // A product reads a line of each of narrow_x rows by and by. If they lie a power of two apart, the first-level
    // cache cannot hold these together.
    const int last = rows % (2 * A::lanes);
    const bool crowded = stride % kCrowded == 0 && last > 0 && last <= A::lanes;
    const bool there = lanes.units * A::per_unit == k && !crowded;
    int part;
    for (int first = 0; first < count; first += part) {
      part = static_cast<int>(least(kKeys, count - first));
      if (part > narrow_x) part -= part % narrow_x;
      const int tokens = static_cast<int>(up(part, narrow_x));
      load(w + first * stride, stride, type, k, part, tokens, there, weights);
      for (int row = 0; row < rows; row += 2 * A::lanes) {
        const int some = static_cast<int>(least(2 * A::lanes, rows - row));
        const int across = static_cast<int>(up(some, A::lanes));
        if (across > A::lanes)
          score<A, wide_x, 2>(lanes, row, 0, weights, tokens, scores, ahead);
        else
          score<A, narrow_x, 1>(lanes, row, 0, weights, tokens, scores, ahead);
        for (int i = 0; i < some; ++i) {
          for (int t = 0; t < part; ++t) line[t] = scores[t * across + i];
          write_line(line, part, out, where(row + i, first));
        }
      }
    }
  }
};

// Outputs are dealt to threads in equal stretches.
template <class A, Type type, int wide_x, int narrow_x> class Layer {
public:
  static void run(const Linear& call) {
    const Layer layer(call);
    if (layer.few())
      layer.run<FewScratch>();
    else
      layer.run<ManyScratch>();
  }

private:
  static constexpr int64_t size = bytes_of(type);
  static constexpr int64_t near = 18 << 10; // bytes of rows, with one of the weight, for the first-level cache
  static constexpr int64_t worth = 1 << 16, apart = 2 * narrow_x; // bytes that are worth a thread, outputs of a stretch
  static constexpr int64_t piece = 1 << 18; // bytes of the weight that a cache holds beside others

  explicit Layer(const Linear& call) : call_(call) {}

  bool few() const {
    return call_.rows <= 3 || (call_.rows <= 8 && (call_.rows + int64_t{1}) * call_.k * size <= near);
  }

  struct FewScratch {
    using Rows = FewRows<A, type>;
    uint32_t* units;
    float* line;

    void carve(Carver& carver, const Linear& call) {
      units = carver.take<uint32_t>(call.rows * Rows::units(call.k));
      line = carver.take<float>(call.rows * kKeys + 4);
    }
    void multiply(const Layer& layer, int64_t from, int64_t to) {
      const Linear& call = layer.call_;
      Rows rows(call.rows, call.k, units, line);
      for (int row = 0; row < call.rows; ++row) rows.set(row, call.x + row * call.stride_x, type);
      NoAhead ahead;
      rows.multiply(call.w + from * call.stride_w, call.stride_w, static_cast<int>(to - from), type, ahead,
                    [&](int row, int first) { return layer.out(row, from + first); });
    }
  };

  struct ManyScratch {
    using Rows = ManyRows<A, wide_x, narrow_x>;
    Rows many;

    void carve(Carver& carver, const Linear& call) {
      many.carve(carver, static_cast<int>(least(call.rows, Rows::kMost)), units_of<A>(call.k));
    }
    void multiply(const Layer& layer, int64_t from, int64_t to) {
      const Linear& call = layer.call_;
      const int64_t some = most(narrow_x, piece / (call.k * size) / narrow_x * narrow_x);
      for (int row = 0; row < call.rows; row += Rows::kMost) {
        many.set(static_cast<int>(least(Rows::kMost, call.rows - row)), call.k, type,
                 [&](int i) { return call.x + (row + i) * call.stride_x; });
        for (int64_t first = from; first < to; first += some) {
          const int64_t next = least(first + some, to), after = least(next + some, to);
          LinesAhead ahead(call.w + next * call.stride_w, (after - next) * call.stride_w);
          many.multiply(call.w + first * call.stride_w, call.stride_w, type, static_cast<int>(next - first), type,
                        ahead, [&](int i, int output) { return layer.out(row + i, first + output); });
        }
      }
    }
  };

  template <class Scratch> void run() const {
    const int64_t stretches = up(call_.n, apart) / apart;
    const int threads =
        static_cast<int>(most(1, least(least(call_.threads, stretches), call_.n * call_.stride_w / worth)));
    Carver count(nullptr);
    Scratch().carve(count, call_);
    const Memory memory(count.used() * threads);
    team(threads, [&](int i) {
      Carver carver(memory.data + count.used() * i);
      Scratch scratch;
      scratch.carve(carver, call_);
      scratch.multiply(*this, stretches * i / threads * apart, least(call_.n, stretches * (i + 1) / threads * apart));
    });
  }

  char* out(int64_t row, int64_t output) const { return call_.out + (row * call_.n + output) * size; }

  const Linear& call_;
};

} // namespace
} // namespace mla
