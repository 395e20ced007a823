// csrc/qk_norm_rope on the CPU: its own plan and kernels.
#include "../../../csrc/qk_norm_rope/plan.cuh"

extern "C" {

// sizes: items, tokens of each, width, pairs of channels of a head; no grad: forward
const char* run(int bytes, bool brain, const int* sizes, float eps, const void* x, const void* weight, const void* grad,
                const float* cos, const float* sin, void* out) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      simt::Device device;
      qk_norm_rope::run(device,
                        qk_norm_rope::Work<T>{sizes[1], sizes[2], sizes[3], eps, static_cast<const T*>(x),
                                              static_cast<const T*>(weight), static_cast<const T*>(grad), cos, sin,
                                              static_cast<T*>(out)},
                        sizes[0] * sizes[1]);
    });
  });
}

}  // extern "C"
