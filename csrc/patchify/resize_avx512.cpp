// resize.h for processors with AVX-512, called only where they are.
#include "resize.h"

namespace vlmteacher::resize {

Resample<float>* resample_avx512() { return supported() ? resample<float> : nullptr; }

}  // namespace vlmteacher::resize
