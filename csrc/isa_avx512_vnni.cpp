// AVX-512 with VNNI: bf16 latents multiply as pairs of int16, int8 latents as quads as they lie in the cache.
#include "avx512.h"
#include "int16.h"

namespace mla {
namespace {

struct Vnni {
  static constexpr int lanes = 16;
  using V = Vec<lanes>;
  using U = V::U;
  using I = V::I;

  static MLA_INLINE I multiply_add(I sum, U b, U a) {
    return V::as<I>(_mm512_dpwssd_epi32(V::as<__m512i>(sum), V::as<__m512i>(b), V::as<__m512i>(a)));
  }
  static MLA_INLINE U spread_four(const uint32_t* a) { return mla::spread_four(a); }
  static MLA_INLINE U blend(U low, U high) { return (low & 0xffffu) | high; }
  static MLA_INLINE void interleave(const uint32_t* rows, int64_t stride, U (&to)[2]) {
    interleave_pairs(rows, stride, to);
  }
};

struct Isa {
  using Half = Int16<Vnni>;
  using Full = Float32<16>;
  using Byte = Int8<Int16<Vnni>>;
};

bool supported() { return has_avx512(); }

} // namespace
} // namespace mla

#define MLA_KERNELS avx512_vnni_kernels
#define MLA_NAME "avx512_vnni"
#include "kernels.h"
