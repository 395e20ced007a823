// csrc/patchify on the CPU: its own plan and kernels.
#include "../../../csrc/patchify/plan.cuh"

extern "C" {

// stride: of frames, in elements; sizes: frames, height, width, patch, temporal patch, merge; a null start: no resize
const char* run_forward(int bytes, bool brain, int out_bytes, bool out_brain, const void* frames, const int* stride,
                        const int* sizes, int height, int width, const int* start_y, const float* weight_y, int taps_y,
                        const int* start_x, const float* weight_x, int taps_x, const double* mean, const double* std,
                        void* out) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      simt::with_type(out_bytes, out_brain, [&]<class Out>() {
        simt::Device device;
        const patchify::Pixels<const T> pixels{static_cast<const T*>(frames), stride[0], stride[1], stride[2],
                                               stride[3]};
        patchify::forward(device, pixels, {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]},
                          {start_y, weight_y, taps_y, height}, {start_x, weight_x, taps_x, width}, mean, std,
                          static_cast<Out*>(out));
      });
    });
  });
}

const char* run_backward(int bytes, bool brain, int out_bytes, bool out_brain, const void* grad, const int* sizes,
                         int height, int width, const int* start_y, const float* weight_y, int taps_y,
                         const int* start_x, const float* weight_x, int taps_x, const double* std, void* out) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      simt::with_type(out_bytes, out_brain, [&]<class Out>() {
        simt::Device device;
        patchify::backward(device, static_cast<const T*>(grad),
                           {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]},
                           {start_y, weight_y, taps_y, sizes[1]}, {start_x, weight_x, taps_x, sizes[2]}, std, height,
                           width, static_cast<Out*>(out));
      });
    });
  });
}

// sizes: frames, height, width, upscale, patch height and width, temporal patch, merge, repeats
static patchify::Shuffled shuffled(const int* sizes, const int* slots) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], slots, sizes[8]};
}

const char* run_shuffle(int bytes, bool brain, int out_bytes, bool out_brain, const void* y, const int* slots,
                        const int* sizes, const double* mean, const double* std, void* rows, uint8_t* inside) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      simt::with_type(out_bytes, out_brain, [&]<class Out>() {
        simt::Device device;
        patchify::shuffle_forward(device, shuffled(sizes, slots), static_cast<const T*>(y), static_cast<Out*>(rows),
                                  inside, mean, std);
      });
    });
  });
}

const char* run_shuffle_backward(int bytes, bool brain, int out_bytes, bool out_brain, const void* grad,
                                 const int* slots, const uint8_t* inside, const int* sizes, const double* mean,
                                 const double* std, void* dy) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      simt::with_type(out_bytes, out_brain, [&]<class Out>() {
        simt::Device device;
        patchify::shuffle_backward(device, shuffled(sizes, slots), static_cast<const T*>(grad), inside,
                                   static_cast<Out*>(dy), mean, std);
      });
    });
  });
}

// How many columns of a band the plan allots to `rows` neighbouring rows of `all`.
int most_columns(int columns, int taps, int all, int rows) {
  return static_cast<int>(patchify::most_columns({nullptr, nullptr, taps, columns}, all, rows));
}

}  // extern "C"
