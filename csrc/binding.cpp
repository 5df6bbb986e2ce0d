// The Python module mla._kernels: addresses and sizes in, checks that only the data can answer, kernels.
// Shapes, dtypes and strides have been checked by mla.ops.native, which is its only caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"

namespace nb = nanobind;
using namespace mla;

namespace {

using RowsTuple = std::tuple<int64_t, int64_t, int64_t>;
// c_kv, k_rope, scale, type, table, table_stride, table_width (1 without a table), pages, page_size, r, p
using CacheTuple =
    std::tuple<RowsTuple, RowsTuple, RowsTuple, int, int64_t, int64_t, int64_t, int64_t, int64_t, int, int>;
// b, s, h, lengths, key_mask, key_mask_stride, sinks, lse
using SizesTuple = std::tuple<int, int, int, int64_t, int64_t, int64_t, int64_t, int64_t>;
using HeadsTuple = std::tuple<int64_t, int, int64_t, int64_t, int64_t>;
using SourceTuple = std::tuple<int64_t, int, int64_t, int64_t>;
using WeightTuple = std::tuple<int64_t, int, int64_t, int64_t>;

template <class T> T* pointer(int64_t address) { return reinterpret_cast<T*>(address); }

Rows rows(const RowsTuple& t) { return {pointer<const char>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

Heads heads(const HeadsTuple& t) {
  return {pointer<char>(std::get<0>(t)), static_cast<Type>(std::get<1>(t)), std::get<2>(t), std::get<3>(t),
          std::get<4>(t)};
}

Source source(const SourceTuple& t) {
  return {pointer<const char>(std::get<0>(t)), static_cast<Type>(std::get<1>(t)), std::get<2>(t), std::get<3>(t)};
}

Written written(const RowsTuple& t) { return {pointer<char>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

Weight weight(const WeightTuple& t) {
  return {pointer<const char>(std::get<0>(t)), static_cast<Type>(std::get<1>(t)), std::get<2>(t), std::get<3>(t)};
}

// Lengths and pages are data: the only arguments that could lead a kernel out of the buffers.
void check(const Attention& call, int64_t table_width, int64_t pages) {
  const Cache& cache = call.cache;
  const int64_t most = table_width * cache.page_size;
  for (int i = 0; i < call.b; ++i) {
    const int64_t length = call.lengths[i];
    if (length < 0 || length > most)
      throw std::invalid_argument("lengths[" + std::to_string(i) + "]: expected 0 to " + std::to_string(most) +
                                  " (what the cache has room for), got " + std::to_string(length));
    if (!cache.table) continue;
    const int32_t* table = cache.table + i * cache.table_stride;
    for (int64_t j = 0; j * cache.page_size < length; ++j)
      if (table[j] < -1 || table[j] >= pages)
        throw std::invalid_argument("page_table[" + std::to_string(i) + ", " + std::to_string(j) + "]: expected 0 to " +
                                    std::to_string(pages - 1) + ", or -1 for keys that do not exist, got " +
                                    std::to_string(table[j]));
  }
}

Attention attention(const CacheTuple& c, const SizesTuple& t, float scale, bool causal, int threads) {
  Attention call{};
  call.b = std::get<0>(t), call.s = std::get<1>(t), call.h = std::get<2>(t);
  call.lengths = pointer<const int32_t>(std::get<3>(t));
  call.key_mask = pointer<const uint8_t>(std::get<4>(t)), call.key_mask_stride = std::get<5>(t);
  call.sinks = pointer<const float>(std::get<6>(t));
  call.lse = pointer<float>(std::get<7>(t));
  call.scale = scale, call.causal = causal, call.threads = threads;
  call.cache = {rows(std::get<0>(c)),
                rows(std::get<1>(c)),
                rows(std::get<2>(c)),
                static_cast<Type>(std::get<3>(c)),
                pointer<const int32_t>(std::get<4>(c)),
                std::get<5>(c),
                std::get<8>(c),
                std::get<9>(c),
                std::get<10>(c)};
  check(call, std::get<6>(c), std::get<7>(c));
  call.cache.page_size = std::max<int64_t>(call.cache.page_size, 1); // a divisor, of empty sequences too
  return call;
}

std::vector<const Kernels*> find_available() {
  std::vector<const Kernels*> all = {
#ifdef MLA_X86
      &avx512_bf16_kernels, &avx512_vnni_kernels, &avx2_kernels,
#endif
      &generic_kernels};
#ifdef MLA_X86
  // Intel's cores multiply pairs of int16 four times as fast as pairs of bf16 (Emerald Rapids), AMD's both alike.
  if (__builtin_cpu_is("intel")) std::swap(all[0], all[1]);
#endif
#ifdef MLA_AMX
  all.insert(all.begin(), &amx_kernels);
#endif
  all.erase(std::remove_if(all.begin(), all.end(), [](const Kernels* k) { return !k->supported(); }), all.end());
  return all;
}

// The kernels that this machine runs, best first: looked for once, not at every call.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = find_available();
  return found;
}

const Kernels& named(const std::string& isa) {
  for (const Kernels* kernels : available())
    if (isa == kernels->name) return *kernels;
  throw std::invalid_argument("instruction set " + isa + " is not available here");
}

} // namespace

NB_MODULE(_kernels, m) {
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
    return names;
  });
  m.def("decode", [](const std::string& isa, const CacheTuple& cache, const SizesTuple& sizes, float scale, bool causal,
                     int threads, const HeadsTuple& q_latent, const HeadsTuple& q_rope, const HeadsTuple& out) {
    nb::gil_scoped_release release;
    named(isa).decode({attention(cache, sizes, scale, causal, threads), heads(q_latent), heads(q_rope), heads(out)});
  });
  const auto projected = [&m](const char* name, auto kernel) {
    m.def(name, [kernel](const std::string& isa, const CacheTuple& cache, const SizesTuple& sizes, float scale,
                         bool causal, int threads, const HeadsTuple& q_nope, const HeadsTuple& q_rope,
                         const WeightTuple& w_uk, const WeightTuple& w_uv, const HeadsTuple& out, int n, int v) {
      nb::gil_scoped_release release;
      (named(isa).*kernel)({attention(cache, sizes, scale, causal, threads), heads(q_nope), heads(q_rope), weight(w_uk),
                            weight(w_uv), heads(out), n, v});
    });
  };
  projected("prefill", &Kernels::prefill);
  projected("absorbed", &Kernels::absorbed);
  m.def("linear", [](const std::string& isa, int64_t x, int64_t stride_x, int64_t w, int64_t stride_w, int64_t out,
                     int type, int rows, int n, int k, int threads) {
    nb::gil_scoped_release release;
    named(isa).linear({pointer<const char>(x), stride_x, pointer<const char>(w), stride_w, pointer<char>(out),
                       static_cast<Type>(type), rows, n, k, threads});
  });
  m.def("norm", [](const std::string& isa, int64_t x, int64_t stride_x, int64_t weight, int64_t out, int type,
                   int64_t rows, int width, float eps, int threads) {
    nb::gil_scoped_release release;
    named(isa).norm({pointer<const char>(x), stride_x, pointer<const char>(weight), pointer<char>(out),
                     static_cast<Type>(type), rows, width, eps, threads});
  });
  m.def("append", [](const std::string& isa, const SourceTuple& c_kv, const SourceTuple& k_rope,
                     const RowsTuple& to_c_kv, const RowsTuple& to_k_rope, const RowsTuple& to_scale, int type,
                     int64_t slots, int64_t pages, int64_t page_size, int64_t b, int64_t s, int r, int p, int threads) {
    nb::gil_scoped_release release;
    const Append call{source(c_kv),
                      source(k_rope),
                      written(to_c_kv),
                      written(to_k_rope),
                      written(to_scale),
                      static_cast<Type>(type),
                      pointer<const int64_t>(slots),
                      page_size,
                      b,
                      s,
                      r,
                      p,
                      threads};
    for (int64_t i = 0; call.slots && i < b * s; ++i)
      if (call.slots[i] >= pages * page_size)
        throw std::invalid_argument("slots[" + std::to_string(i) + "]: expected less than " +
                                    std::to_string(pages * page_size) + ", got " + std::to_string(call.slots[i]));
    named(isa).append(call);
  });
  m.def("ceiling", [](const std::string& isa, int64_t rounds) {
    nb::gil_scoped_release release;
    return named(isa).ceiling(rounds);
  });
}
