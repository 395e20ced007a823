// csrc/ada_norm/rows.h and csrc/qk_norm_rope/rows.h for the test's compiler flags.
#include "../../csrc/ada_norm/rows.h"

#include "../../csrc/qk_norm_rope/rows.h"

using namespace vlmteacher;

extern "C" {

int vector_bytes() { return kVectorBytes; }

#define OPERATORS(NAME, T, A)                                                                                          \
  void ada_norm_##NAME(int tokens, int width, int first, const T* x, const T* y, const A* gate, const A* weight,       \
                       const A* bias, T* out, T* norm) {                                                               \
    ada_norm::forward<T>({{tokens, width, first, 1, 2}, A(1e-6), x, y, gate, weight, bias, out, norm}, 0, tokens);     \
  }                                                                                                                    \
  void ada_norm_backward_##NAME(int tokens, int width, int first, const T* grad_out, const T* grad_norm,               \
                                const T* kept, const A* gate, const A* weight, T* dx, T* dy) {                         \
    ada_norm::backward<T>({{tokens, width, first, 1, 2}, A(1e-6), grad_out, grad_norm, kept, gate, weight, dx, dy}, 0, \
                          tokens);                                                                                     \
  }                                                                                                                    \
  void qk_norm_rope_##NAME(int tokens, int width, int channels, const T* x, const T* weight, const T* grad,            \
                           const A* cos, const A* sin, T* out) {                                                       \
    A* const scratch = new A[qk_norm_rope::scratch_size(width, channels)];                                             \
    qk_norm_rope::rows<T>({tokens, width, channels, A(1e-6), x, weight, grad, cos, sin, out}, 0, tokens, scratch);     \
    delete[] scratch;                                                                                                  \
  }

OPERATORS(float32, float, float)
OPERATORS(float64, double, double)
OPERATORS(bfloat16, BFloat16, float)

// Rounds as a row is written.
void to_bfloat16(int count, const float* from, BFloat16* to) {
  runs<float>(count, RUN(&) { store(to + i, count, load(from + i, count)); });
}
}
