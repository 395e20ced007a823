// csrc/ada_norm on the CPU: its own plan and kernels.
#include "../../../csrc/ada_norm/plan.cuh"

extern "C" {

// sizes: items, tokens of each, width, first, batches and rows of a table
const char* run_forward(int bytes, bool brain, const int* sizes, float eps, const void* x, const void* y,
                        const float* gate, const float* weight, const float* bias, void* out, void* norm) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      simt::Device device;
      ada_norm::run(device,
                    ada_norm::Forward<T>{{sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]},
                                         eps,
                                         static_cast<const T*>(x),
                                         static_cast<const T*>(y),
                                         gate,
                                         weight,
                                         bias,
                                         static_cast<T*>(out),
                                         static_cast<T*>(norm)},
                    sizes[0] * sizes[1]);
    });
  });
}

const char* run_backward(int bytes, bool brain, const int* sizes, float eps, const void* grad_out,
                         const void* grad_norm, const void* kept, const float* gate, const float* weight, void* dx,
                         void* dy) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      simt::Device device;
      ada_norm::run(device,
                    ada_norm::Backward<T>{{sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]},
                                          eps,
                                          static_cast<const T*>(grad_out),
                                          static_cast<const T*>(grad_norm),
                                          static_cast<const T*>(kept),
                                          gate,
                                          weight,
                                          static_cast<T*>(dx),
                                          static_cast<T*>(dy)},
                    sizes[0] * sizes[1]);
    });
  });
}

}  // extern "C"
