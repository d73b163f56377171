// Sequence packing: assigns sequences to packed rows and rows to ranks, once per update, on the host.
#pragma once

#include <cstdint>
#include <vector>

namespace or1 {

using Row = std::vector<int64_t>;  // indices of the sequences that share a packed row

// Training cost of a sequence of n tokens: linear * n + quadratic * n^2, in any unit. Matrix products grow
// with n, attention with n^2.
struct Cost {
  double linear = 1.0;
  double quadratic = 0.0;

  double of(int64_t tokens) const { return (linear + quadratic * double(tokens)) * double(tokens); }
};

// Best-fit decreasing bin packing.
//
// lengths   tokens of each sequence, each in [1, capacity]
// capacity  tokens that one bin holds
// returns   for each bin the indices of its sequences; each index occurs exactly once. Bins are in the order of
//           their longest sequence, longest first; indices inside a bin ascend. Equal lengths are packed in index
//           order, so the plan is a pure function of its arguments.
// throws    std::invalid_argument naming the first sequence that is empty or longer than the capacity.
//
// O(n log n). Best-fit decreasing opens at most 11/9 of the optimal number of bins plus 6/9 (Dosa 2007).
std::vector<Row> pack_best_fit(const std::vector<int64_t>& lengths, int64_t capacity);

// Rows for `ranks` ranks, the same number on each, so that all ranks make the same collective calls.
//
// returns   plan[rank][row]: every sequence whole in exactly one row, rows within the capacity. The number of rows is
//           that of best-fit decreasing, rounded up to a multiple of `ranks`. Rows are empty only if there are fewer
//           sequences than rows; empty rows are the last of their rank. Row i costs about the same on every rank, and
//           so does the sum over rows. A pure function of its arguments.
// throws    std::invalid_argument as pack_best_fit, and for ranks < 1 or a cost that is negative or not finite.
std::vector<std::vector<Row>> plan_ranks(const std::vector<int64_t>& lengths, int64_t capacity, int64_t ranks,
                                         const Cost& cost);

}  // namespace or1
