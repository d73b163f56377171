#include "score_rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define OR1_ISA generic
#define OR1_LANES 4
#include "score_rows_lanes.hpp"
#undef OR1_ISA
#undef OR1_LANES

// Clang has no `#pragma GCC target`; there, and off x86, the generic passes run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define OR1_X86_DISPATCH 1

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define OR1_ISA avx2
#define OR1_LANES 8
#include "score_rows_lanes.hpp"
#undef OR1_ISA
#undef OR1_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define OR1_ISA avx512
#define OR1_LANES 16
#include "score_rows_lanes.hpp"
#undef OR1_ISA
#undef OR1_LANES
#pragma GCC pop_options
#endif

namespace or1 {

namespace {

// Logits per thread below which starting another thread costs more than it saves.
constexpr int64_t kLogitsPerThread = 1 << 16;

struct Passes {
  const char* isa;
  void (*sums)(const RowBlock&, RowTransform, int64_t, float*);
  void (*grads)(const RowBlock&, RowTransform, int64_t, const float*, const float*);
  void (*bf16_grads)(const RowBlock&, RowTransform, int64_t, const float*, const float*);
};

// Instruction sets of this machine, best first.
std::vector<Passes> available() {
  std::vector<Passes> out;
#ifdef OR1_X86_DISPATCH
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    out.push_back({"avx512", avx512::sums_of_row, avx512::grads_of_row, avx512::bf16_grads_of_row});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    out.push_back({"avx2", avx2::sums_of_row, avx2::grads_of_row, avx2::bf16_grads_of_row});
  }
#endif
  out.push_back({"generic", generic::sums_of_row, generic::grads_of_row, generic::bf16_grads_of_row});
  return out;
}

const Passes& passes(const std::string& isa) {
  static const std::vector<Passes> known = available();
  if (isa.empty()) return known.front();
  for (const auto& candidate : known) {
    if (isa == candidate.isa) return candidate;
  }
  throw std::invalid_argument("instruction set '" + isa + "' is not available on this machine; leave it empty");
}

template <typename RowFn>
void for_rows(const RowBlock& block, int threads, RowFn row_fn) {
  const int64_t useful = std::max<int64_t>(1, block.rows * block.vocab / kLogitsPerThread);
  const int64_t count = std::min<int64_t>({int64_t(std::max(threads, 1)), useful, std::max<int64_t>(block.rows, 1)});
  auto work = [&](int64_t part) {
    const int64_t end = block.rows * (part + 1) / count;
    for (int64_t row = block.rows * part / count; row < end; ++row) row_fn(row);
  };
  std::vector<std::thread> helpers;
  for (int64_t part = 1; part < count; ++part) helpers.emplace_back(work, part);
  work(0);
  for (auto& helper : helpers) helper.join();
}

}  // namespace

void row_sums(const RowBlock& block, RowTransform transform, float* out, int threads, const std::string& isa) {
  const auto pass = passes(isa).sums;
  for_rows(block, threads, [&](int64_t row) { pass(block, transform, row, out); });
}

void row_grads(const RowBlock& block, RowTransform transform, const float* stats, const float* slopes, int threads,
               bool bf16, const std::string& isa) {
  const auto pass = bf16 ? passes(isa).bf16_grads : passes(isa).grads;
  for_rows(block, threads, [&](int64_t row) { pass(block, transform, row, stats, slopes); });
}

std::vector<std::string> row_isas() {
  std::vector<std::string> names;
  for (const auto& pass : available()) names.emplace_back(pass.isa);
  return names;
}

}  // namespace or1
