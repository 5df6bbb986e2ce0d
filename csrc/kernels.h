// The table of one instruction set's kernels; included last by each of them, which defines Isa, supported,
// MLA_KERNELS and MLA_NAME.
#pragma once

#include "decode.h"
#include "prefill.h"

namespace mla {
namespace {

template <class A> using Decode_ = Decoder<A, Isa::wide_x, Isa::narrow_x>;
template <class A> using Prefill_ = Prefiller<A, Isa::wide_x, Isa::narrow_x>;

void decode(const Decode& call) {
  if (call.attention.cache.type == Type::f32)
    Decode_<Isa::Full>::run(call);
  else
    Decode_<Isa::Half>::run(call);
}

void prefill(const Prefill& call) {
  if (call.attention.cache.type == Type::f32)
    Prefill_<Isa::Full>::run(call);
  else
    Prefill_<Isa::Half>::run(call);
}

#if defined(MLA_EMULATE_AVX512) // its vectors are wider than any register here
#define MLA_REGISTER(x) "+m"(x)
#elif defined(__aarch64__)
#define MLA_REGISTER(x) "+w"(x)
#else
#define MLA_REGISTER(x) "+x"(x)
#endif

double ceiling(int64_t rounds) {
  using A = Isa::Half;
  using V = A::V;
  constexpr int sums = 12;
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

const Kernels MLA_KERNELS = {MLA_NAME, supported, decode, prefill, ceiling};

} // namespace mla
