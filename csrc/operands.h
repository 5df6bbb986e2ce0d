// What the products of attention read: rows of queries in lanes, tiles of keys, and their values; and the product
// itself.
#pragma once

#include <type_traits>
#include <utility>

#include "arithmetic.h"

namespace mla {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

// Keys that meet two vectors of rows at a time, or one: as many as registers hold the sums of.
template <class A> constexpr int kWide = kMatrix<A> ? A::lanes * A::per_unit : A::lanes * 3 / 4;
template <class A> constexpr int kNarrow = kMatrix<A> ? A::lanes * A::per_unit : A::lanes * 3 / 2;
// Keys per tile: a multiple of both.
template <class A> constexpr int kKeys = kMatrix<A> ? 512 / A::per_unit : 120;

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

// Whether one number may need two units, the second of which holds what rounding took from the first.
template <class A> constexpr bool has_digits() {
  if constexpr (kSplit<A>)
    return A::second > 0;
  else
    return false;
}
template <class A> constexpr bool kDigits = has_digits<A>();

// Units of a row of two parts, the second from its own unit on.
template <class A> constexpr int units_of(int a, int b) {
  if constexpr (kSplit<A>)
    return units_of<A>(a) + units_of<typename A::Rest>(b);
  else
    return units_of<A>(a) + units_of<A>(b);
}

// The last few rows may lie by fours: a vector holds four rows with four units of each, and leaves no lanes idle.
template <class A> constexpr bool kFours = A::lanes == 16 && A::per_unit > 1 && !kMatrix<A>;
constexpr int kMostFours = 3; // sixteen rows fill a vector as they are

// Whether rows of two parts may: what is multiplied by itself must be whole fours of units.
template <class A> constexpr bool takes_fours(int a, int b) {
  return kFours<A> && units_of<A>(a, b) % 4 == 0 && (!kSplit<A> || units_of<A>(a) % 4 == 0);
}

// The same with the second digits, if there are any.
template <class A> constexpr int query_units_of(int a, int b) {
  if constexpr (kSplit<A>)
    return units_of<A>(a, b) + (kDigits<A> ? units_of<A>(a) : 0);
  else
    return units_of<A>(a, b);
}

// Rows of queries or of output channels, in lanes.
template <class A> struct Lanes {
  uint32_t* packed; // row tile by row tile: [unit][row of the tile]
  float* factors;   // [rows] what a product with a row, of integers with its first part, is to be multiplied by
  float* rests;     // [rows] of the second part
  bool* second;     // [rows] whether the second digits matter
  int whole;        // rows in lanes, whole vectors of them; those from here on, if any, are a tile that lies by fours
  int fours;        // how many fours these are: [unit / 4][four][4 rows][4 units]
  uint32_t* lines;  // room for as many rows as a vector has lanes
  int units;        // of a row

  void carve(Carver& carver, int64_t rows, int row_units) {
    units = row_units;
    packed = carver.take<uint32_t>(up(rows, A::lanes) * units);
    factors = carver.take<float>(up(rows, A::lanes));
    rests = carver.take<float>(up(rows, A::lanes));
    second = carver.take<bool>(up(rows, A::lanes));
    lines = carver.take<uint32_t>(A::lanes * line_units());
  }
  const uint32_t* tile(int row) const { return packed + static_cast<int64_t>(row) * units; }
  // The rows of the tile that begins with `row`, of `count` in all, without those that fill it up.
  int rows_of_tile(int row, int count) const {
    return static_cast<int>(least(2 * A::lanes, least(count, row < whole ? whole : count) - row));
  }

  // row(i) gives the parts of row i; lanes beyond `count` are zero. `gain` multiplies every number. `by_fours`: whether
  // the last few rows lie so.
  template <class Row> void pack(int count, float gain, Row&& row, bool by_fours = false) {
    const int padded = static_cast<int>(up(count, A::lanes)), last = count % A::lanes;
    fours = by_fours && last <= 4 * kMostFours ? (last + 3) / 4 : 0;
    whole = fours ? count - last : padded;
    for (int i = 0; i < padded; ++i) {
      uint32_t* to = line(i % A::lanes);
      factors[i] = rests[i] = 0.0f;
      second[i] = false;
      if (i < count)
        pack_row(i, row(i), gain, to);
      else
        std::memset(to, 0, static_cast<size_t>(units) * 4);
      if ((i + 1) % A::lanes == 0) i < whole ? turn(i + 1 - A::lanes) : keep_fours();
    }
  }

  // Room for row i of a vector of rows, before it is turned into lanes.
  uint32_t* line(int i) const { return lines + i * line_units(); }

private:
  int64_t line_units() const { return odd_stride(units + 4 * A::lanes); }

  void pack_row(int i, const Parts& parts, float gain, uint32_t* to) {
    with(parts.a.type, [&](auto type) {
      if constexpr (type() == Type::i8) {
        // no query is
      } else if constexpr (kSplit<A>) {
        const Factors own = A::template pack_query<type()>(parts, to);
        factors[i] = own.first * gain;
        rests[i] = own.rest * gain;
        second[i] = own.second;
      } else {
        mla::pack<A, type()>(parts.a, 1.0f, to);
        mla::pack<A, type()>(parts.b, 1.0f, to + units_of<A>(parts.a.count));
        factors[i] = gain; // numbers that are bf16 already stay what they are
      }
    });
  }

  // The lines, which are the last rows -> fours.
  void keep_fours() {
    uint32_t* to = packed + static_cast<int64_t>(whole) * units;
    for (int u = 0; u < units; u += 4)
      for (int i = 0; i < 4 * fours; ++i, to += 4) std::memcpy(to, line(i) + u, 16);
  }

  // The lines -> lanes of the row tile that holds row `first`.
  void turn(int first) {
    using V = typename A::V;
    using F = typename V::F;
    const int begin = first / (2 * A::lanes) * 2 * A::lanes;
    const int64_t width = least(2 * A::lanes, whole - begin);
    uint32_t* to = packed + static_cast<int64_t>(begin) * units + (first - begin);
    for (int u = 0; u < units; u += A::lanes) {
      F rows[A::lanes];
      for (int i = 0; i < A::lanes; ++i) rows[i] = V::template load<F>(line(i) + u);
      V::transpose(rows);
      for (int i = 0; i < A::lanes && u + i < units; ++i) V::store(to + (u + i) * width, rows[i]);
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
  void steps() {}
  void pace(int64_t) {}
};

// Vectors of units that lie `step` units apart.
template <class A, class Step> struct Ready {
  const uint32_t* at;
  Step step;
  template <int G> MLA_INLINE void next(typename A::Unit (&vectors)[G]) {
#pragma GCC unroll 3
    for (int g = 0; g < G; ++g) vectors[g] = A::V::template load<typename A::Unit>(at + g * A::lanes);
    at += step;
  }
};

// One pair of the vectors that interleaving `per_unit` rows gives.
template <class A, int pair> struct Interleaved {
  const uint32_t* at;
  int64_t stride; // of a row
  MLA_INLINE void next(typename A::Unit (&vectors)[2]) {
    A::template interleave<pair>(at, stride, vectors);
    at += A::per_unit * stride;
  }
};

// sums[x][g] = sum over k of vectors[k][g] . spread(a[x * across + k * along]), then done(x, g, sum). Rows in lanes
// meet keys that are spread, or `values` in lanes meet probabilities: to some arithmetics the sides differ. `fours`
// spreads four units at a time, k * along being the first of them.
template <class A, int X, int G, bool values = false, bool fours = false, class Vectors, class Across, class Ahead,
          class Done>
MLA_INLINE void product(Vectors vectors, int length, const uint32_t* a, Across across, int64_t along, Ahead& ahead,
                        Done&& done) {
  typename A::Sum sums[X][G] = {};
  Broadcasts<X, Across> from(a, across);
#pragma GCC unroll 2
  for (int k = 0; k < length; ++k, from.step(along)) {
    typename A::Unit rows[G];
    vectors.next(rows);
#pragma GCC unroll 24
    for (int x = 0; x < X; ++x) {
      // A step by fours does the work of four and fetches as many lines for every key as others do; not of integers,
      // whose rows lie apart: to turn from one to the next among the products costs more than it saves.
      if (x % (fours && !kSplit<A> ? 6 : X) == 0) ahead.step();
      typename A::Unit one;
      if constexpr (fours)
        one = A::spread_four(from[x]);
      else
        one = A::spread(from[x]);
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g)
        sums[x][g] = values ? A::dot(sums[x][g], one, rows[g]) : A::dot(sums[x][g], rows[g], one);
    }
  }
#pragma GCC unroll 24
  for (int x = 0; x < X; ++x)
#pragma GCC unroll 3
    for (int g = 0; g < G; ++g) done(x, g, A::value(sums[x][g]));
}

// A tile of keys (or values) of `A`: rows of units, and what belongs to each of them.
template <class A> struct Tile {
  const uint32_t* rows; // [kKeys][stride], the tile's own or the cache's
  int64_t stride;       // units from row to row
  float* factors;       // [kKeys] of the first part
  float* rests;         // [kKeys] of the second part
  float* offsets;       // [kKeys] what is to be taken from products with the first part
  bool* hidden;         // [kKeys] whether nobody sees a key

  void carve(Carver& carver, int units) {
    own_stride_ = odd_stride(units);
    own_ = carver.take<uint32_t>(kKeys<A> * own_stride_ + 4 * A::lanes + 32);
    factors = carver.take<float>(kKeys<A>);
    rests = carver.take<float>(kKeys<A>);
    offsets = carver.take<float>(kKeys<A>);
    hidden = carver.take<bool>(kKeys<A>);
  }
  // Whether rows of `type` at `data`, `step` bytes apart, are units where they lie.
  static bool lendable(Type type, const char* data, int64_t step) {
    return A::stored(type) && (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(step)) % 4 == 0;
  }
  // The first `count` rows are those, and all are seen.
  void borrow(const char* data, int64_t step, int count) {
    rows = reinterpret_cast<const uint32_t*>(data);
    stride = step / 4;
    for (int i = 0; i < count; ++i) hidden[i] = false;
  }
  // Rows 0..count-1, whose first parts are of `type`. row(i, take), called in order, hands the parts to take(parts) and
  // returns true, or false for a row that nobody sees.
  template <class Row> void pack(Type type, int count, Row&& row) {
    rows = own_;
    stride = own_stride_;
    with(type, [&](auto constant) {
      Parts parts[A::together];
      int places[A::together], some = 0;
      for (int i = 0; i < count; ++i) {
        const auto take = [&](const Parts& seen) MLA_INLINE_LAMBDA {
          parts[some] = seen;
          places[some++] = i;
        };
        if (!row(i, take)) erase(i);
        if (some == A::together || i == count - 1) pack_rows<constant()>(parts, places, std::exchange(some, 0));
      }
    });
  }

private:
  uint32_t* at(int i) const { return own_ + i * own_stride_; }
  template <Type type> MLA_INLINE void pack_rows(const Parts* parts, const int* places, int count) {
    if constexpr (!kSplit<A>) {
      for (int i = 0; i < count; ++i) {
        uint32_t* to = at(places[i]);
        hidden[places[i]] = false;
        mla::pack<A, type>(parts[i].a, 1.0f, to);
        mla::pack<A, beside(type)>(parts[i].b, 1.0f, to + units_of<A>(parts[i].a.count));
      }
    } else if constexpr (A::holds(type)) {
      typename A::Measure measures[A::together];
      for (int i = 0; i < count; ++i) measures[i] = A::template measure<type>(parts[i]);
      for (int i = 0; i < count; ++i) {
        const Factors own = A::template pack_key<type>(parts[i], measures[i], at(places[i]));
        hidden[places[i]] = false;
        factors[places[i]] = own.first;
        rests[places[i]] = own.rest;
        offsets[places[i]] = own.offset;
      }
    }
  }
  void erase(int i) {
    std::memset(at(i), 0, static_cast<size_t>(own_stride_) * 4);
    factors[i] = rests[i] = offsets[i] = 0.0f;
    hidden[i] = true;
  }

  uint32_t* own_;
  int64_t own_stride_;
};

// Where number d of a value stands in a row of sums: in every 16 bytes of units, four numbers of each interleaved key.
template <class A> constexpr int place_of(int d) {
  constexpr int chunk = A::per_unit * A::lanes, four = 4 * A::per_unit;
  return d / chunk * chunk + d % four / 4 * A::lanes + d % chunk / four * 4 + d % 4;
}

} // namespace
} // namespace mla
