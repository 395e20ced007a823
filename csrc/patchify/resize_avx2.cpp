// resize.h for processors with AVX2, called only where they are.
#include "resize.h"

namespace vlmteacher::resize {

Resample<float>* resample_avx2() { return supported() ? resample<float> : nullptr; }

}  // namespace vlmteacher::resize
