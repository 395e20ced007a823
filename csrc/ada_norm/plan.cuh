// The one launch of each direction: host code, templated on what a `Device` is (see csrc/lora_linear/plan.cuh).
#pragma once

#include "kernels.cuh"

namespace ada_norm {

template <class T, class Device>
void run(Device& device, const Forward<T>& work, int tokens) {
  const int width = work.sizes.width, threads = row::threads_for(width);
  if (!tokens) return;
  row::with_packs<T, 1>(width, [&]<int N>() { device.launch(forward<T, N>, dim3(tokens), threads, 0, work); });
}

template <class T, class Device>
void run(Device& device, const Backward<T>& work, int tokens) {
  const int width = work.sizes.width, threads = row::threads_for(width);
  if (!tokens) return;
  row::with_packs<T, 1>(width, [&]<int N>() { device.launch(backward<T, N>, dim3(tokens), threads, 0, work); });
}

}  // namespace ada_norm
