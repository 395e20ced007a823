// resize.h compiled for AVX2; called only on processors that have it.
#include "resize.h"

namespace vlmteacher::resize {

Resample<float>* resample_avx2() { return resample<float>; }

}  // namespace vlmteacher::resize
