// The one launch of a tensor: host code, templated on what a `Device` is (see csrc/lora_linear/plan.cuh).
#pragma once

#include "kernels.cuh"

namespace qk_norm_rope {

template <class T, class Device>
void run(Device& device, const Work<T>& work, int tokens) {
  const int threads = row::threads_for(work.width);
  if (!tokens) return;
  row::with_packs<T, 2>(work.width, [&]<int N>() {
    device.launch(work.grad ? backward<T, N> : forward<T, N>, dim3(tokens), threads, 0, work);
  });
}

}  // namespace qk_norm_rope
