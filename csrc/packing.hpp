// Sequence packing: which sequences share a packed row, decided once per update on the host.
#pragma once

#include <cstdint>
#include <vector>

namespace or1 {

// Best-fit decreasing bin packing.
//
// lengths   tokens of each sequence, each in [1, capacity]
// capacity  tokens that one bin holds
// returns   for each bin the indices of its sequences; each index occurs exactly once. Bins stand in the order in
//           which they were opened (by their longest sequence, longest first), indices inside a bin ascend. Equal
//           lengths are taken in index order, so the plan is a pure function of its arguments.
// throws    std::invalid_argument naming the first sequence that is empty or longer than the capacity.
//
// O(n log n). Best-fit decreasing opens at most 11/9 of the optimal number of bins plus 6/9 (Dosa 2007).
std::vector<std::vector<int64_t>> pack_best_fit(const std::vector<int64_t>& lengths, int64_t capacity);

}  // namespace or1
