// What a CUDA C++ operator's plan.cuh needs from torch: the GPU, the stream and memory. Stable ABI; nvcc builds it
// against any torch, a CPU build too, where the library loads but is never called.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>

#include "operator.h"

// weak: a torch without CUDA lacks this symbol. With CUDA, libtorch_cuda.so must be in the global scope before this
// library is loaded (ops/backends.py).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace vlmteacher {

inline void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

class Device {  // plan.cuh's: x's GPU and torch's current stream there
 public:
  explicit Device(const Tensor& x) : x_(x), guard_(x.get_device_index()) {
    check(cudaSetDevice(x.get_device_index()));  // the guard acts on torch's CUDA runtime, which may be another one
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "libtorch_cuda.so is not in the global scope");
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), reinterpret_cast<void**>(&stream_)));
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, const Arguments&... arguments) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    kernel<<<grid, threads, shared_bytes, stream_>>>(arguments...);
    check(cudaGetLastError());
  }

  template <class T>
  T* scratch(int64_t count) {
    const auto bytes = static_cast<int64_t>(count * sizeof(T));
    scratch_.push_back(torch::stable::new_empty(x_, {bytes}, ScalarType::Byte));
    return static_cast<T*>(scratch_.back().mutable_data_ptr());
  }

  template <class T>
  void copy(T* to, const T* from, int64_t count) {
    check(cudaMemcpyAsync(to, from, count * sizeof(T), cudaMemcpyDeviceToDevice, stream_));
  }

 private:
  const Tensor& x_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  Tensors scratch_;  // freed on the host's return: torch reuses it only after this stream's work
};

template <class F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Half:
      return f.template operator()<__half>();
    case ScalarType::BFloat16:
      return f.template operator()<__nv_bfloat16>();
    default:
      STD_TORCH_CHECK(false, "operators on a GPU take float32, float16 and bfloat16");
  }
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const Maybe& t) {
  return t ? data<T>(*t) : nullptr;
}

// Contiguous, at an address aligned to 16 bytes.
inline Tensor aligned(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 ? torch::stable::clone(dense) : dense;
}

inline Maybe aligned(const Maybe& t) { return t ? Maybe(aligned(*t)) : t; }

inline int size(const Tensor& t, int64_t axis) {
  STD_TORCH_CHECK(t.size(axis) <= std::numeric_limits<int>::max(), t.size(axis), " rows or columns are too many");
  return static_cast<int>(t.size(axis));
}

// Of a (B, N, C) tensor, one after the other.
inline int rows(const Tensor& t) {
  const int64_t count = t.size(0) * t.size(1);
  STD_TORCH_CHECK(count <= std::numeric_limits<int>::max(), count, " rows are too many");
  return static_cast<int>(count);
}

}  // namespace vlmteacher
