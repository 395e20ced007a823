// What stands around a vendor's convolution of bfloat16, where that is faster than ours (AMX): its input, with masks
// applied, and its end. Both are one pass over memory.
#pragma once
#include "conv.h"

namespace vlmteacher::surrogate_decoder {

// Rows [begin, end) of an output frame's input, (height * scale, width * scale, sources * channels), from its sources.
FOR_SOME_PROCESSORS void gather_bfloat16(const Source* sources, int64_t count, int64_t width, int64_t channels,
                                         int64_t scale, float slope, int64_t begin, int64_t end, char* to);

// Pixels [begin, end) of conv's output frame: residual and activation, in place.
FOR_SOME_PROCESSORS void finish_bfloat16(const Conv& conv, const Frame& frame, int64_t begin, int64_t end);

}  // namespace vlmteacher::surrogate_decoder
