// Checks of the operator's arguments, shared by its backends; the definition is vlmteacher/ops/patchify.py.
#pragma once

#include <utility>

#include "../operator.h"

namespace vlmteacher {

inline void check_blocks(int64_t height, int64_t width, int64_t patch_height, int64_t patch_width,
                         int64_t temporal_patch, int64_t merge, const std::vector<double>& mean,
                         const std::vector<double>& std) {
  STD_TORCH_CHECK(
      patch_height > 0 && patch_width > 0 && temporal_patch > 0 && merge > 0 && mean.size() == 3 && std.size() == 3,
      "patchify takes patches of one pixel and one frame or more, three means and three deviations");
  STD_TORCH_CHECK(height % (patch_height * merge) == 0 && width % (patch_width * merge) == 0, "frames of ", height, "x",
                  width, " do not split into blocks");
}

// Two bands, from (height, width) to the returned size; the same where there are none.
inline std::pair<int64_t, int64_t> check_bands(const Tensors& tables, int64_t height, int64_t width, const Tensor& x) {
  STD_TORCH_CHECK(tables.empty() || tables.size() == 4, "a resize takes two bands, of starts and weights");
  if (tables.empty()) return {height, width};
  for (size_t i = 0; i < 4; i += 2) {
    expect("a band's weight", tables[i + 1], {kAny, kAny}, accumulate_type(x), x);
    expect("a band's start", tables[i], {tables[i + 1].size(0)}, ScalarType::Int, x);
    STD_TORCH_CHECK(tables[i + 1].size(1) <= (i ? width : height), "a band is wider than what it reads");
  }
  return {tables[0].size(0), tables[2].size(0)};
}

inline void check_frames(const Tensor& frames) {
  STD_TORCH_CHECK(frames.dim() == 4 && frames.size(0) > 0 && frames.size(1) == 3,
                  "patchify takes frames (1 or more, 3, height, width)");
}

inline void check_rows(const Tensor& grad, int64_t num_frames, int64_t height, int64_t width, int64_t patch,
                       int64_t temporal_patch) {
  STD_TORCH_CHECK(num_frames > 0, "a gradient of ", num_frames, " frames");
  const int64_t rows = (num_frames + temporal_patch - 1) / temporal_patch * (height / patch) * (width / patch);
  expect("the gradient", grad, {rows, 3 * temporal_patch * patch * patch}, grad.scalar_type(), grad);
}

// rows: the video's; the size is that of its frames before the pixel shuffle.
inline void check_shuffle(const Tensor& rows, const Tensor& slots, int64_t height, int64_t width, int64_t upscale,
                          int64_t patch_height, int64_t patch_width, int64_t temporal_patch, int64_t merge,
                          const std::vector<double>& mean, const std::vector<double>& std) {
  STD_TORCH_CHECK(upscale > 0 && height >= 0 && width >= 0, "a pixel shuffle of ", height, "x", width, " by ", upscale);
  check_blocks(height * upscale, width * upscale, patch_height, patch_width, temporal_patch, merge, mean, std);
  expect("rows", rows, {kAny, 3 * temporal_patch * patch_height * patch_width}, rows.scalar_type(), rows);
  STD_TORCH_CHECK(rows.is_contiguous(), "rows must be contiguous");
  const int64_t patches = height * upscale / patch_height * (width * upscale / patch_width);
  STD_TORCH_CHECK(patches ? rows.size(0) % patches == 0 : rows.size(0) == 0, rows.size(0),
                  " rows are no whole frames of ", patches, " patches");
  expect("slots", slots, {kAny, kAny}, ScalarType::Int, rows);
}

inline void check_shuffled(const Tensor& y, const Tensor& slots, const Tensor& rows, int64_t upscale) {
  expect("y", y, {slots.size(0), kAny, kAny, 3 * upscale * upscale}, y.scalar_type(), rows);
}

inline void check_inside(const Tensor& inside, const Tensor& slots, int64_t height, int64_t width, int64_t upscale) {
  expect("inside", inside, {slots.size(0), 3, height * upscale, (width * upscale + 7) / 8}, ScalarType::Byte, slots);
}

}  // namespace vlmteacher
