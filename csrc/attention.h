// What the kernels take and give: raw pointers, strides and sizes. Nothing here knows Python or torch.
//
// The alphabet is that of mla.ops: b batch, s query tokens, t key tokens, h heads, n nope dim, r latent rank,
// p rope dim, v value dim. Strides are in bytes; the last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

namespace mla {

enum class Type : int { f32 = 0, bf16 = 1, i8 = 2 };

constexpr int bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }

// Rows in pages: row `token` of a sequence lies at data + page * page_stride + (token % page_size) * row_stride.
struct Rows {
  const char* data;
  int64_t page_stride;
  int64_t row_stride;
};

// The latents of a batch. Without a table, page i is sequence i and holds all of it (a contiguous cache).
struct Cache {
  Rows c_kv;            // [r], of `type`
  Rows k_rope;          // [p], bf16 (f32 where type is f32)
  Rows scale;           // int8 only: one f32 per token, the factor of c_kv
  Type type;            // f32, bf16 or i8
  const int32_t* table; // [b, table_stride] pages of each sequence; -1 is a token that does not exist
  int64_t table_stride; // in entries
  int64_t page_size;    // tokens per page; 1 makes the table a list of single tokens (sparse attention)
  int32_t r;
  int32_t p;
};

// A tensor [b, s, h, width].
struct Heads {
  char* data;
  Type type;
  int64_t stride_b;
  int64_t stride_s;
  int64_t stride_h;
};

// A weight [h, rows, r].
struct Weight {
  const char* data;
  Type type;
  int64_t stride_h;
  int64_t stride_row;
};

// What the three kernels of attention share. Query i of sequence j is its token lengths[j] - s + i.
struct Attention {
  int32_t b, s, h;
  Cache cache;
  const int32_t* lengths;  // [b] key tokens of each sequence
  const uint8_t* key_mask; // [b, key_mask_stride] 1 where a key may be seen, or null
  int64_t key_mask_stride;
  const float* sinks; // [h] one more logit per head, or null
  float scale;        // factor on the scores
  bool causal;        // no query sees a key after itself
  float* lse;         // [b, s, h] natural log-sum-exp without the sink; -inf where no key is seen
  int32_t threads;
};

// Absorbed: the queries already live in the latent space, and so does the output.
struct Decode {
  Attention attention;
  Heads q_latent; // [b, s, h, r]
  Heads q_rope;   // [b, s, h, p]
  Heads out;      // [b, s, h, r]
};

// With the up-projections, from queries to outputs. Expanded (prefill), keys and values are rebuilt tile by tile from
// the latents; absorbed, the projections are of queries and outputs.
struct Projected {
  Attention attention;
  Heads q_nope; // [b, s, h, n]
  Heads q_rope; // [b, s, h, p]
  Weight w_uk;  // [h, n, r]
  Weight w_uv;  // [h, v, r]
  Heads out;    // [b, s, h, v]
  int32_t n, v;
};

// A linear layer: out = x · wᵀ, all of one type.
struct Linear {
  const char* x; // [rows, k]
  int64_t stride_x;
  const char* w; // [n, k]
  int64_t stride_w;
  char* out; // [rows, n]
  Type type;
  int32_t rows, n, k, threads;
};

// The norm of rows: out = rounded(x / sqrt(mean(x²) + eps)) · weight, all of one type, f32 or bf16.
struct Norm {
  const char* x; // [rows, width]
  int64_t stride_x;
  const char* weight; // [width]
  char* out;          // [rows, width], without gaps
  Type type;
  int64_t rows;
  int32_t width;
  float eps;
  int32_t threads;
};

// New tokens [b, s, width], f32 or bf16.
struct Source {
  const char* data;
  Type type;
  int64_t stride_b;
  int64_t stride_s;
};

// Rows to be written: as Rows.
struct Written {
  char* data;
  int64_t page_stride;
  int64_t row_stride;
};

// New tokens on their way into a cache of `type`. Token i of sequence j goes to row i of page j; with slots, token
// number t of all of them to row slots[t] % page_size of page slots[t] / page_size, or nowhere where that is negative.
struct Append {
  Source c_kv;   // [b, s, r]
  Source k_rope; // [b, s, p]
  Written to_c_kv, to_k_rope, to_scale;
  Type type;
  const int64_t* slots; // [b * s] or null
  int64_t page_size;
  int64_t b, s;
  int32_t r, p, threads;
};

// One instruction set's kernels. `ceiling` runs `rounds` of the instruction that carries the products, on one
// thread, out of registers, and returns the operations done (2 per multiply-add): the bound of the benchmarks.
struct Kernels {
  const char* name;
  bool (*supported)();
  void (*decode)(const Decode&);
  void (*prefill)(const Projected&);
  void (*absorbed)(const Projected&);
  void (*linear)(const Linear&);
  void (*norm)(const Norm&);
  void (*append)(const Append&);
  double (*ceiling)(int64_t rounds);
};

extern const Kernels amx_kernels;
extern const Kernels avx512_bf16_kernels;
extern const Kernels avx512_vnni_kernels;
extern const Kernels avx2_kernels;
extern const Kernels generic_kernels;

} // namespace mla
