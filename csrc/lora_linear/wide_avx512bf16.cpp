// wide for AVX-512 BF16, called only on processors that have it: use no library templates here, which the linker could
// share with code that runs on any processor.
#if defined(__AVX512BF16__)
#include "../avx512.h"
#include "../scratch.h"
#include "wide.h"
#include "wide_pack.h"

namespace vlmteacher::wide {
namespace {

constexpr int64_t kWords = 2048;  // of a panel at a time: with what is read beside it, it stays in the cache

// What a tile sums over: one segment, or what of it is in the packed panel.
struct Stretch {
  const char* left;  // of the first row
  int64_t step;      // bytes from row to row
  int64_t words;
};

struct Tile {
  const Stretch* stretches;
  int64_t count;
  int64_t row;  // the first
  const char* panel;
  float* sums;  // (rows, kColumns) of the panels before this one, or for the next
  bool first, last;
  const char* bias;
  char* out;
  int64_t out_step;  // bytes
  int64_t columns;
};

template <int ROWS>
void run(const Tile& t) {
  __m512 sum[ROWS][kVectors];
  UNROLL for (int i = 0; i < ROWS; ++i) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = t.first ? _mm512_setzero_ps() : _mm512_loadu_ps(t.sums + i * kColumns + v * kLanes);
    }
  }
  const char* panel = t.panel;
  for (int64_t s = 0; s < t.count; ++s) {
    const int64_t step = t.stretches[s].step;
    const char* left = t.stretches[s].left + t.row * step;
    for (int64_t words = t.stretches[s].words; words > 0; --words, left += 4, panel += 64 * kVectors)
      add_word<BFloat16>(sum, left, step, panel);
  }
  UNROLL for (int v = 0; v < kVectors; ++v) {
    const __mmask16 mask = lanes(t.columns - v * kLanes);
    const __m512 bias = t.bias && t.last ? BFloat16::load(t.bias + 32 * v, mask) : _mm512_setzero_ps();
    UNROLL for (int i = 0; i < ROWS; ++i) {
      if (t.last) {
        BFloat16::store(t.out + i * t.out_step + 32 * v, mask, _mm512_add_ps(sum[i][v], bias));
      } else {
        _mm512_storeu_ps(t.sums + i * kColumns + v * kLanes, sum[i][v]);
      }
    }
  }
}

// By the number of rows, up to as many as leave registers for the right operand and the broadcast.
using Run = void (*)(const Tile&);
constexpr Run kRun[] = {run<1>, run<2>, run<3>, run<4>,  run<5>,  run<6>,
                        run<7>, run<8>, run<9>, run<10>, run<11>, run<12>};
constexpr int64_t kRows = sizeof(kRun) / sizeof(Run);

}  // namespace

void part_avx512bf16(const Product& p, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  int64_t all = 0;
  for (int64_t s = 0; s < p.count; ++s) all += p.segments[s].k / 2;
  const int64_t passes = (all + kWords - 1) / kWords, most = (all + passes - 1) / passes;
  const Scratch packed_memory(most * kVectors * 64);
  const Scratch<float> sum_memory(passes == 1 ? 0 : rows * kColumns);
  const Scratch<Stretch> stretch_memory(p.count);
  char* const packed = packed_memory.data;
  float* const sums = passes == 1 ? nullptr : sum_memory.data;
  Stretch* const stretches = stretch_memory.data;
  for (int64_t column = panel * kColumns; column < p.n && panels > 0; column += kColumns, --panels) {
    const int64_t columns = p.n - column < kColumns ? p.n - column : kColumns;
    int64_t segment = 0, done = 0;  // words of it
    for (int64_t pass = 0; pass < passes; ++pass) {
      Tile t{stretches,
             0,
             row,
             packed,
             sums,
             pass == 0,
             pass + 1 == passes,
             p.bias ? static_cast<const char*>(p.bias) + 2 * column : nullptr,
             static_cast<char*>(p.out) + (row * p.out_stride + column) * 2,
             p.out_stride * 2,
             columns};
      int64_t room = most;
      char* to = packed;
      while (room > 0 && segment < p.count) {
        const Segment& s = p.segments[segment];
        const int64_t left = s.k / 2 - done, words = left < room ? left : room;
        pack<1>(s, done, words, column, columns, to);
        stretches[t.count++] = {static_cast<const char*>(s.left) + 4 * done, s.left_stride * 2, words};
        to += words * kVectors * 64, room -= words, done += words;
        if (done == s.k / 2) ++segment, done = 0;
      }
      for (int64_t left = rows, tiles = (rows + kRows - 1) / kRows; tiles > 0; --tiles) {
        const int64_t count = (left + tiles - 1) / tiles;  // nearly the same for all
        kRun[count - 1](t);
        t.row += count, t.out += count * t.out_step, left -= count;
        if (sums) t.sums += count * kColumns;
      }
    }
  }
}

}  // namespace vlmteacher::wide
#endif
