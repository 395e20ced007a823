// vlmteacher._C: importing it registers every operator under torch.ops.vlmteacher_cpp (by static initialisers in the
// operators' files). Its functions report how the library was built, and this processor's instruction sets. Python's
// limited API, so that one library serves every Python from 3.11 on.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "processor.h"

static PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "torch", BUILD_TORCH_VERSION, "compiler", BUILD_COMPILER, "flags", BUILD_FLAGS);
}

static PyObject* cpu_features(PyObject*, PyObject*) {
  PyObject* features = PyDict_New();
#if defined(__x86_64__)
  __builtin_cpu_init();
  const struct {
    const char* name;
    bool present;
  } known[] = {
#define FEATURE(NAME) {NAME, static_cast<bool>(__builtin_cpu_supports(NAME))}
      FEATURE("avx2"), FEATURE("fma"), FEATURE("avx512f"), FEATURE("avx512vnni"), FEATURE("avx512bf16"),
#undef FEATURE
  };
  for (const auto& feature : known) {
    if (features && PyDict_SetItemString(features, feature.name, feature.present ? Py_True : Py_False) < 0)
      Py_CLEAR(features);
  }
#endif
  return features;
}

static PyObject* name_of(vlmteacher::Processor processor) {
  return PyUnicode_FromString(vlmteacher::kProcessors[static_cast<int>(processor)]);
}

static PyObject* widest(PyObject*, PyObject*) { return name_of(vlmteacher::widest()); }
static PyObject* processor(PyObject*, PyObject*) { return name_of(vlmteacher::processor()); }

static PyObject* limit(PyObject*, PyObject* name) {
  const int count = sizeof(vlmteacher::kProcessors) / sizeof(*vlmteacher::kProcessors);
  for (int i = 0; i < count; ++i) {
    if (PyUnicode_CompareWithASCIIString(name, vlmteacher::kProcessors[i])) continue;
    vlmteacher::limit(static_cast<vlmteacher::Processor>(i));
    Py_RETURN_NONE;
  }
  PyErr_SetString(PyExc_ValueError, "unknown processor class");
  return nullptr;
}

static PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS, "Torch version, compiler and flags that this library was built with."},
    {"cpu_features", cpu_features, METH_NOARGS, "Instruction sets of this processor that the operators may use."},
    {"widest", widest, METH_NOARGS, "The class of this processor (csrc/processor.h) that this build can use."},
    {"processor", processor, METH_NOARGS, "The class that the operators use."},
    {"limit", limit, METH_O, "Let the operators use another class, by its name; unchecked, see ops/processors.py."},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, functions, nullptr, nullptr, nullptr, nullptr,
};

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&module); }
