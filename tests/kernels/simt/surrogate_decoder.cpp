// csrc/surrogate_decoder on the CPU: its own plan and kernels.
#include "../../../csrc/surrogate_decoder/plan.cuh"

namespace {

surrogate_decoder::Shape shape_of(const int* s, float slope) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], slope};
}

}  // namespace

extern "C" {

const char* run_forward(int bytes, bool brain, const void* x, const int* taps, const void* weight, const void* bias,
                        const void* residual, const int* rows, const int* shape, float slope, void* y, uint8_t* signs) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      simt::Device device;
      surrogate_decoder::forward(device, static_cast<const T*>(x), taps, static_cast<const T*>(weight),
                                 static_cast<const T*>(bias), static_cast<const T*>(residual), rows,
                                 shape_of(shape, slope), static_cast<T*>(y), signs);
    });
  });
}

const char* run_backward(int bytes, bool brain, const void* grad, const uint8_t* signs, const int* taps,
                         const void* weight, const void* residual, const uint8_t* residual_signs, const int* shape,
                         float slope, void* dx) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      simt::Device device;
      surrogate_decoder::backward(device, static_cast<const T*>(grad), signs, taps, static_cast<const T*>(weight),
                                  static_cast<const T*>(residual), residual_signs, shape_of(shape, slope),
                                  static_cast<T*>(dx));
    });
  });
}

}  // extern "C"
