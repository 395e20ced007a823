// The wide products by AMX; called only on processors that have it. A tile of sums runs over all segments, each filled
// up to whole tiles of 32 elements with zeros.
#if defined(__AMX_BF16__)
#include "../amx.h"
#include "../scratch.h"
#include "wide_pack.h"

namespace vlmteacher::wide {
namespace {

// A block of rows and as many columns are summed over some tiles at a time, about so many that those of all panels stay
// in the second cache.
constexpr int64_t kRows = 2 * kTileRows, kTilesAtOnce = 64, kPairBytes = kRows * 64;  // of two tiles
static_assert(kRows == kColumns && kRows == kCopiedRows && kCopiedDepth == 2 * kTileWords);

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Stretch {  // of a segment
  const Segment* segment;
  int64_t first, tiles;
  int64_t words() const { return least(tiles * kTileWords, segment->k / 2 - first * kTileWords); }
};

// The sums in tiles 0 to 3 += left right, both of whole tiles that stand together.
void add(const char* left, const char* right, int64_t tiles) {
  for (; tiles > 0; --tiles, left += kPairBytes, right += kPairBytes) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + kPairBytes / 2, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left + kPairBytes / 2, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Sums and bias, rounded, to `rows` rows of the result.
void finish(const Product& p, const float (*sums)[kColumns], int64_t row, int64_t rows, int64_t column) {
  const __mmask16 first = lanes(p.n - column), second = lanes(p.n - column - kLanes);
  __m512 b = _mm512_setzero_ps(), c = b;
  if (p.bias) {
    const char* bias = static_cast<const char*>(p.bias) + 2 * column;
    b = BFloat16::load(bias, first);
    if (second) c = BFloat16::load(bias + 32, second);
  }
  char* out = static_cast<char*>(p.out) + (row * p.out_stride + column) * 2;
  for (int64_t i = 0; i < rows; ++i, out += p.out_stride * 2) {
    const __m512 low = _mm512_add_ps(_mm512_load_ps(sums[i]), b);
    const __m512 high = _mm512_add_ps(_mm512_load_ps(sums[i] + kLanes), c);
    if (second == kAll) {
      _mm512_storeu_si512(out, BFloat16::rounded(low, high));
    } else {
      BFloat16::store(out, first, low);
      BFloat16::store(out + 32, second, high);
    }
  }
}

}  // namespace

void copy_rows_amx(const void* left, int64_t stride, int64_t k, int64_t row, int64_t rows, void* copy) {
  const int64_t tiles = copied_depths(k);
  const char* from = static_cast<const char*>(left) + row * stride * 2;
  char* to = static_cast<char*>(copy) + row / kRows * tiles * kPairBytes;
  for (int64_t block = 0; block < rows; block += kRows, to += tiles * kPairBytes)
    for (int64_t i = 0; i < kRows; ++i, from += stride * 2)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const __mmask16 some = block + i < rows ? lanes(k / 2 - tile * kTileWords) : __mmask16(0);
        _mm512_storeu_si512(to + tile * kPairBytes + i * 64, _mm512_maskz_loadu_epi32(some, from + tile * 64));
      }
}

void part_amx(const Product& p, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  const Tiles tiles;
  int64_t all = 0;
  for (int64_t s = 0; s < p.count; ++s) all += copied_depths(p.segments[s].k);
  const int64_t passes = all < kTilesAtOnce ? 1 : (all + kTilesAtOnce / 2) / kTilesAtOnce,
                most = (all + passes - 1) / passes;
  panels = least(panels, (p.n + kColumns - 1) / kColumns - panel);
  const Scratch right(panels * most * kPairBytes);
  const Scratch<Stretch> stretches(p.count);
  struct alignas(64) Sums {
    float of[kRows][kColumns];
  } here;
  const Scratch<Sums> between(passes == 1 ? 0 : (rows + kRows - 1) / kRows * panels);  // one pass and the next
  Stretch next{p.segments, 0, 0};
  for (int64_t pass = 0; pass < passes; ++pass) {
    int64_t count = 0, taken = 0;
    while (taken < most && next.segment < p.segments + p.count) {
      next.tiles = least(copied_depths(next.segment->k) - next.first, most - taken);
      stretches.data[count++] = next;
      taken += next.tiles, next.first += next.tiles;
      if (next.first == copied_depths(next.segment->k)) ++next.segment, next.first = 0;
    }
    for (int64_t c = 0; c < panels; ++c) {
      char* to = right.data + c * taken * kPairBytes;
      for (const Stretch* s = stretches.data; s < stretches.data + count; to += s->tiles * kPairBytes, ++s) {
        const int64_t column = (panel + c) * kColumns, words = s->words();
        pack<kTileWords>(*s->segment, s->first * kTileWords, words, column, least(p.n - column, kColumns), to);
        for (int64_t word = words; word < s->tiles * kTileWords; ++word)
          for (int64_t v = 0; v < kVectors; ++v)
            _mm512_store_si512(to + place<kTileWords>(word, v), _mm512_setzero_si512());
      }
    }
    written();
    Sums* sums = between.data;
    for (int64_t done = 0; done < rows; done += kRows)
      for (int64_t c = 0; c < panels; ++c) {
        Sums& at = passes == 1 ? here : *sums++;
        pass == 0 ? zero_sums() : load_32_by_32(at.of[0], sizeof at.of[0]);
        const char* from = right.data + c * taken * kPairBytes;
        for (const Stretch* s = stretches.data; s < stretches.data + count; from += s->tiles * kPairBytes, ++s) {
          const int64_t tile = (row + done) / kRows * copied_depths(s->segment->k) + s->first;
          add(static_cast<const char*>(s->segment->left) + tile * kPairBytes, from, s->tiles);
        }
        store_32_by_32(at.of[0], sizeof at.of[0]);
        if (pass + 1 == passes) finish(p, at.of, row + done, least(rows - done, kRows), (panel + c) * kColumns);
      }
  }
}

}  // namespace vlmteacher::wide

#endif
