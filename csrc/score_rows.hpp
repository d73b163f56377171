// The two passes over rows of logits between the GEMMs of the LM head, fp32, for CPUs.
//
// With z = softcap * tanh(scale * raw / softcap) (or scale * raw), M = max_v z_v, d_v = (z_v - M) * inv_tau and y the
// target:
//   row_sums   peak = M, target = z_y, rest = sum over v != y of exp d_v, moment = sum over v of d_v exp d_v
//   row_grads  raw_v <- dL/draw_v for L with slopes g = dL/dlogp and k = dL/dentropy, in place:
//              dz_v = -p_v (g + k (log p_v + H)) + g [v = y],  log p_v = d_v - log_norm
// `rest` excludes the target, and the target's gradient uses expm1(logp), so nothing cancels as p_y -> 1.
// Sums are fp32 within a block of 1024 and fp64 across blocks, in an order that depends on the row alone. A row's
// result is therefore bit-identical at any position and with any number of threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace or1 {

struct RowTransform {
  float scale;
  float softcap;  // 0: none
};

struct RowBlock {
  float* logits;           // [rows, vocab], rows `stride` floats apart
  const int64_t* targets;  // [rows]; -1 where the target is in another vocabulary shard
  const float* inv_tau;    // [rows]
  int64_t rows;
  int64_t vocab;
  int64_t stride;
};

// out: [4, rows] = peak, target (-inf where y is -1), rest, moment. logits are only read.
void row_sums(const RowBlock& block, RowTransform transform, float* out, int threads, const std::string& isa = "");

// stats: [4, rows] = logp, entropy, peak, log_norm; slopes: [2, rows] = g, k. Overwrites logits.
// bf16: the gradient is rounded to bf16 and lies in the first half of each row's memory.
void row_grads(const RowBlock& block, RowTransform transform, const float* stats, const float* slopes, int threads,
               bool bf16 = false, const std::string& isa = "");

// Instruction sets that this machine can run, best first, out of "avx512", "avx2" and "generic". The passes use the
// first one unless `isa` names another; std::invalid_argument if it is not among them.
std::vector<std::string> row_isas();

}  // namespace or1
