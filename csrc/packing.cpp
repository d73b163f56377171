#include "packing.hpp"

#include <algorithm>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace or1 {

namespace {

void check_lengths(const std::vector<int64_t>& lengths, int64_t capacity) {
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] >= 1 && lengths[i] <= capacity) continue;
    throw std::invalid_argument("sequence " + std::to_string(i) + " has " + std::to_string(lengths[i]) +
                                " tokens, but a packed row holds 1 to " + std::to_string(capacity) +
                                "; raise optim.max_tokens_per_rank or lower max_response_tokens");
  }
}

}  // namespace

std::vector<std::vector<int64_t>> pack_best_fit(const std::vector<int64_t>& lengths, int64_t capacity) {
  check_lengths(lengths, capacity);
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  std::vector<std::vector<int64_t>> bins;
  std::set<std::pair<int64_t, size_t>> open;  // (free tokens, bin): the fullest bin that still fits is lower_bound
  for (int64_t index : order) {
    auto fit = open.lower_bound({lengths[index], 0});
    size_t bin;
    int64_t free_tokens;
    if (fit == open.end()) {
      bin = bins.size();
      bins.emplace_back();
      free_tokens = capacity;
    } else {
      free_tokens = fit->first;
      bin = fit->second;
      open.erase(fit);
    }
    bins[bin].push_back(index);
    free_tokens -= lengths[index];
    if (free_tokens > 0) open.emplace(free_tokens, bin);
  }
  for (auto& bin : bins) std::sort(bin.begin(), bin.end());
  return bins;
}

}  // namespace or1
