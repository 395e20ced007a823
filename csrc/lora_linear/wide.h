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
// the scratch memory stays in its second-level cache.
using Part = void(const Product& product, int64_t row, int64_t rows, int64_t panel, int64_t panels);
FOR_SOME_PROCESSORS Part part_avx512bf16, part_amx;

}  // namespace vlmteacher::wide
