#include "packing.hpp"

#include <algorithm>
#include <cmath>
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

// Longest first; equal lengths in index order.
Row longest_first(const std::vector<int64_t>& lengths) {
  Row order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  return order;
}

// Rows with their contents and costs, for the steps that move sequences between rows.
struct Rows {
  const std::vector<int64_t>& lengths;
  const Cost& cost;
  std::vector<Row> members;
  std::vector<int64_t> tokens;
  std::vector<double> costs;

  Rows(const std::vector<int64_t>& lengths, const Cost& cost, size_t count)
      : lengths(lengths), cost(cost), members(count), tokens(count, 0), costs(count, 0.0) {}

  void add(size_t row, int64_t index) {
    members[row].push_back(index);
    tokens[row] += lengths[index];
    costs[row] += cost.of(lengths[index]);
  }

  void clear(size_t row) {
    members[row].clear();
    tokens[row] = 0;
    costs[row] = 0.0;
  }
};

// Put each sequence, longest first, into the cheapest row with room. Return false if a sequence fits nowhere: then the
// rows are too full to be balanced during filling.
bool fill_level(Rows& rows, const Row& order, int64_t capacity) {
  std::set<std::pair<double, size_t>> by_cost;
  for (size_t row = 0; row < rows.members.size(); ++row) by_cost.emplace(0.0, row);
  for (int64_t index : order) {
    auto fit = std::find_if(by_cost.begin(), by_cost.end(), [&](const auto& entry) {
      return rows.tokens[entry.second] + rows.lengths[index] <= capacity;
    });
    if (fit == by_cost.end()) return false;
    const size_t row = fit->second;
    by_cost.erase(fit);
    rows.add(row, index);
    by_cost.emplace(rows.costs[row], row);
  }
  return true;
}

// Fill empty rows: split the costliest row with several sequences between itself and an empty row.
void fill_empty(Rows& rows) {
  for (size_t empty = 0; empty < rows.members.size(); ++empty) {
    if (!rows.members[empty].empty()) continue;
    size_t from = rows.members.size();
    for (size_t row = 0; row < rows.members.size(); ++row) {
      if (rows.members[row].size() < 2) continue;
      if (from == rows.members.size() || rows.costs[row] > rows.costs[from]) from = row;
    }
    if (from == rows.members.size()) return;
    Row dealt;
    dealt.swap(rows.members[from]);
    rows.clear(from);
    std::stable_sort(dealt.begin(), dealt.end(),
                     [&](int64_t a, int64_t b) { return rows.lengths[a] > rows.lengths[b]; });
    for (int64_t index : dealt) rows.add(rows.costs[from] <= rows.costs[empty] ? from : empty, index);
  }
}

// Limit on the pairs of sequences that `level` examines: a few milliseconds, reached only with thousands of sequences.
constexpr size_t kLevelWork = 1 << 21;
// Rows whose costs differ by less count as balanced.
constexpr double kLevelGap = 1e-3;

// Swap one sequence of the costliest row with one of the cheapest, or move it there, while this narrows the gap and
// both rows still fit. Equal row costs give equal rank costs for any assignment of rows to ranks.
void level(Rows& rows, int64_t capacity) {
  const size_t count = rows.members.size();
  size_t work = 0;
  for (size_t round = 0; round < 4 * count; ++round) {
    const size_t high = std::max_element(rows.costs.begin(), rows.costs.end()) - rows.costs.begin();
    const size_t low = std::min_element(rows.costs.begin(), rows.costs.end()) - rows.costs.begin();
    const double gap = rows.costs[high] - rows.costs[low];
    work += rows.members[high].size() * (rows.members[low].size() + 1);
    if (gap <= kLevelGap * rows.costs[high] || work > kLevelWork) return;
    // Moving half the gap closes the gap; moving any amount between zero and the whole gap narrows it.
    double best = gap * (1.0 - kLevelGap);
    int best_give = -1, best_take = -1;
    const Row &give = rows.members[high], &take = rows.members[low];
    for (size_t g = 0; g < give.size(); ++g) {
      const int64_t given = rows.lengths[give[g]];
      for (size_t t = 0; t <= take.size(); ++t) {
        const int64_t taken = t < take.size() ? rows.lengths[take[t]] : 0;
        const int64_t shift = given - taken;
        if (rows.tokens[low] + shift > capacity || rows.tokens[high] - shift > capacity) continue;
        if (taken == 0 && give.size() == 1) continue;
        const double left = std::abs(gap - 2.0 * (rows.cost.of(given) - rows.cost.of(taken)));
        if (left < best) {
          best = left;
          best_give = int(g);
          best_take = t < take.size() ? int(t) : -1;
        }
      }
    }
    if (best_give < 0) return;
    Row new_high = give, new_low = take;
    new_low.push_back(give[best_give]);
    new_high.erase(new_high.begin() + best_give);
    if (best_take >= 0) {
      new_high.push_back(take[best_take]);
      new_low.erase(new_low.begin() + best_take);
    }
    rows.clear(high);
    rows.clear(low);
    for (int64_t index : new_high) rows.add(high, index);
    for (int64_t index : new_low) rows.add(low, index);
  }
}

// Sort rows by cost and cut them into groups of one row a rank. Within a group the costliest row goes to the rank with
// the lowest cost so far.
std::vector<std::vector<Row>> deal(Rows& rows, int64_t ranks) {
  const size_t count = rows.members.size();
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return rows.costs[a] > rows.costs[b]; });
  std::vector<std::vector<Row>> plan(ranks);
  std::vector<double> totals(ranks, 0.0);
  std::vector<size_t> by_total(ranks);
  for (size_t start = 0; start < count; start += ranks) {
    std::iota(by_total.begin(), by_total.end(), size_t(0));
    std::stable_sort(by_total.begin(), by_total.end(), [&](size_t a, size_t b) { return totals[a] < totals[b]; });
    for (int64_t i = 0; i < ranks; ++i) {
      const size_t row = order[start + i], rank = by_total[i];
      std::sort(rows.members[row].begin(), rows.members[row].end());
      totals[rank] += rows.costs[row];
      plan[rank].push_back(std::move(rows.members[row]));
    }
  }
  return plan;
}

}  // namespace

std::vector<Row> pack_best_fit(const std::vector<int64_t>& lengths, int64_t capacity) {
  check_lengths(lengths, capacity);
  std::vector<Row> bins;
  std::set<std::pair<int64_t, size_t>> open;  // (free tokens, bin): the fullest bin that still fits is lower_bound
  for (int64_t index : longest_first(lengths)) {
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

std::vector<std::vector<Row>> plan_ranks(const std::vector<int64_t>& lengths, int64_t capacity, int64_t ranks,
                                         const Cost& cost) {
  if (ranks < 1) throw std::invalid_argument("ranks is " + std::to_string(ranks) + "; it must be at least 1");
  if (!(cost.linear >= 0.0 && cost.quadratic >= 0.0 && std::isfinite(cost.linear + cost.quadratic))) {
    throw std::invalid_argument("the cost of a sequence must be finite and at least 0, but linear is " +
                                std::to_string(cost.linear) + " and quadratic " + std::to_string(cost.quadratic));
  }
  const auto bins = pack_best_fit(lengths, capacity);
  const size_t count = (bins.size() + ranks - 1) / ranks * ranks;
  Rows rows(lengths, cost, count);
  if (!fill_level(rows, longest_first(lengths), capacity)) {
    for (size_t row = 0; row < count; ++row) rows.clear(row);
    for (size_t row = 0; row < bins.size(); ++row) {
      for (int64_t index : bins[row]) rows.add(row, index);
    }
    fill_empty(rows);
  }
  level(rows, capacity);
  return deal(rows, ranks);
}

}  // namespace or1
