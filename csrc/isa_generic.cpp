// Any processor: fp32 in vectors of four, which SSE2 and NEON have and the compiler splits elsewhere.
#include "arithmetic.h"

namespace mla {
namespace {

struct Isa {
  using Half = Float32<4>;
  using Full = Float32<4>;
  using Byte = Float32<4>;
};

bool supported() { return true; }

} // namespace
} // namespace mla

#define MLA_KERNELS generic_kernels
#define MLA_NAME "generic"
#include "kernels.h"
