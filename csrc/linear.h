// Linear layers of few rows, up to a hundred or so.
//
// Numbers lie in lanes, and a sum of lanes is one of a product: rows and rows of the weight meet as they lie. The
// weight is met in pieces that the second-level cache holds, while the next piece is on its way there in the order in
// which it lies: memory comes half as fast where several of its rows are read side by side.
#pragma once

#include "rows.h"

namespace mla {
namespace {

// Brings memory that lies in one piece into the second-level cache, two lines at every so many steps.
class LinesAhead {
public:
  static constexpr int bytes = 128; // of a step

  LinesAhead(const char* data, int64_t count, int every = 1)
      : at_(data), end_(data + count), every_(every), wait_(every) {}
  MLA_INLINE void step() {
    if (--wait_ > 0) return;
    wait_ = every_;
    if (at_ >= end_) return;
    __builtin_prefetch(at_, 0, 2);
    __builtin_prefetch(at_ + 64, 0, 2);
    at_ += bytes;
  }

private:
  const char *at_, *end_;
  int every_, wait_;
};

// Rows of `k` numbers, as units of A, that meet every row of a weight.
template <class A> class LinearRows {
  using V = typename A::V;
  using Unit = typename A::Unit;
  // Rows and rows of the weight that meet at a time: as many as registers hold the sums of.
  static constexpr int tall = A::lanes == 16 ? 6 : 4, beside = A::lanes == 16 ? 4 : 3;
  static constexpr int vector = A::lanes * A::per_unit, some = 4; // numbers of a vector, vectors of a step

public:
  static constexpr int kMost = 128; // rows

  // `most`: rows that there may be; `k`: of the longest of them.
  void carve(Carver& carver, int most, int k) {
    line_ = carver.take<float>(most * kKeys<A> + 4);
    units_ = carver.take<uint32_t>(most * stride_of(k));
    weights_ = carver.take<uint32_t>(A::stored(Type::bf16) ? 0 : beside * stride_of(k));
  }

  // row(i) says where a row is, of a type.
  template <class Row> void set(int rows, int k, Type type, Row&& row) {
    rows_ = rows;
    k_ = k;
    stride_ = stride_of(k);
    for (int i = 0; i < rows; ++i) with(type, [&](auto known) { pack<known()>(row(i), units_ + i * stride_); });
  }

  // Times `count` rows of a weight; where(row, first) says where the outputs of a row go, from `first` on.
  template <Type type, class Where>
  void multiply(const char* w, int64_t stride, int count, Type out, LinesAhead& ahead, Where&& where) {
    for (int first = 0; first < count; first += kKeys<A>) {
      const int part = static_cast<int>(least(kKeys<A>, count - first));
      int n = 0;
      // With shorter vectors a single row is quicker without: one row of the weight after the other comes by itself.
      if (rows_ > 1 || A::lanes == 16)
        for (; n + beside <= part; n += beside) meet<type, beside>(w + (first + n) * stride, stride, n, ahead);
      for (; n < part; ++n) meet<type, 1>(w + (first + n) * stride, stride, n, ahead);
      for (int row = 0; row < rows_; ++row) write_line(line_ + row * kKeys<A>, part, out, where(row, first));
    }
  }

  // How often rows of the weight are met.
  int groups() const { return (rows_ + tall - 1) / tall; }

private:
  static int64_t stride_of(int k) { return odd_stride(up(k, some * vector) / A::per_unit); }

  // Zeros follow, up to a whole step.
  template <Type type> void pack(const char* data, uint32_t* to) {
    const int64_t whole = k_ / A::per_unit, padded = up(k_, some * vector) / A::per_unit;
    std::memset(to + whole, 0, static_cast<size_t>(padded - whole) * 4);
    if constexpr (type != Type::i8) A::template pack<type>(data, k_, 1.0f, to);
  }

  // All rows, in groups of about equal size.
  template <Type type, int weights> void meet(const char* w, int64_t stride, int n, LinesAhead& ahead) {
    const int groups = this->groups();
    if constexpr (!A::stored(type)) {
      if (groups > 1) { // what is no units yet becomes units once for all groups
        for (int m = 0; m < weights; ++m) pack<type>(w + m * stride, weights_ + m * stride_);
        return meet<Type::f32, weights>(reinterpret_cast<const char*>(weights_), stride_ * 4, n, ahead);
      }
    }
    for (int i = 0; i < groups; ++i) {
      const int row = rows_ * i / groups, count = rows_ * (i + 1) / groups - row;
      with_count<tall>(count, [&](auto rows) MLA_INLINE_LAMBDA {
        this->template dots<type, rows(), weights>(w, stride, row, n, ahead);
      });
    }
  }

  template <Type type, int rows, int weights>
  void dots(const char* w, int64_t stride_w, int row, int n, LinesAhead& ahead) {
    constexpr int pairs = rows * weights, chains = pairs >= 8 ? 1 : pairs >= 4 ? 2 : some; // a sum waits for itself
    constexpr int bytes = bytes_of(type), lines = weights > 1 ? some * vector * bytes * weights / LinesAhead::bytes : 0;
    const uint32_t* x = units_ + row * stride_;
    typename A::Sum sums[chains][pairs] = {};
    const auto step = [&](const char* p, int64_t stride, int unit) MLA_INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int j = 0; j < some; ++j) {
        Unit weight[weights];
#pragma GCC unroll 4
        for (int m = 0; m < weights; ++m) weight[m] = read<type>(p + m * stride + j * vector * bytes);
        for (int i = lines * j / some; i < lines * (j + 1) / some; ++i) ahead.step();
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          const Unit here = V::template load<Unit>(x + r * stride_ + unit + j * A::lanes);
#pragma GCC unroll 4
          for (int m = 0; m < weights; ++m) {
            auto& sum = sums[j % chains][r * weights + m];
            sum = A::dot(sum, here, weight[m]);
          }
        }
      }
    };
    constexpr int numbers = some * vector;
    int i = 0;
    for (; i + numbers <= k_; i += numbers) step(w + int64_t{i} * bytes, stride_w, i / A::per_unit);
    if (i < k_) { // zeros beyond the end
      alignas(64) char tail[weights][numbers * bytes];
      for (int m = 0; m < weights; ++m)
        copy_some<numbers * bytes>(tail[m], w + m * stride_w + int64_t{i} * bytes, (k_ - i) * bytes);
      step(tail[0], numbers * bytes, i / A::per_unit);
    }
    typename V::F values[pairs];
#pragma GCC unroll 24
    for (int pair = 0; pair < pairs; ++pair) {
      for (int j = 1; j < chains; ++j) sums[0][pair] += sums[j][pair];
      values[pair] = A::value(sums[0][pair]);
    }
    float totals[up(pairs, A::lanes)];
    V::sums(values, totals);
    for (int r = 0; r < rows; ++r) std::memcpy(line_ + (row + r) * kKeys<A> + n, totals + r * weights, weights * 4);
  }

  template <Type type> static MLA_INLINE Unit read(const char* p) {
    if constexpr (A::stored(type))
      return V::template load<Unit>(p);
    else
      return Read<A::lanes, type>::one(p);
  }

  float* line_;       // [rows][kKeys] outputs
  uint32_t* units_;   // [rows][stride_]
  uint32_t* weights_; // [beside][stride_]
  int rows_, k_;
  int64_t stride_;
};

// Outputs are dealt to threads in equal stretches.
template <class A, Type type> class Layer {
public:
  static void run(const Linear& call) {
    const int64_t stretches = up(call.n, apart) / apart;
    const int threads =
        static_cast<int>(most(1, least(least(call.threads, stretches), call.n * call.stride_w / worth)));
    const auto carve = [&](Carver& carver) {
      LinearRows<A> rows;
      rows.carve(carver, static_cast<int>(least(LinearRows<A>::kMost, call.rows)), call.k);
      return rows;
    };
    Carver count(nullptr);
    carve(count);
    const Memory memory(count.used() * threads);
    team(call.threads, threads, [&](int i) {
      Carver carver(memory.data + count.used() * i);
      LinearRows<A> rows = carve(carver);
      multiply(call, rows, stretches * i / threads * apart, least(call.n, stretches * (i + 1) / threads * apart));
    });
  }

private:
  static constexpr int64_t size = bytes_of(type);
  static constexpr int64_t worth = 1 << 16, apart = 48; // bytes that are worth a thread, outputs of a stretch
  static constexpr int64_t piece = 1 << 18;             // bytes of the weight that a cache holds beside others

  // Outputs from..to-1, piece by piece, each with the memory of the next.
  static void multiply(const Linear& call, LinearRows<A>& rows, int64_t from, int64_t to) {
    constexpr int all = LinearRows<A>::kMost;
    const int64_t some = most(1, piece / (call.k * size * apart)) * apart;
    for (int row = 0; row < call.rows; row += all) {
      rows.set(static_cast<int>(least(all, call.rows - row)), call.k, type,
               [&](int i) { return call.x + (row + i) * call.stride_x; });
      for (int64_t first = from; first < to; first += some) {
        const int64_t next = least(first + some, to), after = least(next + some, to);
        LinesAhead ahead(call.w + next * call.stride_w, (after - next) * call.stride_w, rows.groups());
        rows.template multiply<type>(
            call.w + first * call.stride_w, call.stride_w, static_cast<int>(next - first), type, ahead,
            [&](int i, int output) { return call.out + ((row + i) * int64_t{call.n} + first + output) * size; });
      }
    }
  }
};

} // namespace
} // namespace mla
