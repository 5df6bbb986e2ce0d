// The matrix registers of Intel's AMX: eight, each of 16 rows of 64 bytes. The instructions are written out, because
// compilers take the numbers of registers for text, and know nothing of what they read.
#pragma once

#include "bf16.h"

#if !defined(MLA_EMULATE_AVX512) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mla {
namespace {

#ifndef MLA_EMULATE_AVX512

struct Amx {
  // All registers at their full size; given back at the end, so that the system need not save them.
  struct Hold {
    Hold() {
      alignas(64) struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } shape;
      asm volatile("ldtilecfg %0" : : "m"(shape));
    }
    ~Hold() { asm volatile("tilerelease"); }
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;
  };

  // What was written before is in memory, and what is read after is read from there.
  static MLA_INLINE void fence() { asm volatile("" : : : "memory"); }
  template <int i> static MLA_INLINE void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(i)); }
  template <int i> static MLA_INLINE void load(const void* rows, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(i));
  }
  template <int i> static MLA_INLINE void store(void* rows, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(i) : "memory");
  }
};

// Rows of a times columns of b, added to sums: pairs of bf16; quads of int8, one side of which is unsigned, as in Int8:
// queries, which are columns, or probabilities, which are rows.
#define MLA_MATRIX_PRODUCT(name, instruction)                                                                          \
  template <int sums, int a, int b> static MLA_INLINE void name() {                                                    \
    asm volatile(instruction " %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));                           \
  }
struct AmxBf16 : Amx {
  MLA_MATRIX_PRODUCT(score, "tdpbf16ps")
  MLA_MATRIX_PRODUCT(weigh, "tdpbf16ps")
};
struct AmxInt8 : Amx {
  MLA_MATRIX_PRODUCT(score, "tdpbsud")
  MLA_MATRIX_PRODUCT(weigh, "tdpbusd")
};
#undef MLA_MATRIX_PRODUCT

// Whether the processor has the registers, the system saves them, and lends them to this process.
bool has_amx() {
#ifdef __linux__
  constexpr long request = 0x1023, registers = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d, low, high;
  if (!has_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d >> 22 & 1u) == 0 || (d >> 24 & 3u) != 3u) return false; // AMX-BF16, AMX-TILE and AMX-INT8
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3u) == 3u && syscall(SYS_arch_prctl, request, registers) == 0;
#else
  return false;
#endif
}

#else // the same in memory, for tests on a machine without them

struct Amx {
  struct Register {
    uint32_t rows[16][16];
  };
  static Register& at(int i) {
    static thread_local Register registers[8];
    return registers[i];
  }
  struct Hold {
    Hold() {
      for (int i = 0; i < 8; ++i) at(i) = {};
    }
    ~Hold() {}
  };
  static void fence() {}
  template <int i> static void zero() { at(i) = {}; }
  template <int i> static void load(const void* rows, int64_t stride) {
    for (int row = 0; row < 16; ++row) std::memcpy(at(i).rows[row], static_cast<const char*>(rows) + row * stride, 64);
  }
  template <int i> static void store(void* rows, int64_t stride) {
    for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(rows) + row * stride, at(i).rows[row], 64);
  }

protected:
  // sum = dot(sum, unit of a, units of b) for every sum.
  template <class V, class Dot> static void multiply(int sums, int a, int b, Dot&& dot) {
    for (int row = 0; row < 16; ++row) {
      V sum = Vec<16>::load<V>(at(sums).rows[row]);
      for (int k = 0; k < 16; ++k)
        sum = dot(sum, Vec<16>::all(at(a).rows[row][k]), Vec<16>::load<Vec<16>::U>(at(b).rows[k]));
      Vec<16>::store(at(sums).rows[row], sum);
    }
  }
};

struct AmxBf16 : Amx {
  template <int sums, int a, int b> static void score() { multiply<Bf16::F>(sums, a, b, Bf16::dot); }
  template <int sums, int a, int b> static void weigh() { score<sums, a, b>(); }
};
struct AmxInt8 : Amx {
  using Quads = Int8<Bf16>;
  template <int sums, int a, int b> static void score() {
    multiply<Quads::Sum>(sums, a, b,
                         [](Quads::Sum sum, Quads::Unit one, Quads::Unit all) { return Quads::dot(sum, all, one); });
  }
  template <int sums, int a, int b> static void weigh() { multiply<Quads::Sum>(sums, a, b, Quads::dot); }
};

bool has_amx() { return true; }

#endif

} // namespace
} // namespace mla
