// AVX-512 with BF16 and VNNI: bf16 pairs and int8 quads multiply as they lie in the cache.
#include "bf16.h"

namespace mla {
namespace {

struct Isa {
  using Half = Bf16;
  using Full = Float32<16>;
  using Byte = Int8<Bf16>;
};

bool supported() { return has_bf16(); }

} // namespace
} // namespace mla

#define MLA_KERNELS avx512_bf16_kernels
#define MLA_NAME "avx512_bf16"
#include "kernels.h"
