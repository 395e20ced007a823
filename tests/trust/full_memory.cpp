// Loaded before the C library (LD_PRELOAD): an allocator that fails on request, as one does whose memory is full. What
// vendors' libraries (MKL, oneDNN) take for themselves is left alone: some of them crash where they get none.
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <initializer_list>

namespace {

std::atomic<long> seen{0}, first{0}, last{0};  // the failing ones, counted from 1; none where first is 0
std::atomic<size_t> least{0};                  // bytes of those of C and Python that are counted

bool called_by(const void* caller, std::initializer_list<const char*> libraries) {
  Dl_info info;
  if (!dladdr(caller, &info) || !info.dli_fname) return false;
  for (const char* library : libraries)
    if (strstr(info.dli_fname, library)) return true;
  return false;
}

bool fails(bool aligned, size_t bytes, const void* caller) {
  if (!first || (!aligned && bytes < least)) return false;
  if (!(aligned ? called_by(caller, {"libc10.so", "/_C."}) : called_by(caller, {"libstdc++", "python"}))) return false;
  const long place = ++seen;
  return first <= place && place <= last;
}

template <class F>
F* next(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

void* __libc_malloc(size_t);
void* __libc_realloc(void*, size_t);

// From now on: of the allocations that tensors and our scratch make (aligned ones), and those of `bytes` or more that
// anybody makes, the ones from `from` to `to` fail.
void full_memory(long from, long to, size_t bytes) {
  first = 0;
  seen = 0, last = to, least = bytes;
  first = from;
}

// All succeed again; returns how many were counted.
long room_again() {
  first = 0;
  return seen;
}

void* malloc(size_t bytes) {
  if (!fails(false, bytes, __builtin_return_address(0))) return __libc_malloc(bytes);
  errno = ENOMEM;
  return nullptr;
}

void* realloc(void* at, size_t bytes) {
  if (!fails(false, bytes, __builtin_return_address(0))) return __libc_realloc(at, bytes);
  errno = ENOMEM;
  return nullptr;
}

int posix_memalign(void** found, size_t alignment, size_t bytes) {
  static auto* const real = next<int(void**, size_t, size_t)>("posix_memalign");
  return fails(true, bytes, __builtin_return_address(0)) ? ENOMEM : real(found, alignment, bytes);
}

void* aligned_alloc(size_t alignment, size_t bytes) {
  static auto* const real = next<void*(size_t, size_t)>("aligned_alloc");
  if (!fails(true, bytes, __builtin_return_address(0))) return real(alignment, bytes);
  errno = ENOMEM;
  return nullptr;
}
}
