#include "score_rows.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
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

// Parts of the rows a thread: a thread that is late leaves its parts to others.
constexpr int64_t kPartsPerThread = 8;

using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);

// OpenMP's entry point as torch loaded it, with the threads that run torch's products; null without torch or OpenMP.
// Threads of our own would start on the caller's core, or compete with OpenMP's threads, which wait by spinning.
ParallelRegion openmp_region() {
  static const auto found = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// Run `work` on up to `count` threads at once, this one among them. OpenMP may give fewer.
template <typename Work>
void on_threads(int64_t count, Work& work) {
  if (count > 1 && openmp_region() != nullptr) {
    openmp_region()([](void* data) { (*static_cast<Work*>(data))(); }, &work, unsigned(count), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < count; ++i) helpers.emplace_back([&work] { work(); });
  work();
  for (auto& helper : helpers) helper.join();
}

template <typename RowFn>
void for_rows(const RowBlock& block, int threads, RowFn row_fn) {
  const int64_t useful = std::max<int64_t>(1, block.rows * block.vocab / kLogitsPerThread);
  const int64_t count = std::min<int64_t>({int64_t(std::max(threads, 1)), useful, std::max<int64_t>(block.rows, 1)});
  const int64_t parts = count == 1 ? 1 : std::min(block.rows, count * kPartsPerThread);
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t part; (part = next.fetch_add(1)) < parts;) {
      const int64_t end = block.rows * (part + 1) / parts;
      for (int64_t row = block.rows * part / parts; row < end; ++row) row_fn(row);
    }
  };
  on_threads(count, work);
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
