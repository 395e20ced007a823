// Tiles of a matrix product computed by a block: operands in shared memory, accumulators in registers.
//
// 16-bit types run on tensor cores through mma.sync, which every GPU since Ampere has; Hopper's wgmma, faster there, is
// not used. float runs on plain multiply-adds and keeps its accuracy. No torch here: nvcc compiles the kernels alone,
// and the tests execute them on the CPU.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace mma_tile {

template <int M_, int N_, int Depth_, int WarpsM_, int WarpsN_>
struct Tile {  // what a block computes, what it reads at a time, how its warps share it
  static constexpr int M = M_, N = N_, Depth = Depth_, WarpsM = WarpsM_, WarpsN = WarpsN_;
  static constexpr int Threads = 32 * WarpsM * WarpsN, Stages = 4;
};

// The axis that an operand stores contiguously: the one summed over, or its axis of the result.
enum class Along { Depth, Side };

// An operand's tile in shared memory. 16 bytes of padding put the eight rows that an ldmatrix reads into different
// banks.
template <class T, Along Axis, int Side, int Depth>
struct Operand {
  static constexpr Along axis = Axis;
  static constexpr int Rows = Axis == Along::Depth ? Side : Depth, Columns = Axis == Along::Depth ? Depth : Side;
  static constexpr int Vector = 16 / sizeof(T), Pitch = Columns + Vector, Elements = Rows * Pitch;

  __device__ static int at(int side, int depth) {
    return Axis == Along::Depth ? side * Pitch + depth : depth * Pitch + side;
  }

  // From (side, depth) on; elements at or beyond side_end or depth_end are zeros.
  template <int Threads>
  __device__ static void load(T* shared, const T* global, int64_t stride, int side, int side_end, int depth,
                              int depth_end) {
    const int row = Axis == Along::Depth ? side : depth, row_end = Axis == Along::Depth ? side_end : depth_end;
    const int column = Axis == Along::Depth ? depth : side, column_end = Axis == Along::Depth ? depth_end : side_end;
    const bool aligned = stride % Vector == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0;
#pragma unroll
    for (int i = threadIdx.x; i < Rows * Columns / Vector; i += Threads) {
      const int y = i / (Columns / Vector), x = i % (Columns / Vector) * Vector;
      const int real = row + y < row_end ? max(0, min(Vector, column_end - column - x)) : 0;
      const T* from = real ? global + (row + y) * stride + column + x : global;
      T* to = shared + y * Pitch + x;
      if (aligned) {
        ptx::copy_async(to, from, real * sizeof(T));
      } else {
#pragma unroll
        for (int j = 0; j < Vector; ++j) to[j] = j < real ? from[j] : T(0.f);
      }
    }
  }
};

// A block's accumulators in the registers of its threads. add() takes a tile of both operands from shared memory;
// for_each_pair() calls visit(column, rows) for each pair of columns, where rows(f) calls f(row, value, value of the
// next column) for each of the thread's rows.
template <class T, class Tile, class Left, class Right>
struct Accumulators {
  static constexpr int Rows = Tile::M / Tile::WarpsM / 16, Columns = Tile::N / Tile::WarpsN / 8;
  float value[Rows][Columns][4] = {};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / Tile::WarpsN * (Tile::M / Tile::WarpsM),
            column = warp % Tile::WarpsN * (Tile::N / Tile::WarpsN);

  __device__ void add(const T* left, const T* right) {
    // Which row each lane hands to ldmatrix: the four matrices are quarters of 16 x 16 elements, which the left operand
    // of an mma wants side by side first and two right operands want depth by depth first.
    constexpr bool left_by_depth = Left::axis == Along::Depth, right_by_depth = Right::axis == Along::Depth;
    const int inner = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    const int left_side = second + (left_by_depth ? inner : 0), left_depth = third + (left_by_depth ? 0 : inner);
    const int right_side = third + (right_by_depth ? inner : 0), right_depth = second + (right_by_depth ? 0 : inner);
#pragma unroll
    for (int depth = 0; depth < Tile::Depth; depth += 16) {
      uint32_t a[Rows][4], b[Columns / 2][4];
#pragma unroll
      for (int i = 0; i < Rows; ++i)
        ptx::ldmatrix<!left_by_depth>(a[i], left + Left::at(row + 16 * i + left_side, depth + left_depth));
#pragma unroll
      for (int j = 0; j < Columns / 2; ++j)
        ptx::ldmatrix<!right_by_depth>(b[j], right + Right::at(column + 16 * j + right_side, depth + right_depth));
#pragma unroll
      for (int i = 0; i < Rows; ++i)
#pragma unroll
        for (int j = 0; j < Columns; ++j)
          ptx::mma<T>(value[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
    }
  }

  __device__ void multiply(float factor) {
#pragma unroll
    for (auto& row : value)
#pragma unroll
      for (auto& tile : row)
#pragma unroll
        for (float& element : tile) element *= factor;
  }

  template <class Visit>
  __device__ void for_each_pair(const Visit& visit) const {
#pragma unroll
    for (int j = 0; j < Columns; ++j)
      visit(column + 8 * j + lane % 4 * 2, [&](const auto& each) {
#pragma unroll
        for (int i = 0; i < 2 * Rows; ++i)
          each(row + 8 * i + lane / 4, value[i / 2][j][i % 2 * 2], value[i / 2][j][i % 2 * 2 + 1]);
      });
  }
};

template <class Tile, class Left, class Right>
struct Accumulators<float, Tile, Left, Right> {
  static constexpr int Across = Tile::N / 4, Down = Tile::Threads / Across, Rows = Tile::M / Down;
  float value[Rows][4] = {};
  const int row = threadIdx.x / Across, column = threadIdx.x % Across * 2;  // every Down-th row; two pairs of columns

  __device__ static int offset(int j) { return j / 2 * (Tile::N / 2) + j % 2; }

  __device__ void add(const float* left, const float* right) {
    float sum[Rows][4] = {};  // a tile's own: sums of few, then a sum of few sums, round less than one long sum
#pragma unroll 4
    for (int depth = 0; depth < Tile::Depth; ++depth) {
      float b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = right[Right::at(column + offset(j), depth)];
#pragma unroll
      for (int i = 0; i < Rows; ++i) {
        const float a = left[Left::at(row + i * Down, depth)];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a, b[j], sum[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) value[i][j] += sum[i][j];
  }

  __device__ void multiply(float factor) {
#pragma unroll
    for (auto& row : value)
#pragma unroll
      for (float& element : row) element *= factor;
  }

  template <class Visit>
  __device__ void for_each_pair(const Visit& visit) const {
#pragma unroll
    for (int j = 0; j < 4; j += 2)
      visit(column + offset(j), [&](const auto& each) {
#pragma unroll
        for (int i = 0; i < Rows; ++i) each(row + i * Down, value[i][j], value[i][j + 1]);
      });
  }
};

template <class T, class Tile, Along LeftAxis, Along RightAxis>
constexpr int shared_bytes() {
  return Tile::Stages * sizeof(T) *
         (Operand<T, LeftAxis, Tile::M, Tile::Depth>::Elements + Operand<T, RightAxis, Tile::N, Tile::Depth>::Elements);
}

}  // namespace mma_tile
