// Normalise + patchify on the CPU: one pass over the pixels in either direction. The definition is
// vlmteacher/ops/patchify.py; arithmetic is in float (double for double), rounded once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <type_traits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Grid {  // the rows run over (t, h, w, y, x): block coordinates, then the patch within its merge x merge block
  int64_t patch, temporal_patch, merge, h, w;
  int64_t columns() const { return 3 * temporal_patch * patch * patch; }
};

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// visit(row, t, y, x): patch row `row` starts at pixel (y, x) of the frames of temporal patch t.
template <class Visit>
void for_each_patch(int64_t temporal_patches, const Grid& g, const Visit& visit) {
  torch::stable::parallel_for(0, temporal_patches * g.h, 1, [&](int64_t begin, int64_t end) {
    for (int64_t th = begin; th < end; ++th) {
      int64_t row = th * g.w * g.merge * g.merge;
      for (int64_t w = 0; w < g.w; ++w)
        for (int64_t y = 0; y < g.merge; ++y)
          for (int64_t x = 0; x < g.merge; ++x, ++row)
            visit(row, th / g.h, ((th % g.h) * g.merge + y) * g.patch, (w * g.merge + x) * g.patch);
    }
  });
}

template <class T>
void forward(const T* frames, T* out, int64_t num_frames, const int64_t* stride, const Grid& g,
             const std::vector<double>& mean, const std::vector<double>& std) {
  using A = Accumulate<T>;
  const int64_t temporal_patches = (num_frames + g.temporal_patch - 1) / g.temporal_patch;
  for_each_patch(temporal_patches, g, [&](int64_t row, int64_t t, int64_t y, int64_t x) {
    T* to = out + row * g.columns();
    for (int64_t c = 0; c < 3; ++c) {
      const A m = static_cast<A>(mean[c]), s = static_cast<A>(std[c]);
      for (int64_t k = 0; k < g.temporal_patch; ++k) {
        const int64_t frame = std::min(t * g.temporal_patch + k, num_frames - 1);
        const T* from = frames + frame * stride[0] + c * stride[1] + y * stride[2] + x * stride[3];
        for (int64_t i = 0; i < g.patch; ++i, from += stride[2], to += g.patch) {
          if (stride[3] == 1)
            for (int64_t j = 0; j < g.patch; ++j) to[j] = static_cast<T>((static_cast<A>(from[j]) - m) / s);
          else
            for (int64_t j = 0; j < g.patch; ++j)
              to[j] = static_cast<T>((static_cast<A>(from[j * stride[3]]) - m) / s);
        }
      }
    }
  });
}

template <class T>
void backward(const T* grad, T* out, int64_t num_frames, const Grid& g, const std::vector<double>& std) {
  using A = Accumulate<T>;
  const int64_t temporal_patches = (num_frames + g.temporal_patch - 1) / g.temporal_patch;
  const int64_t width = g.w * g.merge * g.patch, height = g.h * g.merge * g.patch, area = g.patch * g.patch;
  for_each_patch(temporal_patches, g, [&](int64_t row, int64_t t, int64_t y, int64_t x) {
    const int64_t real = std::min(g.temporal_patch, num_frames - t * g.temporal_patch);
    for (int64_t c = 0; c < 3; ++c) {
      const A s = static_cast<A>(std[c]);
      const T* channel = grad + row * g.columns() + c * g.temporal_patch * area;
      for (int64_t k = 0; k < real; ++k) {
        // the last real frame also stands in the slots that it was repeated into
        const int64_t slots = k + 1 == real ? g.temporal_patch - k : 1;
        T* to = out + (((t * g.temporal_patch + k) * 3 + c) * height + y) * width + x;
        for (int64_t i = 0; i < g.patch; ++i, to += width) {
          const T* from = channel + k * area + i * g.patch;
          for (int64_t j = 0; j < g.patch; ++j) {
            A sum = static_cast<A>(from[j]);
            for (int64_t slot = 1; slot < slots; ++slot) sum += static_cast<A>(from[slot * area + j]);
            to[j] = static_cast<T>(sum / s);
          }
        }
      }
    }
  });
}

#define DISPATCH(TENSOR, NAME, ...)                                                                                \
  THO_DISPATCH_V2((TENSOR).scalar_type(), NAME, AT_WRAP([&] { __VA_ARGS__; }), ScalarType::Float, ScalarType::Double, \
                  ScalarType::Half, ScalarType::BFloat16)

Tensor patchify(const Tensor& frames, int64_t patch, int64_t temporal_patch, int64_t merge, std::vector<double> mean,
                std::vector<double> std) {
  const Grid g{patch, temporal_patch, merge, frames.size(2) / (patch * merge), frames.size(3) / (patch * merge)};
  const int64_t temporal_patches = (frames.size(0) + temporal_patch - 1) / temporal_patch;
  Tensor out = torch::stable::new_empty(frames, {temporal_patches * g.h * g.w * merge * merge, g.columns()});
  const int64_t stride[] = {frames.stride(0), frames.stride(1), frames.stride(2), frames.stride(3)};
  DISPATCH(frames, "patchify",
           forward(static_cast<const scalar_t*>(frames.const_data_ptr()),
                   static_cast<scalar_t*>(out.mutable_data_ptr()), frames.size(0), stride, g, mean, std));
  return out;
}

Tensor patchify_backward(const Tensor& grad, int64_t num_frames, int64_t height, int64_t width, int64_t patch,
                         int64_t temporal_patch, int64_t merge, std::vector<double> std) {
  const Grid g{patch, temporal_patch, merge, height / (patch * merge), width / (patch * merge)};
  Tensor rows = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_empty(grad, {num_frames, 3, height, width});
  DISPATCH(rows, "patchify_backward",
           backward(static_cast<const scalar_t*>(rows.const_data_ptr()),
                    static_cast<scalar_t*>(out.mutable_data_ptr()), num_frames, g, std));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def("patchify(Tensor frames, int patch, int temporal_patch, int merge, float[] mean, float[] std) -> Tensor");
  m.def(
      "patchify_backward(Tensor grad, int num_frames, int height, int width, int patch, int temporal_patch, int merge, "
      "float[] std) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CPU, m) {
  m.impl("patchify", TORCH_BOX(&patchify));
  m.impl("patchify_backward", TORCH_BOX(&patchify_backward));
}
