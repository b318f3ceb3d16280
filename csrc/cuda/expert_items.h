// The order of the expert MLP's row tiles, and how its persistent kernel cuts a product into work items. Without CUDA,
// so that it is tested anywhere.
#pragma once
#include <cstdint>

#include "experts_layout.h"

namespace moe::mlp {

// For divisions by a number that the host knows, of numbers below 2^31.
struct Divisor {
  uint32_t value, reciprocal;  // reciprocal: 2^32 / value
};
inline Divisor divisor(uint32_t d) {
  const uint64_t reciprocal = (uint64_t{1} << 32) / (d == 0 ? 1 : d);
  return {d, static_cast<uint32_t>(reciprocal > UINT32_MAX ? UINT32_MAX : reciprocal)};
}
MOE_BOTH uint32_t quotient(uint32_t n, Divisor d) {
  const uint32_t about = static_cast<uint32_t>(uint64_t{n} * d.reciprocal >> 32);  // at most one too small
  return about + (n - about * d.value >= d.value ? 1 : 0);
}

constexpr int32_t kPartSteps = 16;  // of a part, at least

// A product of `all` blocks on `grid` multiprocessors, each block `steps` long. Where the blocks fill the
// multiprocessors less than twice, those beyond a whole number of blocks for each are cut along the steps, so that they
// do not keep a few multiprocessors busy while the others have nothing left. Every part has at least kPartSteps, and
// there are at most `grid` parts.
struct Blocks {
  int32_t items, whole, parts;  // items; blocks that are not cut, which come first; parts of each of the others
};
MOE_BOTH Blocks blocks_of(int32_t all, int32_t grid, int32_t steps) {
  const int32_t rest = all < 2 * grid ? all % grid : 0;
  if (rest == 0) return {all, all, 1};
  const int32_t by_grid = grid / rest, by_steps = steps / kPartSteps, most = by_grid < by_steps ? by_grid : by_steps;
  if (most < 2) return {all, all, 1};
  return {all - rest + rest * most, all - rest, most};
}

// An item: a block from step `first` on. Of a cut block: which part it is, and the place of its first part among all
// parts of the product.
struct Piece {
  int32_t block, first, steps, parts, part, slot;
};
MOE_BOTH Piece piece_of(const Blocks& blocks, int32_t index, int32_t steps) {
  if (index < blocks.whole) return {index, 0, steps, 1, 0, 0};
  const int32_t place = index - blocks.whole, cut = place / blocks.parts, part = place - cut * blocks.parts;
  const int32_t first = part * steps / blocks.parts, last = (part + 1) * steps / blocks.parts;
  return {blocks.whole + cut, first, last - first, blocks.parts, part, place - part};
}

// The sums of parts meet in a binary tree: at `width` 1, 2, 4, ... below `parts`, what the parts from carrier() on have
// is added to what its sibling has, if there is one (below `parts`).
MOE_BOTH int32_t carrier(int32_t part, int32_t width) { return part & -width; }
MOE_BOTH int32_t sibling_of(int32_t carrier, int32_t width) { return carrier ^ width; }

// Two lists, of `a` and of `b` elements, in one as evenly as they can be: where the elements of the first go, and of
// the second.
MOE_BOTH int32_t place_of_first(int32_t i, int32_t a, int32_t b) {
  return static_cast<int32_t>((int64_t{i + 1} * (a + b) + a - 1) / a) - 1;
}
MOE_BOTH int32_t place_of_second(int32_t i, int32_t a, int32_t b) {
  return static_cast<int32_t>(int64_t{i} * (a + b) / b);
}

}  // namespace moe::mlp
