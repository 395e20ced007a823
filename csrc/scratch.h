// Scratch memory. Compiled for any processor (scratch.cpp), so that files with wide vectors may call it.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace vlmteacher {

// Aligned to 64 bytes; the caller frees it. Throws std::bad_alloc.
void* allocate(int64_t bytes);

namespace {

template <class T = char>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count) : data(static_cast<T*>(allocate(count * int64_t(sizeof(T))))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
};

}  // namespace
}  // namespace vlmteacher
