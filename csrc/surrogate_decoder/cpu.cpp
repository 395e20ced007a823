// The convolutions of the surrogate decoder on the CPU; the definition is vlmteacher/ops/surrogate_decoder.py. All four
// cases are one sum over taps (conv.h): forward, 9 taps; forward from an upsampled image, four phases of the output
// with 2x2 taps each on the small image, the weights that meet the same pixel summed; and backward of either, where
// frame f reads the output frames that read it, 9 taps or all 16 of the phases.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

#include "../scratch.h"
#include "check.h"
#include "conv.h"

namespace {

using namespace vlmteacher;
using namespace vlmteacher::surrogate_decoder;

constexpr int64_t kStrip = 256 << 10;  // bytes, beside the weights in the second-level cache

struct Geometry {
  int64_t phases, taps, step, out_step;
  std::vector<Tap> tap;
};

// Of the small image's tap u (0, 1), row u - 1 + a, in phase a; it stands for the rows k of the kernel: [first, last].
int64_t first_of(int64_t a, int64_t u) { return u == 0 ? 0 : a == 0 ? 1 : 2; }
int64_t last_of(int64_t a, int64_t u) { return u == 1 ? 2 : a == 0 ? 0 : 1; }

Geometry geometry(int64_t upscale, bool backward) {
  Geometry g{1, 9, 1, 1, {}};
  if (upscale == 1) {
    for (int64_t ky = 0; ky < 3; ++ky)
      for (int64_t kx = 0; kx < 3; ++kx) g.tap.push_back(backward ? Tap{1 - ky, 1 - kx} : Tap{ky - 1, kx - 1});
    return g;
  }
  g = backward ? Geometry{1, 16, 2, 1, {}} : Geometry{4, 4, 1, 2, {}};
  const auto offset = [&](int64_t a, int64_t u) { return backward ? 2 * (1 - u - a) + a : u - 1 + a; };
  for (int64_t a = 0; a < 2; ++a)
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t u = 0; u < 2; ++u)
        for (int64_t v = 0; v < 2; ++v) g.tap.push_back({offset(a, u), offset(b, v)});
  return g;
}

float widened(uint16_t half) { return std::bit_cast<float>(uint32_t(half) << 16); }
uint16_t rounded(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void check_available(const Tensor& t, int64_t upscale) {
  STD_TORCH_CHECK(available(), "conv3x3 needs a processor, and a build, with AVX-512 BF16");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
                  "conv3x3 takes float32 and bfloat16");
  STD_TORCH_CHECK(upscale == 1 || upscale == 2, "upscale is 1 or 2, not ", upscale);
}

int64_t packed_size(bool half, int64_t inputs, int64_t outputs, const Geometry& g) {
  return g.phases * g.taps * (half ? (inputs + 1) / 2 : inputs) * ((outputs + kLanes - 1) / kLanes * kLanes);
}

// The weight (N, 3, 3, T C) in the order that conv.h wants: words of (phase, panel, tap).
Tensor conv3x3_pack(const Tensor& any_weight, int64_t sources, int64_t upscale, bool backward) {
  STD_TORCH_CHECK(any_weight.dim() == 4 && (sources == 1 || sources == 2) && any_weight.size(3) % sources == 0,
                  "conv3x3 takes a weight (N, 3, 3, C) and 1 or 2 sources that share C");
  expect("the weight", any_weight, {kAny, 3, 3, kAny}, any_weight.scalar_type(), any_weight);
  check_available(any_weight, upscale);
  const Tensor weight = dense(any_weight);
  const bool half = weight.scalar_type() == ScalarType::BFloat16;
  const int64_t n = weight.size(0), wide = weight.size(3), c = wide / sources;
  const int64_t inputs = backward ? sources * n : wide, outputs = backward ? c : n;
  const int64_t words = half ? (inputs + 1) / 2 : inputs, vectors = (outputs + kLanes - 1) / kLanes;
  const Geometry g = geometry(upscale, backward);
  Tensor packed = torch::stable::new_empty(weight, {packed_size(half, inputs, outputs, g)}, ScalarType::Int);
  const void* from = weight.const_data_ptr();
  // of input k to output o, at (ky, kx)
  const auto element = [&](int64_t k, int64_t o, int64_t ky, int64_t kx) {
    const int64_t row = backward ? k % n : o, column = backward ? k / n * c + o : k;
    const int64_t at = ((row * 3 + ky) * 3 + kx) * wide + column;
    return half ? widened(static_cast<const uint16_t*>(from)[at]) : static_cast<const float*>(from)[at];
  };
  const auto value = [&](int64_t k, int64_t o, int64_t tap) {
    if (k >= inputs || o >= outputs) return 0.f;
    if (upscale == 1) return element(k, o, tap / 3, tap % 3);
    const int64_t a = tap / 8, b = tap / 4 % 2, u = tap / 2 % 2, v = tap % 2;
    double sum = 0;
    for (int64_t ky = first_of(a, u); ky <= last_of(a, u); ++ky)
      for (int64_t kx = first_of(b, v); kx <= last_of(b, v); ++kx) sum += element(k, o, ky, kx);
    return static_cast<float>(sum);
  };
  uint32_t* to = static_cast<uint32_t*>(packed.mutable_data_ptr());
  for (int64_t phase = 0; phase < g.phases; ++phase)
    for (int64_t panel = 0, next; panel < vectors; panel = next) {
      next = panel + panel_vectors(vectors - panel);
      for (int64_t tap = phase * g.taps; tap < (phase + 1) * g.taps; ++tap)
        for (int64_t word = 0; word < words; ++word)
          for (int64_t o = panel * kLanes; o < next * kLanes; ++o)
            *to++ = half ? rounded(value(2 * word, o, tap)) | uint32_t(rounded(value(2 * word + 1, o, tap))) << 16
                         : std::bit_cast<uint32_t>(value(word, o, tap));
    }
  return packed;
}

char* data(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }
uint8_t* signs_of(const Tensor& t) { return t.numel() ? static_cast<uint8_t*>(t.mutable_data_ptr()) : nullptr; }
int64_t frame_bytes(const Tensor& t) { return t.size(1) * t.size(2) * t.size(3) * t.element_size(); }
int64_t sign_bytes(const Tensor& t) { return t.size(1) * t.size(2) * ((t.size(3) + 7) / 8); }

// All frames, a strip of rows at a time.
void run(const Conv& conv, const std::vector<Frame>& frames) {
  if (!conv.height || !conv.width) return;
  int64_t rows_at_once = 1;
  while (rows_at_once < conv.height && conv.strip_bytes(rows_at_once + 1) <= kStrip) ++rows_at_once;
  const int64_t strips = (conv.height + rows_at_once - 1) / rows_at_once;
  rows_at_once = (conv.height + strips - 1) / strips;
  const int64_t count = int64_t(frames.size()) * strips;
  std::atomic<int64_t> next = 0;  // threads take strips as they finish, for their costs differ
  torch::stable::parallel_for(0, std::min<int64_t>(count, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    const Scratch strip(conv.strip_bytes(rows_at_once));
    for (int64_t i = next++; i < count; i = next++) {
      const int64_t row = i % strips * rows_at_once;
      if (row < conv.height) rows(conv, frames[i / strips], row, std::min(row + rows_at_once, conv.height), strip.data);
    }
  });
}

std::vector<float> bias_of(const Maybe& bias, int64_t channels) {
  std::vector<float> found((channels + kLanes - 1) / kLanes * kLanes, 0.f);
  if (!bias) return found;
  const bool half = bias->scalar_type() == ScalarType::BFloat16;
  const void* from = bias->const_data_ptr();
  for (int64_t i = 0; i < channels; ++i)
    found[i] = half ? widened(static_cast<const uint16_t*>(from)[i]) : static_cast<const float*>(from)[i];
  return found;
}

// Throws unless every index is from `least` on and below `end`.
void expect_within(const char* name, const Tensor& indices, int64_t least, int64_t end) {
  const int32_t* index = static_cast<const int32_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < indices.numel(); ++i)
    STD_TORCH_CHECK(index[i] >= least && index[i] < end, name, " must be from ", least, " on and below ", end, ", not ",
                    index[i]);
}

std::tuple<Tensor, Tensor> conv3x3(const Tensor& any_x, const Tensor& any_taps, const Tensor& any_packed,
                                   int64_t channels, const Maybe& any_bias, const Maybe& any_residual,
                                   const Maybe& any_rows, std::optional<double> slope, int64_t upscale) {
  check_available(any_x, upscale);
  check_conv3x3(any_x, any_taps, channels, any_bias, any_residual, any_rows, upscale);
  const Tensor x = dense(any_x), taps = dense(any_taps);
  const Maybe bias = dense(any_bias), residual = dense(any_residual), rows = dense(any_rows);
  expect_within("taps", taps, -1, x.size(0));
  if (rows) expect_within("rows", *rows, 0, residual->size(0));
  const int64_t count = taps.size(0), sources = taps.size(1), height = x.size(1), width = x.size(2);
  Tensor y = torch::stable::new_empty(x, {count, height * upscale, width * upscale, channels});
  Tensor signs = slope ? torch::stable::new_empty(x, {count, height * upscale, width * upscale, (channels + 7) / 8},
                                                  ScalarType::Byte)
                       : torch::stable::new_empty(x, {0}, ScalarType::Byte);
  const Geometry g = geometry(upscale, false);
  expect("packed", any_packed, {packed_size(x.scalar_type() == ScalarType::BFloat16, sources * x.size(3), channels, g)},
         ScalarType::Int, x);
  const Tensor packed = dense(any_packed);
  const std::vector<float> offset = bias_of(bias, channels);
  const Conv conv{x.scalar_type() == ScalarType::BFloat16,
                  height,
                  width,
                  x.size(3),
                  sources,
                  height,
                  width,
                  g.step,
                  g.phases,
                  g.out_step,
                  g.taps,
                  g.tap.data(),
                  channels,
                  static_cast<const int32_t*>(packed.const_data_ptr()),
                  offset.data(),
                  float(slope.value_or(0))};
  const int32_t* tap = static_cast<const int32_t*>(taps.const_data_ptr());
  std::vector<Source> seen(count * sources);
  for (size_t i = 0; i < seen.size(); ++i)
    seen[i] = {tap[i] < 0 ? nullptr : data(x) + tap[i] * frame_bytes(x), nullptr};
  std::vector<Frame> frames(count);
  for (int64_t f = 0; f < count; ++f) {
    const char* added = nullptr;
    if (residual) added = data(*residual) + static_cast<const int32_t*>(rows->const_data_ptr())[f] * frame_bytes(y);
    frames[f] = {&seen[f * sources], added, nullptr, data(y) + f * frame_bytes(y),
                 slope ? signs_of(signs) + f * sign_bytes(y) : nullptr};
  }
  run(conv, frames);
  return {y, signs};
}

Tensor conv3x3_backward(const Tensor& any_grad, const Tensor& any_signs, const Tensor& any_taps, int64_t bank,
                        const Tensor& any_packed, int64_t channels, const Maybe& any_residual,
                        const Maybe& any_residual_signs, std::optional<double> slope, int64_t upscale) {
  check_available(any_grad, upscale);
  check_conv3x3_backward(any_grad, any_signs, any_taps, bank, channels, any_residual, any_residual_signs,
                         slope.has_value(), upscale);
  const Tensor grad = dense(any_grad), signs = dense(any_signs), taps = dense(any_taps);
  const Maybe residual = dense(any_residual), residual_signs = dense(any_residual_signs);
  expect_within("taps", taps, -1, bank);
  const int64_t count = taps.size(0), sources = taps.size(1), height = grad.size(1), width = grad.size(2);
  Tensor dx = torch::stable::new_empty(grad, {bank, height / upscale, width / upscale, channels});
  const Geometry g = geometry(upscale, true);
  expect("packed", any_packed,
         {packed_size(grad.scalar_type() == ScalarType::BFloat16, sources * grad.size(3), channels, g)},
         ScalarType::Int, grad);
  const Tensor packed = dense(any_packed);
  const std::vector<float> offset = bias_of({}, channels);
  const Conv conv{grad.scalar_type() == ScalarType::BFloat16,
                  height,
                  width,
                  grad.size(3),
                  sources,
                  height / upscale,
                  width / upscale,
                  g.step,
                  g.phases,
                  g.out_step,
                  g.taps,
                  g.tap.data(),
                  channels,
                  static_cast<const int32_t*>(packed.const_data_ptr()),
                  offset.data(),
                  float(slope.value_or(0))};
  const int32_t* tap = static_cast<const int32_t*>(taps.const_data_ptr());
  std::vector<Source> seen(bank * sources, Source{nullptr, nullptr});
  std::vector<Frame> frames(bank), used;
  for (int64_t f = 0; f < bank; ++f)
    frames[f] = {&seen[f * sources], nullptr, nullptr, data(dx) + f * frame_bytes(dx), nullptr};
  std::vector<bool> seen_at_all(bank, false);
  for (int64_t i = 0; i < count * sources; ++i) {
    const int64_t f = tap[i], from = i / sources;
    if (f < 0) continue;
    seen_at_all[f] = true;
    STD_TORCH_CHECK(!seen[f * sources + i % sources].frame, "frame ", f, " stands twice in a column of taps");
    seen[f * sources + i % sources] = {data(grad) + from * frame_bytes(grad),
                                       slope ? signs_of(signs) + from * sign_bytes(grad) : nullptr};
    if (residual && i % sources == 0) {
      frames[f].residual = data(*residual) + from * frame_bytes(*residual);
      frames[f].residual_signs = slope ? signs_of(*residual_signs) + from * sign_bytes(*residual) : nullptr;
    }
  }
  for (int64_t f = 0; f < bank; ++f)
    if (seen_at_all[f])
      used.push_back(frames[f]);
    else
      std::memset(frames[f].out, 0, frame_bytes(dx));
  run(conv, used);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def("conv3x3_pack(Tensor weight, int sources, int upscale, bool backward) -> Tensor");
  m.def(
      "conv3x3(Tensor x, Tensor taps, Tensor packed, int channels, Tensor? bias, Tensor? residual, Tensor? rows, "
      "float? slope, int upscale) -> (Tensor, Tensor)");
  m.def(
      "conv3x3_backward(Tensor grad, Tensor signs, Tensor taps, int frames, Tensor packed, int channels, "
      "Tensor? residual, Tensor? residual_signs, float? slope, int upscale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CPU, m) {
  m.impl("conv3x3_pack", boxed<&conv3x3_pack>);
  m.impl("conv3x3", boxed<&conv3x3>);
  m.impl("conv3x3_backward", boxed<&conv3x3_backward>);
}
