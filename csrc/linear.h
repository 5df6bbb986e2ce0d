// Linear layers for few rows: reading the weight is all that they cost.
//
// The weight is read one row after the other, in the order in which it lies: memory comes half as fast where four rows
// are read side by side (docs/performance.md).
#pragma once

#include "rows.h"

namespace mla {
namespace {

// Rows of `k` numbers that meet every row of a weight of a type, as units of A side by side.
template <class A, Type type> class FewRows {
  using V = typename A::V;
  using Unit = typename A::Unit;
  static constexpr int bytes = type == Type::f32 ? 4 : 2, vector = A::lanes * A::per_unit, some = 4;

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

// Outputs are dealt to threads in equal stretches.
template <class A, Type type> void few_rows(const Linear& call) {
  using Rows = FewRows<A, type>;
  constexpr int64_t worth = 1 << 16, apart = 32; // bytes that are worth a thread, outputs that may share a cache line
  const int64_t stretches = up(call.n, apart) / apart;
  const int threads = static_cast<int>(most(1, least(least(call.threads, stretches), call.n * call.stride_w / worth)));
  Carver count(nullptr);
  const auto carve = [&](Carver& carver) {
    uint32_t* units = carver.take<uint32_t>(call.rows * Rows::units(call.k));
    return Rows(call.rows, call.k, units, carver.take<float>(call.rows * kKeys + 4));
  };
  carve(count);
  const Memory memory(count.used() * threads);
  team(threads, [&](int i) {
    Carver carver(memory.data + count.used() * i);
    Rows rows = carve(carver);
    for (int row = 0; row < call.rows; ++row) rows.set(row, call.x + row * call.stride_x, call.type);
    const int64_t from = stretches * i / threads * apart, to = least(call.n, stretches * (i + 1) / threads * apart);
    const int64_t size = call.type == Type::f32 ? 4 : 2;
    NoAhead ahead;
    rows.multiply(call.w + from * call.stride_w, call.stride_w, static_cast<int>(to - from), call.type, ahead,
                  [&](int row, int first) { return call.out + (int64_t{row} * call.n + from + first) * size; });
  });
}

} // namespace
} // namespace mla
