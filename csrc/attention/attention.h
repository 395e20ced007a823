// Attention on processors with AVX-512: sums and softmax in float32; of each query only its output and two numbers
// are kept. The definition is vlmteacher/ops/attention.py.
#pragma once
#include <cstdint>

#include "../processor.h"

namespace vlmteacher::attention {

// A (batch, tokens, heads, dim) tensor whose last dimension is contiguous; strides in bytes.
struct Heads {
  char* data;
  int64_t batch, token, head;
  char* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

struct Problem {
  bool half;  // bfloat16, whose dim is even; else float32
  int64_t batch, heads, key_heads, queries, keys, dim;
  double scale;
  const int32_t* spans;  // (queries, 3): a query attends to the keys [0, a) and [b, c); null: all
  Heads q, k, v, out;
  // (batch, heads, queries): the largest exponent, in base 2, and 1 / the sum of exponentials. Not the logarithm of the
  // sum, whose rounding would be an error of all of a query's gradients.
  float *top, *inverse;
  Heads grad, dq, dk, dv;
};

// By element type, and for bfloat16 by instruction set.
struct Kernels {
  int64_t block;  // queries of one piece of the forward's work
  // Bytes of the keys and values of one key head, packed for `forward`; a multiple of 64.
  int64_t (*packed_bytes)(const Problem& p);
  void (*pack)(const Problem& p, int64_t batch, int64_t key_head, char* to);
  // Outputs of the queries [begin, begin + block) of one head.
  void (*forward)(const Problem& p, int64_t batch, int64_t head, int64_t begin, const char* packed);
  // All gradients of one key head and the heads that share it.
  void (*backward)(const Problem& p, int64_t batch, int64_t key_head);
};

FOR_SOME_PROCESSORS Kernels float32_avx512();
FOR_SOME_PROCESSORS Kernels bfloat16_avx512();
FOR_SOME_PROCESSORS Kernels bfloat16_avx512bf16();
FOR_SOME_PROCESSORS Kernels bfloat16_amx();

}  // namespace vlmteacher::attention
