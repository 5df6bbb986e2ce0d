// Vectors of the compiler, for everything that every instruction set does alike.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MLA_INLINE inline __attribute__((always_inline))
#define MLA_INLINE_LAMBDA __attribute__((always_inline))

namespace mla {
namespace { // each instruction set compiles its own copy: nothing here may be merged across them

// GCC drops the attribute where the size depends on a parameter, hence once for every size.
template <int lanes> struct Vectors;
#define MLA_VECTORS(lanes)                                                                                             \
  template <> struct Vectors<lanes> {                                                                                  \
    typedef float F __attribute__((vector_size(lanes * 4)));                                                           \
    typedef int32_t I __attribute__((vector_size(lanes * 4)));                                                         \
    typedef uint32_t U __attribute__((vector_size(lanes * 4)));                                                        \
    typedef uint16_t H __attribute__((vector_size(lanes * 2)));                                                        \
    typedef int8_t B __attribute__((vector_size(lanes)));                                                              \
  };
MLA_VECTORS(4)
MLA_VECTORS(8)
MLA_VECTORS(16)
#undef MLA_VECTORS

template <int lanes> struct Vec {
  using F = typename Vectors<lanes>::F;
  using I = typename Vectors<lanes>::I;
  using U = typename Vectors<lanes>::U;
  using H = typename Vectors<lanes>::H;
  using B = typename Vectors<lanes>::B;

  template <class V> static MLA_INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  template <class V> static MLA_INLINE void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
  template <class To, class From> static MLA_INLINE To as(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &v, sizeof to);
    return to;
  }
  static MLA_INLINE F all(float x) { return x - F{}; } // not x + F{}: that makes 0 of -0, and would be computed
  static MLA_INLINE U all(uint32_t x) { return U{} + x; }
  static MLA_INLINE F max(F a, F b) { return a > b ? a : b; }
  static MLA_INLINE F min(F a, F b) { return a < b ? a : b; }
  static MLA_INLINE bool any(I mask) {
    int32_t found = 0;
    for (int i = 0; i < lanes; ++i) found |= mask[i];
    return found != 0;
  }
  // Lane i of the result is lane Place::of(i) of a and b, one after the other.
  template <class Place, int... i> static MLA_INLINE F pick(F a, F b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Place::of(i)...);
#else
    return __builtin_shuffle(a, b, I{Place::of(i)...});
#endif
  }
  template <class Place> static MLA_INLINE F pick(F a, F b) {
    return pick<Place>(a, b, std::make_integer_sequence<int, lanes>());
  }
  template <int width> struct Swapped {
    static constexpr int of(int i) { return i ^ width; }
  };
  template <int width = lanes / 2> static MLA_INLINE float sum(F v) {
    if constexpr (width == 0)
      return v[0];
    else
      return sum<width / 2>(v + pick<Swapped<width>>(v, v));
  }

  template <int width> struct Upper {
    static constexpr int of(int i) { return i & width ? lanes + (i ^ width) : i; }
  };
  template <int width> struct Lower {
    static constexpr int of(int i) { return i & width ? lanes + i : i ^ width; }
  };
  // The sum of each of `count` vectors -> as many floats, up to whole vectors: two halves of two vectors at a time.
  template <int width = lanes / 2> static MLA_INLINE F fold(F (&v)[lanes]) {
    if constexpr (width > 0) {
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) v[i] = both<width>(v[i], v[i + width]);
      return fold<width / 2>(v);
    }
    return v[0];
  }
  template <int count> static MLA_INLINE void sums(const F (&v)[count], float* to) {
#pragma GCC unroll 8
    for (int first = 0; first < count; first += lanes) {
      F some[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) some[i] = first + i < count ? v[first + i < count ? first + i : 0] : F{};
      store(to + first, fold(some));
    }
  }

  // The sums of each four lanes of up to three vectors, those of vector g in the lanes from 4 * g on; lanes beyond
  // repeat some of these.
  struct Columns {
    static constexpr int of(int i) { return i % 4 * 4 + i / 4; }
  };
  template <int width> static MLA_INLINE F both(F v) { return v + pick<Swapped<width>>(v, v); }
  template <int width> static MLA_INLINE F both(F a, F b) {
    return pick<Upper<width>>(a, b) + pick<Lower<width>>(a, b);
  }
  template <int count> static MLA_INLINE F sums_of_four(const F (&v)[count]) {
    static_assert(lanes == 16 && count <= 3);
    F sum = count > 2 ? both<2>(v[0], v[count - 1]) : both<2>(v[0]);
    sum = count > 1 ? both<1>(sum, both<2>(v[count > 1])) : both<1>(sum);
    return pick<Columns>(sum, sum);
  }

  // Rows become columns.
  template <int width = lanes / 2> static MLA_INLINE void transpose(F (&rows)[lanes]) {
    if constexpr (width > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (i & width) continue;
        const F a = rows[i], b = rows[i | width];
        rows[i] = pick<Upper<width>>(a, b);
        rows[i | width] = pick<Lower<width>>(a, b);
      }
      transpose<width / 2>(rows);
    }
  }

  static MLA_INLINE H to_bf16(F x) { // nearest, ties to even
    const U bits = as<U>(x);
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded, H);
  }

  // |x| < 2^22 plus this has the nearest integer in its low bits.
  static constexpr float rounding = 12582912.0f; // 1.5 * 2^23
  static MLA_INLINE U nearest(F x) { return as<U>(x + rounding); }

  // 2^x for x up to 127; 0 below the smallest normal number, so that -inf gives 0; NaN stays NaN.
  static MLA_INLINE F exp2(F x) {
    const F shifted = x + rounding;
    const F f = x - (shifted - rounding); // -0.5 to 0.5; for x below -126 it is not used
    // Minimax polynomial of 2^f on that interval among those that are 1 at 0; at most 2.1 units of the last place off.
    F y = all(1.32696819e-3f);
    y = y * f + 9.67143849e-3f;
    y = y * f + 5.55072986e-2f;
    y = y * f + 2.40222499e-1f;
    y = y * f + 6.93147004e-1f;
    y = y * f + 1.0f;
#if defined(__AVX512F__)
    if constexpr (lanes == 16) {
      const __mmask16 normal = _mm512_cmp_ps_mask(as<__m512>(x), _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
      return as<F>(_mm512_maskz_scalef_ps(normal, as<__m512>(y), as<__m512>(shifted - rounding)));
    }
#endif
    const F power = as<F>((as<U>(shifted) + 127u) << 23);
    return x < -126.0f ? F{} : y * power;
  }
};

// The first `count` bytes of `from`, and zeros up to `size`. In whole vectors where the machine can: a copy of unknown
// length is a call, and a vector cannot be read again before all its parts are in the cache.
template <int size> MLA_INLINE void copy_some(char* to, const char* from, int count) {
#if defined(__AVX512BW__)
  if constexpr (size % 16 == 0) {
    for (int i = 0; i < size; i += 64) {
      const int left = count - i;
      const __mmask64 some = left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1;
      const __m512i bytes = _mm512_maskz_loadu_epi8(some, from + i);
      if constexpr (size >= 64)
        _mm512_store_si512(to + i, bytes);
      else if constexpr (size == 32)
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(bytes));
      else
        _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(bytes));
    }
    return;
  }
#elif defined(__AVX2__)
  if (size % 32 == 0 && count % 4 == 0) {
    for (int i = 0; i < size; i += 32) {
      const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i some = _mm256_cmpgt_epi32(_mm256_set1_epi32((count - i) / 4), places);
      const __m256i bytes = _mm256_maskload_epi32(reinterpret_cast<const int*>(from + i), some);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), bytes);
    }
    return;
  }
#endif
  std::memset(to, 0, size);
  std::memcpy(to, from, static_cast<size_t>(count));
}

// step(count) for a count from 1 to `largest`, which then is a constant.
template <int largest, class Step> MLA_INLINE void with_count(int count, Step&& step) {
  if constexpr (largest > 1)
    if (count < largest) return with_count<largest - 1>(count, step);
  step(std::integral_constant<int, largest>());
}

MLA_INLINE constexpr int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
MLA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MLA_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

} // namespace
} // namespace mla
