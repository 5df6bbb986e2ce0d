// What is done to every token by itself: the norm of a row, and latents on their way into a cache.
#pragma once

#include "rows.h"
#include "threads.h"

namespace mla {
namespace {

// Rows dealt to threads in equal stretches, where their bytes are worth it.
template <class Work> void each_row(int64_t rows, int64_t bytes, int threads, Work&& work) {
  constexpr int64_t worth = 1 << 16;
  const int64_t count = most(1, least(least(threads, rows), rows * bytes / worth));
  team(threads, static_cast<int>(count), [&](int i) {
    for (int64_t row = rows * i / count; row < rows * (i + 1) / count; ++row) work(row);
  });
}

// `lanes` floats on their way to memory, as a type.
template <int lanes, Type type> MLA_INLINE auto rounded(typename Vec<lanes>::F x) {
  if constexpr (type == Type::bf16)
    return Vec<lanes>::to_bf16(x);
  else
    return x;
}

// A row of `width` numbers, in vectors: make(p, i) gives what goes to `to` of the numbers at p, from number i on.
template <int lanes, Type from, class Make> MLA_INLINE void map_row(const char* row, int width, char* to, Make&& make) {
  walk<lanes, bytes_of(from)>(row, width, [&](const char* p, int i) MLA_INLINE_LAMBDA {
    const auto made = make(p, i);
    constexpr int64_t bytes = sizeof made / lanes;
    if (i + lanes <= width)
      std::memcpy(to + i * bytes, &made, sizeof made);
    else
      std::memcpy(to + i * bytes, &made, static_cast<size_t>((width - i) * bytes));
  });
}

// The root mean square of a row becomes one; rounded to the type, times the weight, rounded again.
template <int lanes, Type type> void norm_row(const Norm& call, int64_t row) {
  using V = Vec<lanes>;
  using F = typename V::F;
  using R = Read<lanes, type>;
  const char* x = call.x + row * call.stride_x;
  F squares = {};
  walk<lanes, R::bytes>(x, call.width, [&](const char* p, int) MLA_INLINE_LAMBDA {
    const F numbers = R::one(p);
    squares += numbers * numbers;
  });
  const float factor = 1.0f / __builtin_sqrtf(V::sum(squares) / static_cast<float>(call.width) + call.eps);
  map_row<lanes, type>(x, call.width, call.out + row * call.width * R::bytes, [&](const char* p, int i) {
    const auto one = rounded<lanes, type>(R::one(p) * factor);
    alignas(64) char weight[lanes * R::bytes];
    const char* w = call.weight + static_cast<int64_t>(i) * R::bytes;
    if (i + lanes > call.width) {
      copy_some<lanes * R::bytes>(weight, w, (call.width - i) * R::bytes);
      w = weight;
    }
    return rounded<lanes, type>(R::one(reinterpret_cast<const char*>(&one)) * R::one(w));
  });
}

template <int lanes> void norm_rows(const Norm& call) {
  with(call.type, [&](auto type) {
    if constexpr (type() != Type::i8) // no activations are
      each_row(call.rows, int64_t{call.width} * bytes_of(type()), call.threads,
               [&](int64_t row) { norm_row<lanes, type()>(call, row); });
  });
}

// A row of floats as integers times a scale, which is returned: the largest becomes +-127. NaN and infinity show in
// the scale.
template <int lanes, Type from> float quantise(const char* row, int width, char* to) {
  using V = Vec<lanes>;
  using F = typename V::F;
  using I = typename V::I;
  using R = Read<lanes, from>;
  F largest = {};
  I bad = {};
  walk<lanes, R::bytes>(row, width, [&](const char* p, int) MLA_INLINE_LAMBDA {
    const F numbers = R::one(p);
    bad |= numbers != numbers;
    largest = V::max(V::template as<F>(V::template as<typename V::U>(numbers) & 0x7fffffffu), largest);
  });
  float top = V::any(bad) ? __builtin_nanf("") : 0.0f;
  for (int i = 0; i < lanes; ++i) top = largest[i] > top ? largest[i] : top;
  const float scale = top / 127.0f;
  const F step = V::all(scale > 0.0f ? scale : 1.0f), bound = V::all(127.0f);
  map_row<lanes, from>(row, width, to, [&](const char* p, int) MLA_INLINE_LAMBDA {
    const F exact = R::one(p) / step;
    const F held = exact == exact ? V::max(V::min(exact, bound), -bound) : F{};
    const I whole = V::template as<I>(V::nearest(held)) - V::template as<I>(V::all(V::rounding));
    return __builtin_convertvector(whole, typename V::B);
  });
  return scale;
}

template <int lanes> void store_row(const char* row, Type from, int width, Type to, char* at, char* scale) {
  if (from == to) return void(std::memcpy(at, row, static_cast<size_t>(width) * bytes_of(from)));
  with(from, [&](auto source) {
    using R = Read<lanes, source()>;
    if constexpr (source() == Type::i8) {
      // no new token is
    } else if (to == Type::i8) {
      const float factor = quantise<lanes, source()>(row, width, at);
      std::memcpy(scale, &factor, 4);
    } else if (to == Type::bf16) {
      map_row<lanes, source()>(row, width, at,
                               [](const char* p, int) MLA_INLINE_LAMBDA { return Vec<lanes>::to_bf16(R::one(p)); });
    } else {
      map_row<lanes, source()>(row, width, at, [](const char* p, int) MLA_INLINE_LAMBDA { return R::one(p); });
    }
  });
}

template <int lanes> void append_rows(const Append& call) {
  const int64_t bytes = int64_t{call.r} * bytes_of(call.c_kv.type) + int64_t{call.p} * bytes_of(call.k_rope.type);
  each_row(call.b * call.s, bytes, call.threads, [&](int64_t token) {
    const int64_t sequence = token / call.s, place = token % call.s;
    const int64_t slot = call.slots ? call.slots[token] : 0;
    if (slot < 0) return; // padding
    const int64_t page = call.slots ? slot / call.page_size : sequence;
    const int64_t offset = call.slots ? slot % call.page_size : place;
    const auto at = [&](const Written& to) { return to.data + page * to.page_stride + offset * to.row_stride; };
    const auto row = [&](const Source& x) { return x.data + sequence * x.stride_b + place * x.stride_s; };
    store_row<lanes>(row(call.c_kv), call.c_kv.type, call.r, call.type, at(call.to_c_kv),
                     call.type == Type::i8 ? at(call.to_scale) : nullptr);
    store_row<lanes>(row(call.k_rope), call.k_rope.type, call.p, beside(call.type), at(call.to_k_rope), nullptr);
  });
}

} // namespace
} // namespace mla
