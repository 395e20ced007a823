// Compiled with AVX-512 flags and called only on processors that have it: use no library templates here, which the
// linker could share with code that runs on any processor.
#include "wide.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <cpuid.h>

#include "../bf16_avx512.h"
#include "../scratch.h"

namespace vlmteacher::wide {
namespace {

constexpr int64_t kVectors = kColumns / kLanes;
constexpr int64_t kWords = 2048;  // of a panel at a time: with what is read beside it, it stays in the cache

// Rows of 16 words become columns.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Words [first, first + words) of `columns` columns from an operand that is stored (n, k): to[word][vector][lane].
void pack_columns(const char* from, int64_t stride, int64_t words, int64_t columns, char* to) {
  for (int64_t v = 0; v < kVectors; ++v)
    for (int64_t word = 0; word < words; word += kLanes) {
      const __mmask16 some = lanes(words - word);
      __m512i rows[16];
      UNROLL for (int i = 0; i < 16; ++i) {
        const bool there = v * kLanes + i < columns;
        rows[i] = there ? _mm512_maskz_loadu_epi32(some, from + (v * kLanes + i) * stride + 4 * word)
                        : _mm512_setzero_si512();
      }
      transpose(rows);
      UNROLL for (int i = 0; i < 16; ++i) {
        if (word + i < words) _mm512_storeu_si512(to + ((word + i) * kVectors + v) * 64, rows[i]);
      }
    }
}

// The same from an operand that is stored (k, n).
void pack_rows(const char* from, int64_t stride, int64_t words, int64_t columns, char* to) {
  for (; words > 0; --words, from += 2 * stride)
    for (int64_t v = 0; v < kVectors; ++v, to += 64)
      _mm512_storeu_si512(to, BFloat16::words(from + 32 * v, from + stride + 32 * v, lanes(columns - v * kLanes)));
}

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
    for (int64_t words = t.stretches[s].words; words > 0; --words, left += 4, panel += 64 * kVectors) {
      __m512i right[kVectors];
      UNROLL for (int v = 0; v < kVectors; ++v) right[v] = _mm512_loadu_si512(panel + 64 * v);
      UNROLL for (int i = 0; i < ROWS; ++i) {
        int32_t word;
        std::memcpy(&word, left + i * step, 4);
        const __m512i broadcast = _mm512_set1_epi32(word);
        UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = BFloat16::multiply_add(sum[i][v], broadcast, right[v]);
      }
    }
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

bool available() {
  __builtin_cpu_init();
  unsigned a, b, c, d;
  const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // a name that not all compilers know
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && !amx;
}

void part(const Product& p, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
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
        const char* right = static_cast<const char*>(s.right);
        if (s.transposed)
          pack_columns(right + 2 * (column * s.right_stride + 2 * done), s.right_stride * 2, words, columns, to);
        else
          pack_rows(right + 2 * (2 * done * s.right_stride + column), s.right_stride * 2, words, columns, to);
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

#else

namespace vlmteacher::wide {
bool available() { return false; }
void part(const Product&, int64_t, int64_t, int64_t, int64_t) {}
}  // namespace vlmteacher::wide

#endif
