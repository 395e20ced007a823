// resize.h compiled for AVX-512; called only on processors that have it.
#include "resize.h"

namespace vlmteacher::resize {

Resample<float>* resample_avx512() { return resample<float>; }

}  // namespace vlmteacher::resize
