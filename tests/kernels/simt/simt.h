// CUDA's words for a host compiler: device code that includes csrc/ptx.cuh is compiled by g++ as it stands and executed
// on the CPU, a fiber to a thread, a block after the other (simt.cpp). What the hardware leaves undefined is a Fault
// here: barriers and collectives that not everybody reaches, accesses outside of shared memory and of guarded buffers
// (see `allocate`), or not aligned. Shared memory is full of NaN when a block starts; a cp.async arrives when it is
// waited for, no sooner. Not found: races between threads that a different order of warps does not bring to light, and
// indices out of an array that stay inside the same memory.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static thread_local  // so that the loader knows where all of them are: see simt.cpp

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;
constexpr int warpSize = 32;

using std::max;
using std::min;

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    const auto wide = std::bit_cast<uint32_t>(value);
    bits = value != value ? 0x7fff : static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float value) : value(static_cast<_Float16>(value)) {}
  operator float() const { return static_cast<float>(value); }
};

namespace simt {

using Where = std::source_location;

struct Fault : std::runtime_error {
  using runtime_error::runtime_error;
};

// Runs `kernel` for every thread; blocks, warps and lanes take their turns in an order drawn from the seed.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Memory that ends at an inaccessible page, 16-byte aligned, full of NaN.
void* allocate(size_t bytes);
void release(void* memory);

// For the functions that Python calls: what is wrong, or null.
const char* attempt(const std::function<void()>& work);

class Device {  // what host code that is templated on its device asks of one
 public:
  ~Device() {
    for (void* memory : scratch_) release(memory);
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              const Arguments&... arguments) {
    simt::launch(grid, block, shared_bytes, [&] { kernel(arguments...); });
  }

  template <class T>
  T* scratch(int64_t count) {
    return static_cast<T*>(scratch_.emplace_back(allocate(count * sizeof(T))));
  }

  template <class T>
  void copy(T* to, const T* from, int64_t count) {
    std::copy_n(from, count, to);
  }

 private:
  std::vector<void*> scratch_;
};

// The rest is for the words below.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));
unsigned char* dynamic_shared();
void check_shared(const void* address, int bytes, const char* what, const Where& where);
void barrier(const Where& where);
void copy_async(void* shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);
unsigned lane();

// Waits for every lane of the mask; the last to come calls together(argument of each lane, null where not in the mask).
void meet(const char* name, uint32_t mask, void* argument, const std::function<void(void**)>& together,
          const Where& where);

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source, const Where& where) {
  struct {
    T value, received;
    int source;
  } mine{value, value, source};
  using Mine = decltype(mine);
  meet(
      name, mask, &mine,
      [&](void** lanes) {
        for (int i = 0; i < warpSize; ++i) {
          if (!lanes[i]) continue;
          auto* to = static_cast<Mine*>(lanes[i]);
          if (!lanes[to->source])
            fault("%s: lane %d reads from lane %d, which is not in mask %08x", name, i, to->source, mask);
          to->received = static_cast<Mine*>(lanes[to->source])->value;
        }
      },
      where);
  return mine.received;
}

}  // namespace simt

inline void __syncthreads(simt::Where where = simt::Where::current()) { simt::barrier(where); }

inline void __syncwarp(uint32_t mask = 0xffffffff, simt::Where where = simt::Where::current()) {
  simt::meet("__syncwarp", mask, nullptr, [](void**) {}, where);
}

// A source outside of the lane's segment of `width` lanes is the lane itself, as CUDA has it.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = warpSize, simt::Where where = simt::Where::current()) {
  const int lane = simt::lane();
  return simt::shuffle("__shfl_sync", mask, value, lane / width * width + (source & (width - 1)), where);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = warpSize, simt::Where where = simt::Where::current()) {
  const int lane = simt::lane(), source = lane ^ bits;
  return simt::shuffle("__shfl_xor_sync", mask, value, source < lane / width * width + width ? source : lane, where);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = warpSize, simt::Where where = simt::Where::current()) {
  const int lane = simt::lane();
  return simt::shuffle("__shfl_down_sync", mask, value, lane % width + by < width ? lane + by : lane, where);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = warpSize, simt::Where where = simt::Where::current()) {
  const int lane = simt::lane();
  return simt::shuffle("__shfl_up_sync", mask, value, lane % width >= by ? lane - by : lane, where);
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote, simt::Where where = simt::Where::current()) {
  uint32_t found = vote;
  const auto count = [](void** lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < warpSize; ++i)
      if (lanes[i]) votes |= *static_cast<uint32_t*>(lanes[i]) << i;
    for (int i = 0; i < warpSize; ++i)
      if (lanes[i]) *static_cast<uint32_t*>(lanes[i]) = votes;
  };
  simt::meet("__ballot_sync", mask, &found, count, where);
  return found;
}

inline bool __any_sync(uint32_t mask, bool vote, simt::Where where = simt::Where::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}

inline bool __all_sync(uint32_t mask, bool vote, simt::Where where = simt::Where::current()) {
  return __ballot_sync(mask, vote, where) == mask;
}

// Threads change only where they wait, so that these need nothing more.
template <class T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}

template <class T>
T atomicMax(T* address, T value) {
  return std::exchange(*address, std::max(*address, value));
}

template <class T>
T atomicCAS(T* address, T expected, T value) {
  return std::exchange(*address, *address == expected ? value : *address);
}

namespace ptx {  // csrc/ptx.cuh says what they are

inline unsigned char* dynamic_shared() { return simt::dynamic_shared(); }

inline void copy_async(void* shared, const void* global, int bytes, simt::Where where = simt::Where::current()) {
  simt::check_shared(shared, 16, "cp.async", where);
  if (reinterpret_cast<uintptr_t>(global) % 16) simt::fault("cp.async from an unaligned address");
  if (bytes < 0 || bytes > 16) simt::fault("cp.async of %d bytes", bytes);
  simt::copy_async(shared, global, bytes);
}

inline void copy_async_commit() { simt::copy_async_commit(); }

template <int Pending>
void copy_async_wait() {
  simt::copy_async_wait(Pending);
}

template <bool Transposed>
void ldmatrix(uint32_t (&to)[4], const void* row, simt::Where where = simt::Where::current()) {
  simt::check_shared(row, 16, "ldmatrix", where);
  struct {
    const void* row;
    uint32_t* to;
  } mine{row, to};
  using Mine = decltype(mine);
  const auto deal = [](void** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(element[i], static_cast<Mine*>(lanes[8 * matrix + i])->row, 16);
      for (int lane = 0; lane < warpSize; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = Transposed ? element[j][i] : element[i][j];
        const uint32_t high = Transposed ? element[j + 1][i] : element[i][j + 1];
        static_cast<Mine*>(lanes[lane])->to[matrix] = low | high << 16;
      }
    }
  };
  simt::meet("ldmatrix", 0xffffffff, &mine, deal, where);
}

template <class T>
void mma(float (&sum)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
         simt::Where where = simt::Where::current()) {
  struct {
    float* sum;
    const uint32_t *left, *right;
  } mine{sum, left, right};
  using Mine = decltype(mine);
  const auto multiply = [](void** lanes) {
    float a[16][16], b[8][16];
    const auto unpack = [](uint32_t bits, float* to) {
      for (int i = 0; i < 2; ++i) to[i] = std::bit_cast<T>(static_cast<uint16_t>(bits >> 16 * i));
    };
    for (int lane = 0; lane < warpSize; ++lane) {
      const auto* from = static_cast<Mine*>(lanes[lane]);
      const int i = lane / 4, j = lane % 4 * 2;
      for (int part = 0; part < 4; ++part) unpack(from->left[part], &a[i + part % 2 * 8][j + part / 2 * 8]);
      for (int part = 0; part < 2; ++part) unpack(from->right[part], &b[i][j + part * 8]);
    }
    for (int lane = 0; lane < warpSize; ++lane)
      for (int part = 0; part < 4; ++part) {
        const float *row = a[lane / 4 + part / 2 * 8], *column = b[lane % 4 * 2 + part % 2];
        float product = 0;
        for (int k = 0; k < 16; ++k) product += row[k] * column[k];
        static_cast<Mine*>(lanes[lane])->sum[part] += product;
      }
  };
  simt::meet("mma", 0xffffffff, &mine, multiply, where);
}

}  // namespace ptx

namespace simt {

// f with the element type that a tensor of such elements has.
template <class F>
void with_type(int bytes, bool brain, const F& f) {
  if (bytes == 4)
    f.template operator()<float>();
  else if (brain)
    f.template operator()<__nv_bfloat16>();
  else
    f.template operator()<__half>();
}

}  // namespace simt
