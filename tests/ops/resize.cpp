// csrc/patchify/resize.h for the test's compiler flags.
#include "../../csrc/patchify/resize.h"

namespace resize = vlmteacher::resize;

template <class A>
void run(const A* plane, const int32_t* start_y, const A* weight_y, int rows_y, int taps_y, const int32_t* start_x,
         const A* weight_x, int rows_x, int taps_x, int height, int width, int begin, int end, A scale, A shift,
         A* to) {
  const resize::Band<A> y{start_y, weight_y, rows_y, height, taps_y}, x{start_x, weight_x, rows_x, width, taps_x};
  const resize::Part<A> part{begin, end, scale, shift};
  const A** const rows = new const A*[resize::rows_read(y, part)];
  for (int64_t i = 0; i < resize::rows_read(y, part); ++i) rows[i] = plane + (start_y[begin] + i) * width;
  A* const scratch = new A[resize::scratch_size(y, x, part)];
  resize::resample(rows, y, x, part, scratch, to);
  delete[] scratch;
  delete[] rows;
}

extern "C" {

int vector_bytes() { return vlmteacher::kVectorBytes; }

#define RESIZE(NAME, A)                                                                                                \
  void NAME(const A* plane, const int32_t* start_y, const A* weight_y, int rows_y, int taps_y, const int32_t* start_x, \
            const A* weight_x, int rows_x, int taps_x, int height, int width, int begin, int end, A scale, A shift,    \
            A* to) {                                                                                                   \
    run(plane, start_y, weight_y, rows_y, taps_y, start_x, weight_x, rows_x, taps_x, height, width, begin, end, scale, \
        shift, to);                                                                                                    \
  }

RESIZE(resize_float, float)
RESIZE(resize_double, double)

}  // extern "C"
