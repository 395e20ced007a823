// vlmteacher._C: importing it registers every operator under torch.ops.vlmteacher_cpp (by static initialisers in the
// operators' files). Its functions report how the library was built, and this processor's instruction sets.
#include <pybind11/pybind11.h>

namespace py = pybind11;

static py::dict build_info() {
  py::dict d;
  d["torch"] = BUILD_TORCH_VERSION;
  d["compiler"] = BUILD_COMPILER;
  d["flags"] = BUILD_FLAGS;
  return d;
}

static py::dict cpu_features() {
  py::dict d;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define FEATURE(NAME) d[NAME] = static_cast<bool>(__builtin_cpu_supports(NAME))
  FEATURE("avx2");
  FEATURE("fma");
  FEATURE("avx512f");
  FEATURE("avx512vnni");
  FEATURE("avx512bf16");
#undef FEATURE
#endif
  return d;
}

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Torch version, compiler and flags that this library was built with.");
  m.def("cpu_features", &cpu_features, "Instruction sets of this processor that the operators may use.");
}
