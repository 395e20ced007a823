// csrc/lora_linear on the CPU: its own plan and kernels.
#include "../../../csrc/lora_linear/plan.cuh"

extern "C" {

const char* run_forward(int bytes, bool brain, const void* x, int m, int k, int count, const void** weights,
                        const void** biases, const void** lora_a, const void** lora_b, const float* scaling,
                        const int* n, const int* ranks, void** y, void* s) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      std::vector<lora_linear::Layer<T>> layers;
      for (int i = 0; i < count; ++i)
        layers.push_back({.weight = static_cast<const T*>(weights[i]),
                          .bias = static_cast<const T*>(biases[i]),
                          .lora_a = static_cast<const T*>(lora_a[i]),
                          .lora_b = static_cast<const T*>(lora_b[i]),
                          .y = static_cast<T*>(y[i]),
                          .n = n[i],
                          .rank = ranks[i],
                          .scaling = scaling[i]});
      simt::Device device;
      lora_linear::forward(device, static_cast<const T*>(x), m, k, layers, static_cast<T*>(s));
    });
  });
}

const char* run_backward(int bytes, bool brain, const void** grads, const void* x, const void* s, int m, int k,
                         int count, const void** weights, const void** lora_a, const void** lora_b,
                         const float* scaling, const int* n, const int* ranks, void* dx, void** da, void** db) {
  return simt::attempt([&] {
    simt::with_type(bytes, brain, [&]<class T>() {
      std::vector<lora_linear::Layer<T>> layers;
      for (int i = 0; i < count; ++i)
        layers.push_back({.weight = static_cast<const T*>(weights[i]),
                          .lora_a = static_cast<const T*>(lora_a[i]),
                          .lora_b = static_cast<const T*>(lora_b[i]),
                          .grad = static_cast<const T*>(grads[i]),
                          .da = da ? static_cast<T*>(da[i]) : nullptr,
                          .db = db ? static_cast<T*>(db[i]) : nullptr,
                          .n = n[i],
                          .rank = ranks[i],
                          .scaling = scaling[i]});
      simt::Device device;
      lora_linear::backward(device, static_cast<const T*>(x), static_cast<const T*>(s), m, k, layers,
                            static_cast<T*>(dx), da != nullptr, db != nullptr);
    });
  });
}

}  // extern "C"
