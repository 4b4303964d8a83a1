// bfloat16 linear layers, y = x w' + bias: a row has the same bits in any batch, on any number of threads, on any path.
//
// There is one order of summation. The depth is taken 32 at a time; of these the products at even places and those at
// odd places are summed apart, each from zero, in order, rounding to float once a product (a fused multiply-add). The two
// sums are added to each other, then to the sum so far; at the end the bias is added, and the result rounded to bfloat16.
// Subnormal numbers count as zeros, in operands and results; every NaN becomes 0x7fc0. Blocking in rows, columns or depth
// changes none of this: float sums are only put aside and taken up again. Products of bfloat16 are exact in float, so it
// makes no difference whether they are fused into sums, nor when tininess is told (Arm: before rounding), as long as
// nothing is near 2^-126.
//
// AMX's tile instruction does this by itself. vdpbf16ps adds two products to a sum, that of the upper halves first, which
// is the same where a word holds places 0 and 2, or 1 and 3, the earlier one on top. Anything else takes two fused
// multiply-adds for it.
#pragma once

#include <cstdint>
#include <optional>

#include "elementwise.h"
#include "vec.h"

namespace kvray {

enum class LinearPath {
  kTiles,  // AMX
  kDot,  // vdpbf16ps
  kFma,  // whatever vec.h has
};

constexpr int64_t kPanelDepth = 32;  // of the depth: the unit of the order of summation
constexpr int64_t kBlockColumns = 32;
constexpr int64_t kPanelWords = kPanelDepth * kBlockColumns / 2;  // a panel of a column block, in pairs of bfloat16

// Weights [width, depth] to words [column blocks][panels][kPanelWords], zeros where width and depth end.
// Tiles take [2 x 16 columns][16 pairs][16 columns], other paths [8][2 parities][32 columns].
void pack_weights(LinearPath path, const bf16* weights, int64_t width, int64_t depth, int64_t column_block,
                  uint32_t* words);
void unpack_weights(LinearPath path, const uint32_t* words, int64_t width, int64_t depth, int64_t column_block,
                    bf16* weights);

struct Linear {
  LinearPath path;
  const bf16* x;  // [num_rows, depth]
  int64_t x_row;
  const uint32_t* weights;  // where it is gated, column blocks of the gate, then as many of what it lets through
  const bf16* bias;  // [width], or [2, width] where it is gated, or null
  bf16* y;  // [num_rows, width]
  int64_t num_rows, width, depth;
  std::optional<Activation> gate;  // y = round(activation(x gate' + bias)) * round(x up' + bias)

  // What follows of the above, set by lay_out(): rows are packed and multiplied a unit at a time.
  int64_t panels, column_blocks, unit_rows, unit_bytes, num_units;
  char* packed_rows;  // num_units * unit_bytes of memory, aligned to 64 bytes; set by the caller after lay_out()

  void lay_out();
  bool is_read_in_place(int64_t unit) const;
  // Words from a column block to the one that is multiplied beside it: the next one, or the one that it lets through.
  int64_t beside() const { return (gate ? column_blocks : 1) * panels * kPanelWords; }
};

// Rows to multiply at a time, so that they take no more than some 32 MiB when they are packed.
int64_t rows_per_pass(LinearPath path, int64_t depth);

// Rows of one unit in the order in which the path reads them; nothing to do for a unit that is read in place.
void pack_row_unit(const Linear& linear, int64_t unit);

// How the product is cut into tasks, which may run in any order and side by side.
struct LinearTasks {
  int64_t units, blocks;  // per task: row units, column blocks
  int64_t wide, count;  // tasks side by side, in all
};
LinearTasks cut_linear(const Linear& linear);
void linear_task(const Linear& linear, const LinearTasks& tasks, int64_t task);

// y [num_rows, width] in the order above, one scalar after the other: what every path is held against.
void linear_by_definition(const bf16* x, const bf16* weights, const bf16* bias, int64_t num_rows, int64_t width,
                          int64_t depth, bf16* y);

}  // namespace kvray
