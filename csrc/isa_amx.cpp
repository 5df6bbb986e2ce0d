// AMX beside AVX-512: bf16 pairs and int8 quads multiply in matrix registers.
#include "amx.h"

namespace mla {
namespace {

struct Bf16Matrix : Bf16 {
  using Matrix = AmxBf16;
};

struct Isa {
  using Half = Bf16Matrix;
  using Full = Float32<16>;
  using Byte = Int8<Bf16Matrix, AmxInt8>;
};

bool supported() { return has_amx(); }

} // namespace
} // namespace mla

#define MLA_KERNELS amx_kernels
#define MLA_NAME "amx"
#include "kernels.h"
