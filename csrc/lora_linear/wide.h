// Matrix products of bfloat16 with no short side, for processors with AVX-512 BF16 or AMX. A sum goes over
// several pairs of operands, so that the low-rank part and the layers that share x cost what their arithmetic does; the
// vendor's library takes one pair a call, and is slower here, at small sizes most.
#pragma once

#include <cstdint>

#include "../processor.h"

namespace vlmteacher::wide {

// One stretch of the sum: left (m, k) right (k, n), k even.
struct Segment {
  const void* left;
  int64_t left_stride;  // elements from one row to the next, as below
  const void* right;
  int64_t right_stride;
  bool transposed;  // right is stored (n, k)
  int64_t k;
};

struct Product {
  const Segment* segments;
  int64_t count;
  int64_t m, n;
  const void* bias;  // (n) or null
  void* out;         // (m, n)
  int64_t out_stride;
};

constexpr int64_t kColumns = 32;  // of a panel of packed words

// Rows [row, row + rows) and panels [panel, panel + panels) of the result: sums in float32, rounded once. One thread;
// the scratch memory stays in its second-level cache. That for AMX reads copies of the left operands, begins at a whole
// block of their rows, and has no use for `left_stride`.
using Part = void(const Product& product, int64_t row, int64_t rows, int64_t panel, int64_t panels);
FOR_SOME_PROCESSORS Part part_avx512bf16, part_amx;

constexpr int64_t kCopiedRows = 32, kCopiedDepth = 32;  // [row block][depth block][row][element], zeros behind the last
static constexpr int64_t copied_depths(int64_t k) { return (k + kCopiedDepth - 1) / kCopiedDepth; }
static constexpr int64_t copied_bytes(int64_t rows, int64_t k) {
  return (rows + kCopiedRows - 1) / kCopiedRows * copied_depths(k) * kCopiedRows * kCopiedDepth * 2;
}

// Rows [row, row + rows) of a left operand (m, k) to their place in its copy; `row` begins a block of rows.
FOR_SOME_PROCESSORS void copy_rows_amx(const void* left, int64_t stride, int64_t k, int64_t row, int64_t rows,
                                       void* copy);

}  // namespace vlmteacher::wide
