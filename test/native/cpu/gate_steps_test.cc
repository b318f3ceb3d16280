// What the gate's general path is made of, softmax, top and best_two of every instruction set, against plain loops:
// rows of every length up to two vectors beyond a multiple, few different values, NaN and infinities.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "testing.h"

namespace moe::testing {

namespace {

std::vector<float> padded_row(Random& r, int n, int different, int special) {
  std::vector<float> row(static_cast<size_t>((n + kGatePad - 1) / kGatePad * kGatePad), kNaN);
  for (int i = 0; i < n; i++) {
    row[static_cast<size_t>(i)] = different > 0 ? static_cast<float>(r.below(different)) - 1 : 4 * r.uniform();
    if (r.below(100) < special) row[static_cast<size_t>(i)] = r.below(3) == 0 ? kNaN : r.below(2) == 0 ? kInf : -kInf;
  }
  return row;
}

// Numbers first, the highest first, equal ones by index.
std::vector<int32_t> sorted(const std::vector<float>& row, int n) {
  std::vector<int32_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const float x = row[static_cast<size_t>(a)], y = row[static_cast<size_t>(b)];
    return std::isnan(y) ? !std::isnan(x) : x > y;
  });
  return order;
}

}  // namespace

void test_gate_steps() {
  current = "gate steps";
  Random r(31);
  int declined = 0, ordinary = 0;
  for (int round = 0; round < 2000; round++) {
    const int n = 1 + r.below(round % 10 == 0 ? 1024 : 130), special = round % 3 == 0 ? 10 : 0;
    const int different = round % 4 == 0 ? 1 + r.below(40) : 0;
    const std::vector<float> row = padded_row(r, n, different, special);
    const auto size = static_cast<int64_t>(row.size());

    const int k = 1 + r.below(std::min(n, 32));
    std::vector<int32_t> chosen(static_cast<size_t>(k), -1), expected = sorted(row, n);
    expected.resize(static_cast<size_t>(k));
    const bool fast = kernels->top(row.data(), size, k, chosen.data());
    if (fast) check(chosen == expected, "top " + std::to_string(k) + " of " + std::to_string(n));
    if (different == 0 && special == 0 && n >= 4 * k) (fast ? ordinary : declined)++;

    std::vector<float> powers(row.size());
    const float most = *std::max_element(row.begin(), row.end(), [](float a, float b) {
      return std::isnan(a) ? !std::isnan(b) : a < b;
    });
    const bool finite = kernels->softmax(row.data(), size, powers.data());
    check(finite == std::isfinite(most), "softmax declines what has no finite maximum");
    double sum = 0;
    for (int i = 0; i < n; i++) sum += std::isnan(row[i]) ? 0 : std::exp(double{row[i]} - most);
    bool right = true;
    for (int i = 0; i < n && finite; i++) right &= close(powers[i], std::exp(double{row[i]} - most) / sum, 1e-6);
    check(right, "softmax of " + std::to_string(n));

    const int group = 1 + r.below(n), groups = n / group;
    const auto is_number = [](float value) { return std::isfinite(value); };
    const bool numbers = std::all_of(row.begin(), row.begin() + groups * group, is_number);
    std::vector<float> firsts(static_cast<size_t>(1024)), seconds = firsts;
    const bool paired = kernels->best_two(row.data(), groups, group, firsts.data(), seconds.data());
    check(paired == (numbers && group > 1), "best_two declines single values and what is no number");
    for (int g = 0; g < groups && paired; g++) {
      std::vector<float> values(row.begin() + g * group, row.begin() + (g + 1) * group);
      std::sort(values.rbegin(), values.rend());
      right &= firsts[g] == values[0] && seconds[g] == values[1];
    }
    check(right, "best two of " + std::to_string(group));
  }
  check(declined == 0 && ordinary > 100, std::to_string(declined) + " ordinary rows declined");
}

}  // namespace moe::testing
