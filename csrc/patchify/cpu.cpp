// Resize + normalise + patchify + cast on the CPU. The definition is vlmteacher/ops/patchify.py; arithmetic is in float
// (double for double), rounded once.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../processor.h"
#include "check.h"
#include "resize.h"

namespace {

using namespace vlmteacher;

struct Grid {  // the rows run over (t, h, w, y, x): block coordinates, then the patch within its merge x merge block
  int64_t patch, temporal_patch, merge, h, w;
  int64_t columns() const { return 3 * temporal_patch * patch * patch; }
};

// visit(row, t, y, x): patch row `row` starts at pixel (y, x) of the frames of temporal patch t.
template <class Visit>
void for_each_patch(int64_t temporal_patches, const Grid& g, const Visit& visit) {
  torch::stable::parallel_for(0, temporal_patches * g.h, 1, [&](int64_t begin, int64_t end) {
    for (int64_t th = begin; th < end; ++th) {
      int64_t row = th * g.w * g.merge * g.merge;
      for (int64_t w = 0; w < g.w; ++w)
        for (int64_t y = 0; y < g.merge; ++y)
          for (int64_t x = 0; x < g.merge; ++x, ++row)
            visit(row, th / g.h, ((th % g.h) * g.merge + y) * g.patch, (w * g.merge + x) * g.patch);
    }
  });
}

template <class T, class Out>
void forward(const T* frames, Out* out, int64_t num_frames, const int64_t* stride, const Grid& g,
             const std::vector<double>& mean, const std::vector<double>& std) {
  using A = Accumulate<T>;
  const int64_t temporal_patches = (num_frames + g.temporal_patch - 1) / g.temporal_patch;
  for_each_patch(temporal_patches, g, [&](int64_t row, int64_t t, int64_t y, int64_t x) {
    Out* to = out + row * g.columns();
    for (int64_t c = 0; c < 3; ++c) {
      const A m = static_cast<A>(mean[c]), s = static_cast<A>(std[c]);
      for (int64_t k = 0; k < g.temporal_patch; ++k) {
        const int64_t frame = std::min(t * g.temporal_patch + k, num_frames - 1);
        const T* from = frames + frame * stride[0] + c * stride[1] + y * stride[2] + x * stride[3];
        for (int64_t i = 0; i < g.patch; ++i, from += stride[2], to += g.patch) {
          if (stride[3] == 1)
            for (int64_t j = 0; j < g.patch; ++j) to[j] = static_cast<Out>((static_cast<A>(from[j]) - m) / s);
          else
            for (int64_t j = 0; j < g.patch; ++j)
              to[j] = static_cast<Out>((static_cast<A>(from[j * stride[3]]) - m) / s);
        }
      }
    }
  });
}

template <class T, class Out>
void backward(const T* grad, Out* out, int64_t num_frames, const Grid& g, const std::vector<double>& std) {
  using A = Accumulate<T>;
  const int64_t temporal_patches = (num_frames + g.temporal_patch - 1) / g.temporal_patch;
  const int64_t width = g.w * g.merge * g.patch, height = g.h * g.merge * g.patch, area = g.patch * g.patch;
  for_each_patch(temporal_patches, g, [&](int64_t row, int64_t t, int64_t y, int64_t x) {
    const int64_t real = std::min(g.temporal_patch, num_frames - t * g.temporal_patch);
    for (int64_t c = 0; c < 3; ++c) {
      const A s = static_cast<A>(std[c]);
      const T* channel = grad + row * g.columns() + c * g.temporal_patch * area;
      for (int64_t k = 0; k < real; ++k) {
        // the last real frame also stands in the slots that it was repeated into
        const int64_t slots = k + 1 == real ? g.temporal_patch - k : 1;
        Out* to = out + (((t * g.temporal_patch + k) * 3 + c) * height + y) * width + x;
        for (int64_t i = 0; i < g.patch; ++i, to += width) {
          const T* from = channel + k * area + i * g.patch;
          for (int64_t j = 0; j < g.patch; ++j) {
            A sum = static_cast<A>(from[j]);
            for (int64_t slot = 1; slot < slots; ++slot) sum += static_cast<A>(from[slot * area + j]);
            to[j] = static_cast<Out>(sum / s);
          }
        }
      }
    }
  });
}

// A row of a plane within the patch rows: visit(x, element) for each run of `patch` pixels, which stand together in
// each of the frame's slots; the first slot's begin at `element`.
template <class Visit>
void for_each_run(int64_t frame, int64_t channel, int64_t y, const Grid& g, const Visit& visit) {
  const int64_t block = g.patch * g.merge, area = g.patch * g.patch;
  const int64_t blocks = frame / g.temporal_patch * g.h + y / block, row_in_block = y / g.patch % g.merge;
  const int64_t within = (channel * g.temporal_patch + frame % g.temporal_patch) * area + y % g.patch * g.patch;
  for (int64_t w = 0; w < g.w; ++w)
    for (int64_t x = 0; x < g.merge; ++x) {
      const int64_t row = ((blocks * g.w + w) * g.merge + row_in_block) * g.merge + x;
      visit((w * g.merge + x) * g.patch, row * g.columns() + within);
    }
}

int64_t slots_of(int64_t frame, int64_t num_frames, const Grid& g) {
  return frame + 1 == num_frames ? g.temporal_patch - frame % g.temporal_patch : 1;
}

template <class A>
resize::Resample<A>* best_resample() {
  if constexpr (std::is_same_v<A, float>) {
    if (uses(Processor::kAvx512)) return resize::resample_avx512();
    if (uses(Processor::kAvx2)) return resize::resample_avx2();
  }
  return resize::resample<A>;
}

// Both directions of a resize, plane by plane in parts of some rows. read(frame, channel, row, buffer) gives a pointer
// to an input row, in the buffer where it must; write(frame, channel, row, values) takes an output row; of(channel) is
// what becomes of a value.
template <class A, class Read, class Write, class Of>
void resample_planes(int64_t num_frames, const resize::Band<A>& y, const resize::Band<A>& x, const Read& read,
                     const Write& write, const Of& of) {
  constexpr int64_t kRows = 32;
  resize::Resample<A>* const resample = best_resample<A>();
  const int64_t parts = (y.rows + kRows - 1) / kRows;
  torch::stable::parallel_for(0, num_frames * 3 * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch, values(kRows * x.rows), buffer;
    std::vector<const A*> rows;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t frame = i / (3 * parts), channel = i / parts % 3, first = i % parts * kRows;
      const auto [scale, shift] = of(channel);
      const resize::Part<A> part{first, std::min(first + kRows, y.rows), scale, shift};
      const int64_t count = resize::rows_read(y, part);
      rows.resize(count);
      if (const size_t size = count * x.columns; buffer.size() < size) buffer.resize(size);
      if (const size_t size = resize::scratch_size(y, x, part); scratch.size() < size) scratch.resize(size);
      for (int64_t r = 0; r < count; ++r)
        rows[r] = read(frame, channel, y.start[first] + r, buffer.data() + r * x.columns);
      resample(rows.data(), y, x, part, scratch.data(), values.data());
      for (int64_t r = part.begin; r < part.end; ++r)
        write(frame, channel, r, values.data() + (r - part.begin) * x.rows);
    }
  });
}

template <class T, class Out, class A>
void forward_resized(const T* frames, Out* out, int64_t num_frames, const int64_t* stride, const Grid& g,
                     const std::vector<double>& mean, const std::vector<double>& std, const resize::Band<A>& y,
                     const resize::Band<A>& x) {
  const auto read = [&](int64_t frame, int64_t channel, int64_t row, A* buffer) -> const A* {
    const T* from = frames + frame * stride[0] + channel * stride[1] + row * stride[2];
    if constexpr (std::is_same_v<T, A>)
      if (stride[3] == 1) return from;
    for (int64_t i = 0; i < x.columns; ++i) buffer[i] = static_cast<A>(from[i * stride[3]]);
    return buffer;
  };
  const auto write = [&](int64_t frame, int64_t channel, int64_t row, const A* values) {
    const int64_t slots = slots_of(frame, num_frames, g);
    for_each_run(frame, channel, row, g, [&](int64_t first, int64_t element) {
      for (int64_t slot = 0; slot < slots; ++slot, element += g.patch * g.patch)
        for (int64_t i = 0; i < g.patch; ++i) out[element + i] = static_cast<Out>(values[first + i]);
    });
  };
  resample_planes<A>(num_frames, y, x, read, write, [&](int64_t c) {
    return std::pair(static_cast<A>(1 / std[c]), static_cast<A>(-mean[c] / std[c]));
  });
}

template <class T, class Out, class A>
void backward_resized(const T* grad, Out* out, int64_t num_frames, const Grid& g, const std::vector<double>& std,
                      const resize::Band<A>& y, const resize::Band<A>& x) {
  const auto read = [&](int64_t frame, int64_t channel, int64_t row, A* buffer) -> const A* {
    const int64_t slots = slots_of(frame, num_frames, g);
    for_each_run(frame, channel, row, g, [&](int64_t first, int64_t element) {
      for (int64_t i = 0; i < g.patch; ++i) buffer[first + i] = static_cast<A>(grad[element + i]);
      for (int64_t slot = 1; slot < slots; ++slot)
        for (int64_t i = 0; i < g.patch; ++i)
          buffer[first + i] += static_cast<A>(grad[element + slot * g.patch * g.patch + i]);
    });
    return buffer;
  };
  const auto write = [&](int64_t frame, int64_t channel, int64_t row, const A* values) {
    Out* to = out + ((frame * 3 + channel) * y.rows + row) * x.rows;
    for (int64_t i = 0; i < x.rows; ++i) to[i] = static_cast<Out>(values[i]);
  };
  resample_planes<A>(num_frames, y, x, read, write,
                     [&](int64_t c) { return std::pair(static_cast<A>(1 / std[c]), A(0)); });
}

// Pixel shuffle + clamp + normalise + patchify, and back; `slots` (frames, repeats): where in the video a frame of y
// stands. A task is a row of y, which becomes `upscale` rows of each channel.
struct Shuffle {
  int64_t frames, height, width, upscale;  // of y
  int64_t patch_height, patch_width, temporal_patch, merge;
  const int32_t* slots;
  int64_t repeats;

  int64_t pixels() const { return width * upscale; }  // of a line
  int64_t bytes() const { return (pixels() + 7) / 8; }

  // visit(x, element): `patch_width` pixels of the line (slot, channel, y) from column x on stand from `element` on.
  template <class Visit>
  void for_each_run(int64_t slot, int64_t channel, int64_t y, const Visit& visit) const {
    const int64_t area = patch_height * patch_width, columns = 3 * temporal_patch * area;
    const int64_t block_height = patch_height * merge, blocks = pixels() / (patch_width * merge);
    const int64_t block = (slot / temporal_patch * (height * upscale / block_height) + y / block_height) * blocks;
    const int64_t down = y / patch_height % merge;
    const int64_t within = (channel * temporal_patch + slot % temporal_patch) * area + y % patch_height * patch_width;
    for (int64_t i = 0; i < blocks * merge; ++i)
      visit(i * patch_width, (((block + i / merge) * merge + down) * merge + i % merge) * columns + within);
  }

  // visit(frame, channel, y, line) on the lines of each task, one after the other in `lines`
  template <class A, class Visit>
  void for_each_line(int64_t task, A* lines, const Visit& visit) const {
    for (int64_t i = 0; i < 3 * upscale; ++i)
      visit(task / height, i / upscale, task % height * upscale + i % upscale, lines + i * pixels());
  }

  // A row of y and its lines: copy(element of the row, element of the lines)
  template <class Copy>
  void for_each_element(const Copy& copy) const {
    const auto with = [&](auto upscale) {
      for (int64_t x = 0; x < width; ++x)
        for (int64_t i = 0; i < 3 * upscale; ++i)
          for (int64_t b = 0; b < upscale; ++b)
            copy((x * 3 * upscale + i) * upscale + b, (i * width + x) * upscale + b);
    };
    if (upscale == 1) return with(std::integral_constant<int64_t, 1>());  // known to the compiler, they are unrolled
    if (upscale == 2) return with(std::integral_constant<int64_t, 2>());
    with(upscale);
  }
};

template <class T, class Out>
void shuffle_forward(const Shuffle& s, const T* y, Out* rows, uint8_t* inside, const std::vector<double>& mean,
                     const std::vector<double>& std) {
  using A = Accumulate<T>;
  const int64_t row = s.width * 3 * s.upscale * s.upscale, width = s.pixels();
  torch::stable::parallel_for(0, s.frames * s.height, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> lines(row);
    std::vector<Out> values(width);
    std::vector<uint8_t> bits(s.bytes() * 8, 0);
    for (int64_t task = begin; task < end; ++task) {
      const T* from = y + task * row;
      s.for_each_element([&](int64_t at, int64_t to) { lines[to] = static_cast<A>(from[at]); });
      s.for_each_line(task, lines.data(), [&](int64_t frame, int64_t channel, int64_t y_at, const A* line) {
        const A m = static_cast<A>(mean[channel]), deviation = static_cast<A>(std[channel]);
        for (int64_t x = 0; x < width; ++x) {
          const A low = 0 > line[x] ? 0 : line[x], clamped = 1 < low ? 1 : low;  // a NaN stays NaN
          values[x] = static_cast<Out>((clamped - m) / deviation);
          bits[x] = line[x] == clamped;
        }
        uint8_t* const packed = inside + ((frame * 3 + channel) * s.height * s.upscale + y_at) * s.bytes();
        for (int64_t i = 0; i < s.bytes(); ++i) {
          uint64_t eight;
          std::memcpy(&eight, bits.data() + 8 * i, 8);
          packed[i] = static_cast<uint8_t>(eight * 0x0102040810204080 >> 56);  // byte k, 0 or 1, lands in bit k
        }
        for (int64_t r = 0; r < s.repeats; ++r)
          if (const int64_t slot = s.slots[frame * s.repeats + r]; slot >= 0)
            s.for_each_run(slot, channel, y_at, [&](int64_t x, int64_t element) {
              std::copy_n(values.data() + x, s.patch_width, rows + element);
            });
      });
    }
  });
}

template <class T, class Out>
void shuffle_backward(const Shuffle& s, const T* grad, const uint8_t* inside, Out* dy, const std::vector<double>& std) {
  using A = Accumulate<T>;
  const int64_t row = s.width * 3 * s.upscale * s.upscale, width = s.pixels();
  torch::stable::parallel_for(0, s.frames * s.height, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> lines(row);
    for (int64_t task = begin; task < end; ++task) {
      s.for_each_line(task, lines.data(), [&](int64_t frame, int64_t channel, int64_t y_at, A* line) {
        std::fill_n(line, width, A(0));
        for (int64_t r = 0; r < s.repeats; ++r)
          if (const int64_t slot = s.slots[frame * s.repeats + r]; slot >= 0)
            s.for_each_run(slot, channel, y_at, [&](int64_t x, int64_t element) {
              for (int64_t i = 0; i < s.patch_width; ++i) line[x + i] += static_cast<A>(grad[element + i]);
            });
        const A deviation = static_cast<A>(std[channel]);
        const uint8_t* const packed = inside + ((frame * 3 + channel) * s.height * s.upscale + y_at) * s.bytes();
        for (int64_t x = 0; x < width; ++x) line[x] = packed[x / 8] >> x % 8 & 1 ? line[x] / deviation : 0;
      });
      Out* const to = dy + task * row;
      s.for_each_element([&](int64_t at, int64_t from) { to[at] = static_cast<Out>(lines[from]); });
    }
  });
}

template <class F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Half:
      return f.template operator()<torch::headeronly::Half>();
    case ScalarType::BFloat16:
      return f.template operator()<torch::headeronly::BFloat16>();
    default:
      STD_TORCH_CHECK(false, "patchify takes float64 to float64, and float32, float16 and bfloat16 to each other");
  }
}

// f<what the tensor holds, what the result holds>()
template <class F>
void with_types(ScalarType from, ScalarType to, const F& f) {
  if (from == ScalarType::Double && to == ScalarType::Double) return f.template operator()<double, double>();
  with_type(from, [&]<class T>() { with_type(to, [&]<class Out>() { f.template operator()<T, Out>(); }); });
}

// Dense, their starts within a plane of that size.
Tensors checked(Tensors tables, int64_t height, int64_t width) {
  for (Tensor& table : tables) table = dense(table);
  for (size_t i = 0; i < tables.size(); i += 2) {
    const int32_t* start = static_cast<const int32_t*>(tables[i].const_data_ptr());
    const int64_t last = (i ? width : height) - tables[i + 1].size(1);
    for (int64_t row = 0; row < tables[i].numel(); ++row)
      STD_TORCH_CHECK(start[row] >= (row ? start[row - 1] : 0) && start[row] <= last,
                      "a band's starts must rise within the plane");
  }
  return tables;
}

// The two bands that tables (vertical start and weight, horizontal start and weight) hold, for a plane of that size.
template <class A>
std::array<resize::Band<A>, 2> bands(const Tensors& tables, int64_t height, int64_t width) {
  const auto band = [&](size_t i, int64_t columns) {
    return resize::Band<A>{static_cast<const int32_t*>(tables[i].const_data_ptr()),
                           static_cast<const A*>(tables[i + 1].const_data_ptr()), tables[i + 1].size(0), columns,
                           tables[i + 1].size(1)};
  };
  return {band(0, height), band(2, width)};
}

Tensor patchify(const Tensor& frames, int64_t patch, int64_t temporal_patch, int64_t merge, std::vector<double> mean,
                std::vector<double> std, ScalarType dtype, Tensors any_tables) {
  check_frames(frames);
  const auto [height, width] = check_bands(any_tables, frames.size(2), frames.size(3), frames);
  check_blocks(height, width, patch, patch, temporal_patch, merge, mean, std);
  const Tensors tables = checked(any_tables, frames.size(2), frames.size(3));
  const Grid g{patch, temporal_patch, merge, height / (patch * merge), width / (patch * merge)};
  const int64_t temporal_patches = (frames.size(0) + temporal_patch - 1) / temporal_patch;
  Tensor out = torch::stable::new_empty(frames, {temporal_patches * g.h * g.w * merge * merge, g.columns()}, dtype);
  const int64_t stride[] = {frames.stride(0), frames.stride(1), frames.stride(2), frames.stride(3)};
  with_types(frames.scalar_type(), dtype, [&]<class T, class Out>() {
    const T* from = static_cast<const T*>(frames.const_data_ptr());
    Out* to = static_cast<Out*>(out.mutable_data_ptr());
    if (tables.empty()) return forward(from, to, frames.size(0), stride, g, mean, std);
    const auto [y, x] = bands<Accumulate<T>>(tables, frames.size(2), frames.size(3));
    forward_resized(from, to, frames.size(0), stride, g, mean, std, y, x);
  });
  return out;
}

Tensor patchify_backward(const Tensor& grad, int64_t num_frames, int64_t height, int64_t width, int64_t patch,
                         int64_t temporal_patch, int64_t merge, std::vector<double> std, int64_t resized_height,
                         int64_t resized_width, ScalarType dtype, Tensors any_tables) {
  check_blocks(resized_height, resized_width, patch, patch, temporal_patch, merge, std, std);
  check_rows(grad, num_frames, resized_height, resized_width, patch, temporal_patch);
  const std::pair size = check_bands(any_tables, resized_height, resized_width, grad);
  STD_TORCH_CHECK(size == std::pair(height, width), "the bands do not lead to frames of ", height, "x", width);
  const Tensors tables = checked(any_tables, resized_height, resized_width);
  const Grid g{patch, temporal_patch, merge, resized_height / (patch * merge), resized_width / (patch * merge)};
  Tensor rows = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_empty(grad, {num_frames, 3, height, width}, dtype);
  with_types(rows.scalar_type(), dtype, [&]<class T, class Out>() {
    const T* from = static_cast<const T*>(rows.const_data_ptr());
    Out* to = static_cast<Out*>(out.mutable_data_ptr());
    if (tables.empty()) return backward(from, to, num_frames, g, std);
    const auto [y, x] = bands<Accumulate<T>>(tables, resized_height, resized_width);
    backward_resized(from, to, num_frames, g, std, y, x);
  });
  return out;
}

// slots, dense, of frames of `patches` patches each.
Tensor checked_slots(const Tensor& any_slots, const Tensor& rows, int64_t patches, int64_t temporal_patch) {
  const Tensor slots = dense(any_slots);
  const int32_t* slot = static_cast<const int32_t*>(slots.const_data_ptr());
  const int64_t frames = patches ? rows.size(0) / patches * temporal_patch : 0;
  for (int64_t i = 0; patches && i < slots.numel(); ++i)
    STD_TORCH_CHECK(slot[i] < frames, "slots must be below the ", frames, " frames, not ", slot[i]);
  return slots;
}

Tensor shuffle_to_rows(const Tensor& any_y, const Tensor& any_slots, Tensor rows, int64_t upscale, int64_t patch_height,
                       int64_t patch_width, int64_t temporal_patch, int64_t merge, std::vector<double> mean,
                       std::vector<double> std) {
  STD_TORCH_CHECK(any_y.dim() == 4, "shuffle_to_rows takes (frames, height, width, channels)");
  check_shuffle(rows, any_slots, any_y.size(1), any_y.size(2), upscale, patch_height, patch_width, temporal_patch,
                merge, mean, std);
  check_shuffled(any_y, any_slots, rows, upscale);
  const int64_t patches = any_y.size(1) * upscale / patch_height * (any_y.size(2) * upscale / patch_width);
  const Tensor y = dense(any_y), slots = checked_slots(any_slots, rows, patches, temporal_patch);
  const Shuffle s{y.size(0),      y.size(1),    y.size(2),
                  upscale,        patch_height, patch_width,
                  temporal_patch, merge,        static_cast<const int32_t*>(slots.const_data_ptr()),
                  slots.size(1)};
  Tensor inside = torch::stable::new_empty(y, {s.frames, 3, s.height * upscale, s.bytes()}, ScalarType::Byte);
  with_types(y.scalar_type(), rows.scalar_type(), [&]<class T, class Out>() {
    shuffle_forward(s, static_cast<const T*>(y.const_data_ptr()), static_cast<Out*>(rows.mutable_data_ptr()),
                    static_cast<uint8_t*>(inside.mutable_data_ptr()), mean, std);
  });
  return inside;
}

Tensor shuffle_to_rows_backward(const Tensor& any_grad, const Tensor& any_slots, const Tensor& any_inside,
                                int64_t height, int64_t width, int64_t upscale, int64_t patch_height,
                                int64_t patch_width, int64_t temporal_patch, int64_t merge, std::vector<double> mean,
                                std::vector<double> std, ScalarType dtype) {
  const Tensor grad = dense(any_grad);
  check_shuffle(grad, any_slots, height, width, upscale, patch_height, patch_width, temporal_patch, merge, mean, std);
  check_inside(any_inside, any_slots, height, width, upscale);
  const int64_t patches = height * upscale / patch_height * (width * upscale / patch_width);
  const Tensor slots = checked_slots(any_slots, grad, patches, temporal_patch), inside = dense(any_inside);
  const Shuffle s{slots.size(0),  height,       width,
                  upscale,        patch_height, patch_width,
                  temporal_patch, merge,        static_cast<const int32_t*>(slots.const_data_ptr()),
                  slots.size(1)};
  Tensor dy = torch::stable::new_empty(grad, {s.frames, height, width, 3 * upscale * upscale}, dtype);
  with_types(grad.scalar_type(), dtype, [&]<class T, class Out>() {
    shuffle_backward(s, static_cast<const T*>(grad.const_data_ptr()),
                     static_cast<const uint8_t*>(inside.const_data_ptr()), static_cast<Out*>(dy.mutable_data_ptr()),
                     std);
  });
  return dy;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def(
      "patchify(Tensor frames, int patch, int temporal_patch, int merge, float[] mean, float[] std, ScalarType dtype, "
      "Tensor[] tables) -> Tensor");
  m.def(
      "patchify_backward(Tensor grad, int num_frames, int height, int width, int patch, int temporal_patch, int merge, "
      "float[] std, int resized_height, int resized_width, ScalarType dtype, Tensor[] tables) -> Tensor");
  m.def(
      "shuffle_to_rows(Tensor y, Tensor slots, Tensor(a!) rows, int upscale, int patch_height, int patch_width, "
      "int temporal_patch, int merge, float[] mean, float[] std) -> Tensor");
  m.def(
      "shuffle_to_rows_backward(Tensor grad, Tensor slots, Tensor inside, int height, int width, int upscale, "
      "int patch_height, int patch_width, int temporal_patch, int merge, float[] mean, float[] std, ScalarType dtype) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CPU, m) {
  m.impl("patchify", boxed<&patchify>);
  m.impl("patchify_backward", boxed<&patchify_backward>);
  m.impl("shuffle_to_rows", boxed<&shuffle_to_rows>);
  m.impl("shuffle_to_rows_backward", boxed<&shuffle_to_rows_backward>);
}
