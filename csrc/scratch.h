// Memory for scratch. Its code is compiled for any processor (scratch.cpp), for files of wide vectors to call.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace vlmteacher {

// Of 64 bytes' alignment, to be freed. Throws std::bad_alloc.
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
