// The table of one instruction set's kernels; included last by each of them, which defines Isa, supported,
// MLA_KERNELS and MLA_NAME.
#pragma once

#include "absorbed.h"
#include "prefill.h"
#include "tokens.h"

namespace mla {
namespace {

// Sequences of up to so many keys are computed in fp32 whatever the cache holds: they cost nothing, and where few
// scores are summed, the rounding of each is seen.
constexpr int64_t kFew = 64;
constexpr Lengths kShort = {0, kFew + 1}, kLong = {kFew + 1, INT64_MAX}, kAny = {0, INT64_MAX};

void decode(const Decode& call) {
  using Full = Decoder<Isa::Full>;
  if (call.attention.cache.type == Type::f32) return Full::run(call, kAny);
  Full::run(call, kShort);
  if (call.attention.cache.type == Type::i8)
    Decoder<Isa::Byte>::run(call, kLong);
  else
    Decoder<Isa::Half>::run(call, kLong);
}

// Keys and values expanded from int8 latents are no longer multiples of anything: they are multiplied as those of
// bf16 latents are.
void prefill(const Projected& call) {
  using Full = Prefiller<Isa::Full>;
  if (call.attention.cache.type == Type::f32) return Full::run(call, kAny);
  Full::run(call, kShort);
  Prefiller<Isa::Half>::run(call, kLong);
}

// What multiplies bf16 weights. They do not change from call to call, but integers would have to be made of them
// each time.
using HalfWeights = std::conditional_t<kSplit<Isa::Half>, Isa::Full, Isa::Half>;

void absorbed(const Projected& call) {
  if (call.attention.cache.type == Type::f32 || call.w_uk.type == Type::f32)
    Absorber<Isa::Full>::run(call, decode);
  else
    Absorber<HalfWeights>::run(call, decode);
}

void linear(const Linear& call) {
  if (call.type == Type::f32)
    Layer<Isa::Full, Type::f32>::run(call);
  else
    Layer<HalfWeights, Type::bf16>::run(call);
}

void norm(const Norm& call) { norm_rows<Isa::Full::lanes>(call); }

void append(const Append& call) { append_rows<Isa::Full::lanes>(call); }

#if defined(__aarch64__)
#define MLA_REGISTER(x) "+w"(x)
#elif defined(__x86_64__) && !defined(MLA_EMULATE_AVX512)
#define MLA_REGISTER(x) "+x"(x)
#else // the vectors of an emulation are wider than any register
#define MLA_REGISTER(x) "+m"(x)
#endif

double ceiling(int64_t rounds) {
  using A = Isa::Half;
  using V = A::V;
  constexpr int sums = 12;
  if constexpr (kMatrix<A>) return matrix_ceiling<A>(rounds);
  uint32_t numbers[2 * A::lanes] = {};
  asm volatile("" : "+m"(numbers)); // the compiler may not know what they are
  const A::Unit b = V::load<A::Unit>(numbers);
  A::Unit a = V::load<A::Unit>(numbers + A::lanes);
  A::Sum sum[sums] = {};
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int x = 0; x < sums; ++x) {
      asm volatile("" : MLA_REGISTER(a)); // nor that nothing changes
      sum[x] = A::dot(sum[x], b, a);
    }
  }
  for (int x = 1; x < sums; ++x) sum[0] += sum[x];
  V::store(numbers, sum[0]);
  asm volatile("" : : "m"(numbers));
  return 2.0 * sums * A::lanes * A::per_unit * static_cast<double>(rounds);
}

} // namespace

const Kernels MLA_KERNELS = {MLA_NAME, supported, decode, prefill, absorbed, linear, norm, append, ceiling};

} // namespace mla
