// Matrix products with a short side (the LoRA's rank), for processors with AVX-512.
// Vendor libraries run these at a third of the speed of the big product, and their calls cost more than the work at
// small sizes.
#pragma once

#include <cstdint>

#include "../processor.h"

namespace vlmteacher::skinny {

struct Matrix {
  const void* data;
  int64_t stride;   // elements from one row to the next
  bool transposed;  // the operand is the transpose of what is stored
};

// Whether `product` takes bfloat16 operands of such a depth: elements go in pairs along it.
inline bool takes_bfloat16(const Matrix& left, const Matrix& right, int64_t k) {
  return k % 2 == 0 || (left.transposed && !right.transposed);
}

// out (m, n) = alpha left (m, k) right (k, n) + (accumulate ? out : 0), sums in float32, rounded once. Rows of `out`
// are contiguous; `out` is of the operands' type, or float32 where it is `wide`. One thread; the scratch memory is of
// the size of the shorter operand.
using Multiply = void(int64_t m, int64_t n, int64_t k, float alpha, const Matrix& left, const Matrix& right,
                      bool accumulate, void* out, int64_t out_stride, bool wide);
FOR_SOME_PROCESSORS Multiply product_float32, product_bfloat16_avx512, product_bfloat16_avx512bf16;

// to (bfloat16) = factor from (float32), rounded to nearest.
using Round = void(const float* from, int64_t count, float factor, void* to);
FOR_SOME_PROCESSORS Round round_avx512, round_avx512bf16;

}  // namespace vlmteacher::skinny
