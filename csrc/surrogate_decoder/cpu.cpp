// The convolutions of the surrogate decoder on the CPU; the definition is vlmteacher/ops/surrogate_decoder.py. All four
// cases are one sum over taps (conv.h): forward, 9 taps; forward from an upsampled image, four phases of the output
// with 2x2 taps each on the small image, the weights that meet the same pixel summed; and backward of either, where
// frame f reads the output frames that read it, 9 taps or all 16 of the phases. In float32 products 9 taps are computed
// by Winograd's method (conv_float32.h).
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

#include "../scratch.h"
#include "check.h"
#include "conv.h"
#include "vendor.h"

namespace {

using namespace vlmteacher;
using namespace vlmteacher::surrogate_decoder;

constexpr int64_t kStrip = 256 << 10;  // bytes, beside the weights in the second-level cache
constexpr int64_t kPanel = 48;         // output channels of the widest panel

constexpr double kWinograd[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};  // G of F(2, 3)

struct Geometry {
  int64_t phases, taps, step, out_step;
  std::vector<Tap> tap;
};

// Of the small image's tap u (0, 1), row u - 1 + a, in phase a; it stands for the rows k of the kernel: [first, last].
int64_t first_of(int64_t a, int64_t u) { return u == 0 ? 0 : a == 0 ? 1 : 2; }
int64_t last_of(int64_t a, int64_t u) { return u == 1 ? 2 : a == 0 ? 0 : 1; }

float widened(uint16_t half) { return std::bit_cast<float>(uint32_t(half) << 16); }
uint16_t rounded(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The kernels for t, and the geometry that they compute.
Kernels kernels_for(const Tensor& t, int64_t upscale) {
  const bool half = t.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(half || t.scalar_type() == ScalarType::Float, "conv3x3 takes float32 and bfloat16");
  STD_TORCH_CHECK(upscale == 1 || upscale == 2, "upscale is 1 or 2, not ", upscale);
  STD_TORCH_CHECK(uses(Processor::kAvx2), "conv3x3 needs a processor, and a build, with AVX2");
  if (half && uses(Processor::kAmxTiles)) return bfloat16_amx();
  if (half && uses(Processor::kAvx512Bf16)) return bfloat16_avx512bf16();
  if (uses(Processor::kAvx512)) return half ? bfloat16_avx512() : float32_avx512();
  return half ? bfloat16_avx2() : float32_avx2();
}

int64_t words_of(const Kernels& kernels, int64_t inputs) {
  const int64_t words = kernels.pairs ? (inputs + 1) / 2 : inputs;
  return (words + kernels.whole_words - 1) / kernels.whole_words * kernels.whole_words;
}

Geometry geometry(const Kernels& kernels, int64_t upscale, bool backward) {
  Geometry g{1, 9, 1, 1, {}};
  if (upscale == 1 && kernels.winograd) return {1, 16, 1, 1, {}};
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

int64_t packed_size(const Kernels& kernels, int64_t inputs, int64_t outputs, const Geometry& g) {
  const int64_t vectors = (outputs + kernels.lanes - 1) / kernels.lanes;
  return g.phases * g.taps * words_of(kernels, inputs) * vectors * kernels.lanes;
}

// The weight (N, 3, 3, T C) in the order that conv.h wants: words of (phase, panel, tap).
Tensor conv3x3_pack(const Tensor& any_weight, int64_t sources, int64_t upscale, bool backward) {
  STD_TORCH_CHECK(any_weight.dim() == 4 && (sources == 1 || sources == 2) && any_weight.size(3) % sources == 0,
                  "conv3x3 takes a weight (N, 3, 3, C) and 1 or 2 sources that share C");
  expect("the weight", any_weight, {kAny, 3, 3, kAny}, any_weight.scalar_type(), any_weight);
  const Kernels kernels = kernels_for(any_weight, upscale);
  const Tensor weight = dense(any_weight);
  const bool half = weight.scalar_type() == ScalarType::BFloat16;
  const int64_t n = weight.size(0), wide = weight.size(3), c = wide / sources;
  const int64_t inputs = backward ? sources * n : wide, outputs = backward ? c : n;
  const int64_t words = words_of(kernels, inputs), vectors = (outputs + kernels.lanes - 1) / kernels.lanes;
  const Geometry g = geometry(kernels, upscale, backward);
  Tensor packed = torch::stable::new_empty(weight, {packed_size(kernels, inputs, outputs, g)}, ScalarType::Int);
  const void* from = weight.const_data_ptr();
  // of input k to output o, at (ky, kx)
  const auto element = [&](int64_t k, int64_t o, int64_t ky, int64_t kx) {
    const int64_t row = backward ? k % n : o, column = backward ? k / n * c + o : k;
    const int64_t at = ((row * 3 + ky) * 3 + kx) * wide + column;
    return half ? widened(static_cast<const uint16_t*>(from)[at]) : static_cast<const float*>(from)[at];
  };
  const auto value = [&](int64_t k, int64_t o, int64_t tap) {
    if (k >= inputs || o >= outputs) return 0.f;
    if (upscale == 1 && kernels.winograd) {
      double sum = 0;  // G w G^T; the gradient's kernel is the weight reversed
      for (int64_t ky = 0; ky < 3; ++ky)
        for (int64_t kx = 0; kx < 3; ++kx)
          sum += kWinograd[tap / 4][ky] * kWinograd[tap % 4][kx] *
                 (backward ? element(k, o, 2 - ky, 2 - kx) : element(k, o, ky, kx));
      return static_cast<float>(sum);
    }
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
      next = panel + kernels.panel_vectors(vectors - panel);
      for (int64_t tap = phase * g.taps; tap < (phase + 1) * g.taps; ++tap)
        for (int64_t word = 0; word < words; ++word)
          for (int64_t o = panel * kernels.lanes; o < next * kernels.lanes; ++o)
            *to++ = kernels.pairs
                        ? rounded(value(2 * word, o, tap)) | uint32_t(rounded(value(2 * word + 1, o, tap))) << 16
                        : std::bit_cast<uint32_t>(value(word, o, tap));
    }
  return packed;
}

char* data(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }
uint8_t* signs_of(const Tensor& t) { return t.numel() ? static_cast<uint8_t*>(t.mutable_data_ptr()) : nullptr; }
int64_t frame_bytes(const Tensor& t) { return t.size(1) * t.size(2) * t.size(3) * t.element_size(); }
int64_t sign_bytes(const Tensor& t) { return t.size(1) * t.size(2) * ((t.size(3) + 7) / 8); }

// All frames, a strip of rows at a time.
void run(const Kernels& kernels, const Conv& conv, const std::vector<Frame>& frames) {
  if (!conv.height || !conv.width) return;
  int64_t rows_at_once = 1;
  while (rows_at_once < conv.height && conv.strip_bytes(rows_at_once + 1) <= kStrip) ++rows_at_once;
  const int64_t strips = (conv.height + rows_at_once - 1) / rows_at_once;
  rows_at_once = (conv.height + strips - 1) / strips;
  if (!conv.tap) rows_at_once += rows_at_once % 2;  // whole tiles
  const int64_t count = int64_t(frames.size()) * strips;
  std::atomic<int64_t> next = 0;  // threads take strips as they finish, for their costs differ
  torch::stable::parallel_for(0, std::min<int64_t>(count, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    const Scratch scratch(conv.strip_bytes(rows_at_once) + kernels.more_scratch(conv, rows_at_once));
    for (int64_t i = next++; i < count; i = next++) {
      const int64_t row = i % strips * rows_at_once;
      if (row < conv.height)
        kernels.rows(conv, frames[i / strips], row, std::min(row + rows_at_once, conv.height), scratch.data);
    }
  });
}

std::vector<float> bias_of(const Maybe& bias, int64_t channels) {
  std::vector<float> found(channels + kPanel, 0.f);
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
  const Kernels kernels = kernels_for(any_x, upscale);
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
  const Geometry g = geometry(kernels, upscale, false);
  expect("packed", any_packed, {packed_size(kernels, sources * x.size(3), channels, g)}, ScalarType::Int, x);
  const Tensor packed = dense(any_packed);
  const std::vector<float> offset = bias_of(bias, channels);
  const Conv conv{height,
                  width,
                  x.size(3),
                  sources,
                  words_of(kernels, sources * x.size(3)),
                  width + 2 + (g.tap.empty() ? width % 2 : 0),
                  height,
                  width,
                  g.step,
                  g.phases,
                  g.out_step,
                  g.taps,
                  g.tap.empty() ? nullptr : g.tap.data(),
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
  run(kernels, conv, frames);
  return {y, signs};
}

Tensor conv3x3_backward(const Tensor& any_grad, const Tensor& any_signs, const Tensor& any_taps, int64_t bank,
                        const Tensor& any_packed, int64_t channels, const Maybe& any_residual,
                        const Maybe& any_residual_signs, std::optional<double> slope, int64_t upscale) {
  const Kernels kernels = kernels_for(any_grad, upscale);
  check_conv3x3_backward(any_grad, any_signs, any_taps, bank, channels, any_residual, any_residual_signs,
                         slope.has_value(), upscale);
  const Tensor grad = dense(any_grad), signs = dense(any_signs), taps = dense(any_taps);
  const Maybe residual = dense(any_residual), residual_signs = dense(any_residual_signs);
  expect_within("taps", taps, -1, bank);
  const int64_t count = taps.size(0), sources = taps.size(1), height = grad.size(1), width = grad.size(2);
  Tensor dx = torch::stable::new_empty(grad, {bank, height / upscale, width / upscale, channels});
  const Geometry g = geometry(kernels, upscale, true);
  expect("packed", any_packed, {packed_size(kernels, sources * grad.size(3), channels, g)}, ScalarType::Int, grad);
  const Tensor packed = dense(any_packed);
  const std::vector<float> offset = bias_of({}, channels);
  const Conv conv{height,
                  width,
                  grad.size(3),
                  sources,
                  words_of(kernels, sources * grad.size(3)),
                  width + 2 + (g.tap.empty() ? width % 2 : 0),
                  height / upscale,
                  width / upscale,
                  g.step,
                  g.phases,
                  g.out_step,
                  g.taps,
                  g.tap.empty() ? nullptr : g.tap.data(),
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
  run(kernels, conv, used);
  return dx;
}

// For a vendor's convolution: taps (bank, T) of conv3x3_backward, the frame of `grad` that reads frame f by column t.
Tensor conv3x3_readers(const Tensor& any_taps, int64_t bank) {
  STD_TORCH_CHECK(any_taps.dim() == 2 && any_taps.scalar_type() == ScalarType::Int && bank >= 0,
                  "taps are an int32 matrix");
  const Tensor taps = dense(any_taps);
  expect_within("taps", taps, -1, bank);
  const int64_t columns = taps.size(1);
  Tensor readers = torch::stable::new_empty(taps, {bank, columns});
  const int32_t* tap = static_cast<const int32_t*>(taps.const_data_ptr());
  int32_t* to = static_cast<int32_t*>(readers.mutable_data_ptr());
  std::fill(to, to + bank * columns, -1);
  for (int64_t i = 0; i < taps.numel(); ++i)
    if (tap[i] >= 0) {
      int32_t& reader = to[tap[i] * columns + i % columns];
      STD_TORCH_CHECK(reader < 0, "frame ", tap[i], " stands twice in a column of taps");
      reader = int32_t(i / columns);
    }
  return readers;
}

void check_vendor(const Tensor& t) {
  STD_TORCH_CHECK(uses(Processor::kAvx512Bf16) && t.scalar_type() == ScalarType::BFloat16,
                  "this takes bfloat16, on a processor with AVX-512 BF16");
}

// The input of a vendor's convolution: (G, upscale H, upscale W, T C), the frames that `taps` lists beside one another,
// masked where there are signs. x itself where that is it.
Tensor conv3x3_gather(const Tensor& any_x, const Tensor& any_taps, const Maybe& any_signs, double slope,
                      int64_t upscale) {
  check_vendor(any_x);
  check_taps(any_x, any_taps, upscale);
  const Tensor x = dense(any_x), taps = dense(any_taps);
  const int64_t height = x.size(1), width = x.size(2), channels = x.size(3), count = taps.size(0),
                sources = taps.size(1);
  expect("signs", any_signs, {x.size(0), height, width, (channels + 7) / 8}, ScalarType::Byte, x);
  const Maybe signs = dense(any_signs);
  expect_within("taps", taps, -1, x.size(0));
  const int32_t* tap = static_cast<const int32_t*>(taps.const_data_ptr());
  bool same = sources == 1 && upscale == 1 && !signs && count == x.size(0);
  for (int64_t i = 0; same && i < count; ++i) same = tap[i] == i;
  if (same) return x;
  Tensor out = torch::stable::new_empty(x, {count, height * upscale, width * upscale, sources * channels});
  std::vector<Source> seen(count * sources);
  for (size_t i = 0; i < seen.size(); ++i)
    if (tap[i] >= 0)
      seen[i] = {data(x) + tap[i] * frame_bytes(x), signs ? signs_of(*signs) + tap[i] * sign_bytes(x) : nullptr};
  const int64_t rows = height * upscale, row_bytes = width * upscale * sources * channels * 2;
  char* const to = data(out);
  torch::stable::parallel_for(0, count * rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      gather_bfloat16(&seen[i / rows * sources], sources, width, channels, upscale, float(slope), i % rows,
                      i % rows + 1, to + i * row_bytes);
  });
  return out;
}

// The end of a vendor's convolution, in place of y (G, H, W, N): residual[rows[g]], masked where there are signs, none
// where rows[g] is -1, is added; with `activation` that follows, and its signs are returned.
Tensor conv3x3_finish(Tensor y, const Maybe& any_residual, const Maybe& any_rows, const Maybe& any_signs,
                      std::optional<double> slope, bool activation) {
  check_vendor(y);
  STD_TORCH_CHECK(y.dim() == 4 && y.is_contiguous() && any_residual.has_value() == any_rows.has_value(),
                  "y is contiguous frames; a residual comes with rows");
  const int64_t count = y.size(0), height = y.size(1), width = y.size(2), channels = y.size(3);
  const Maybe residual = dense(any_residual), rows = dense(any_rows), more_signs = dense(any_signs);
  expect("the residual", residual, {kAny, height, width, channels}, ScalarType::BFloat16, y);
  expect("rows", rows, {count}, ScalarType::Int, y);
  STD_TORCH_CHECK(residual || !more_signs, "signs come with a residual");
  if (residual) expect_within("rows", *rows, -1, residual->size(0));
  if (more_signs)
    expect("signs", more_signs, {residual->size(0), height, width, (channels + 7) / 8}, ScalarType::Byte, y);
  activation = activation && slope;
  Tensor signs = activation ? torch::stable::new_empty(y, {count, height, width, (channels + 7) / 8}, ScalarType::Byte)
                            : torch::stable::new_empty(y, {0}, ScalarType::Byte);
  if (!activation && !residual) return signs;
  const std::vector<float> none = bias_of({}, channels);
  Conv conv{};
  conv.out_channels = channels, conv.bias = none.data(), conv.slope = float(slope.value_or(0));
  const int64_t pixels = height * width;
  torch::stable::parallel_for(0, count * height, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t f = i / height, from = rows ? static_cast<const int32_t*>(rows->const_data_ptr())[f] : -1;
      Frame frame{nullptr, nullptr, nullptr, data(y) + f * frame_bytes(y),
                  activation ? signs_of(signs) + f * sign_bytes(y) : nullptr};
      if (from >= 0) {
        frame.residual = data(*residual) + from * frame_bytes(y);
        if (more_signs) frame.residual_signs = signs_of(*more_signs) + from * sign_bytes(y);
      }
      if (pixels && (from >= 0 || activation))
        finish_bfloat16(conv, frame, i % height * width, (i % height + 1) * width);
    }
  });
  return signs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def("conv3x3_readers(Tensor taps, int frames) -> Tensor");
  m.def("conv3x3_gather(Tensor x, Tensor taps, Tensor? signs, float slope, int upscale) -> Tensor");
  m.def(
      "conv3x3_finish(Tensor(a!) y, Tensor? residual, Tensor? rows, Tensor? residual_signs, float? slope, "
      "bool activation) -> Tensor");
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
  m.impl("conv3x3_readers", boxed<&conv3x3_readers>);
  m.impl("conv3x3_gather", boxed<&conv3x3_gather>);
  m.impl("conv3x3_finish", boxed<&conv3x3_finish>);
  m.impl("conv3x3", boxed<&conv3x3>);
  m.impl("conv3x3_backward", boxed<&conv3x3_backward>);
}
