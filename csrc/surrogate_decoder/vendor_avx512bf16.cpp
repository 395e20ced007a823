#if defined(__AVX512BF16__)
#include "conv_bfloat16.h"
#include "vendor.h"

namespace vlmteacher::surrogate_decoder {

void gather_bfloat16(const Source* sources, int64_t count, int64_t width, int64_t channels, int64_t scale, float slope,
                     int64_t begin, int64_t end, char* to) {
  const int64_t own = channels * BFloat16::kBytes, sign_bytes = (channels + 7) / 8;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t x = 0; x < width * scale; ++x)
      for (int64_t s = 0; s < count; ++s, to += own) {
        const int64_t at = row / scale * width + x / scale;
        const char* from = static_cast<const char*>(sources[s].frame);
        if (!from)
          std::memset(to, 0, own);
        else if (sources[s].signs)
          copy_masked(from + at * own, sources[s].signs + at * sign_bytes, channels, slope, to);
        else
          std::memcpy(to, from + at * own, own);
      }
}

void finish_bfloat16(const Conv& conv, const Frame& frame, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; ++pixel)
    for (int64_t channel = 0; channel < conv.out_channels; channel += kLanes) {
      const char* at = static_cast<const char*>(frame.out) + (pixel * conv.out_channels + channel) * BFloat16::kBytes;
      finish(conv, frame, pixel, channel, BFloat16::load(at, lanes(conv.out_channels - channel)));
    }
}

}  // namespace vlmteacher::surrogate_decoder

#endif
