// BEV voxel pooling on the CPU, compiled once per instruction set. Every cell and every pixel column has one owner, which
// adds up in the order of the plan: no atomics, no sorting, and the same result for any number of threads.
#include "voxel_pool.h"

#include "parallel.h"
#include "vectors.h"

namespace irlvla {
namespace IRLVLA_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

constexpr int kMostVectors = kRegisters / 2;    // of channels at once: sums that stay in registers
constexpr int kMostGradients = kRegisters / 4;  // the same of features and their gradients
constexpr int kAhead = 8;                     // cells or runs are fetched while others are worked on

/// Channels are worked on in blocks of as many vectors as stay in registers, nearly equal ones.
struct Blocks {
  explicit Blocks(int64_t channels, int64_t most = kMostVectors)
      : vectors(parts(parts(channels, kLanes), parts(channels, kLanes * most))),
        pitch(parts(channels, vectors * kLanes) * vectors * kLanes) {}

  int64_t vectors;  // of a block
  int64_t pitch;    // of rows that hold all blocks
};

/// Memory of a task, aligned to cache lines.
template <class T> class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(static_cast<char*>(::operator new(count * sizeof(T) + 64))) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(memory_); }
  T* get() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63}); }

 private:
  char* memory_;
};

/// Calls work(pointer) with the type that `number` names.
template <class Pointer, class Work> void as_type(Number number, Pointer* pointer, Work&& work) {
  constexpr bool kConst = std::is_const_v<Pointer>;
  switch (number) {
    case Number::float32: return work(static_cast<std::conditional_t<kConst, const float, float>*>(pointer));
    case Number::float16: return work(static_cast<std::conditional_t<kConst, const Half, Half>*>(pointer));
    case Number::bfloat16: return work(static_cast<std::conditional_t<kConst, const Bfloat, Bfloat>*>(pointer));
  }
}

int64_t bytes_of(Number number) { return number == Number::float32 ? 4 : 2; }

// Always inline: the compiler drops calls of a function that does nothing but this.
IRLVLA_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// --- rows of numbers ------------------------------------------------------------------------------------------------

/// n numbers from one type to the other. The last vector overlaps the one before; fewer numbers than lanes go through a copy.
template <class From, class To> void copy_row(const From* from, int64_t n, To* to) {
  if (n < kLanes) {
    From given[kLanes] = {};
    To made[kLanes];
    for (int64_t i = 0; i < n; ++i) given[i] = from[i];
    store(made, load(given));
    for (int64_t i = 0; i < n; ++i) to[i] = made[i];
    return;
  }
  for (int64_t i = 0; i < n - kLanes; i += kLanes) store(to + i, load(from + i));
  store(to + n - kLanes, load(from + n - kLanes));
}

/// The same of numbers that do not lie side by side.
template <class From, class To> void copy_row(const From* from, int64_t from_stride, int64_t n, To* to, int64_t to_stride) {
  if (from_stride == 1 && to_stride == 1) return copy_row(from, n, to);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = smaller(kLanes, n - i);
    From given[kLanes] = {};
    To made[kLanes];
    for (int64_t k = 0; k < count; ++k) given[k] = from[(i + k) * from_stride];
    store(made, load(given));
    for (int64_t k = 0; k < count; ++k) to[(i + k) * to_stride] = made[k];
  }
}

/// n numbers as float32, and zeros up to `pitch`.
template <class From> void widen_row(const From* from, int64_t n, float* to, int64_t pitch) {
  copy_row(from, n, to);
  for (int64_t i = n; i < pitch; ++i) to[i] = 0;
}

/// Tiles of four columns and as many rows as one vector holds, or else four; what is left goes one by one.
template <class Tile, class One> IRLVLA_INLINE void each_tile(int64_t rows, int64_t columns, Tile&& tile, One&& one) {
  for (int64_t c = 0; c < columns; c += 4)
    for (int64_t r = 0, step; r < rows; r += step) {
      const bool wide = c + 4 <= columns;
      step = wide && r + kLanes <= rows ? kLanes : wide && r + 4 <= rows ? 4 : 1;
      if (step == kLanes) tile(r, c, Floats{});
      else if (step == 4) tile(r, c, Quad{});
      else for (int64_t k = c; k < smaller(c + 4, columns); ++k) one(r, k);
    }
}

/// to[column][row] = from[row][column].
void to_columns(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  each_tile(rows, columns, [=](int64_t r, int64_t c, auto vector) __attribute__((always_inline)) {
    decltype(vector) values[4];
    for (int i = 0; i < 4; ++i) values[i] = load_quads<decltype(vector)>(from + (r + i) * from_stride + c, 4 * from_stride);
    transpose(values);
    for (int k = 0; k < 4; ++k) __builtin_memcpy(to + (c + k) * to_stride + r, &values[k], sizeof values[k]);
  }, [=](int64_t r, int64_t c) { to[c * to_stride + r] = from[r * from_stride + c]; });
}

/// to[row][column] = from[column][row].
void to_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  each_tile(rows, columns, [=](int64_t r, int64_t c, auto vector) __attribute__((always_inline)) {
    decltype(vector) values[4];
    for (int k = 0; k < 4; ++k) __builtin_memcpy(&values[k], from + (c + k) * from_stride + r, sizeof values[k]);
    transpose(values);
    for (int i = 0; i < 4; ++i) store_quads(to + (r + i) * to_stride + c, 4 * to_stride, values[i]);
  }, [=](int64_t r, int64_t c) { to[r * to_stride + c] = from[c * from_stride + r]; });
}

// --- weights --------------------------------------------------------------------------------------------------------

/// Neighbouring pixel columns of a camera, that one task works on.
struct Group {
  int64_t camera, first, count;  // the camera of the batch
};

template <class Work> void each_group(const PoolPlan& plan, int64_t batch, int threads, Work&& work) {
  constexpr int64_t kColumns = 16;
  const int64_t groups = parts(plan.width, kColumns);
  parallel_for(batch * plan.cameras * groups, threads, [&](int64_t i) {
    const int64_t first = i % groups * kColumns;
    work(Group{i / groups, first, smaller(kColumns, plan.width - first)});
  });
}

/// How depth maps to the weights [column][bin][row] of a group: as planes, each a matrix with a row per image row and its
/// transpose. The columns of the matrix are the bins where those are neighbours in memory, else the pixel columns.
struct Planes {
  Planes(const PoolPlan& plan, const DepthStrides& s, const Group& group)
      : by_bin(s.bin != 1),
        count(by_bin ? plan.bins : group.count),
        columns(by_bin ? group.count : plan.bins),
        depth(group.camera * s.camera + group.first * s.column),
        depth_step(by_bin ? s.bin : s.column),
        depth_stride(by_bin ? s.column : s.bin),
        weights_step(by_bin ? plan.height : plan.bins * plan.height),
        weights_stride(by_bin ? plan.bins * plan.height : plan.height) {}

  bool by_bin;
  int64_t count, columns;
  int64_t depth;                         // where the first plane begins
  int64_t depth_step, depth_stride;      // from plane to plane, from column to column
  int64_t weights_step, weights_stride;  // the same
};

void read_depth(const VoxelPoolTask& task, const Group& group, float* weights) {
  const int64_t height = task.plan.height, row = task.depth_strides.row;
  const Planes planes(task.plan, task.depth_strides, group);
  const int64_t n = planes.columns, stride = planes.depth_stride;
  const Scratch<float> rows(height * n);
  as_type(task.depth_number, task.depth, [&](auto* depth) {
    depth += planes.depth;
    for (int64_t p = 0; p < planes.count; ++p, depth += planes.depth_step, weights += planes.weights_step) {
      if constexpr (std::is_same_v<decltype(depth), const float*>)
        if (stride == 1) {
          for (int64_t v = 0; v < height; ++v) prefetch(depth + v * row + 2 * planes.depth_step, n * sizeof(float));
          to_columns(depth, row, height, n, weights, planes.weights_stride);
          continue;
        }
      for (int64_t v = 0; v < height; ++v) copy_row(depth + v * row, stride, n, rows.get() + v * n, 1);
      to_columns(rows.get(), n, height, n, weights, planes.weights_stride);
    }
  });
}

void write_depth_grad(const VoxelPoolBackwardTask& task, const Group& group, const float* weights_grad) {
  const int64_t height = task.plan.height, row = task.depth_strides.row;
  const Planes planes(task.plan, task.depth_strides, group);
  const int64_t n = planes.columns, stride = planes.depth_stride;
  const Scratch<float> rows(height * n);
  as_type(task.depth_number, task.depth_grad, [&](auto* depth_grad) {
    depth_grad += planes.depth;
    for (int64_t p = 0; p < planes.count; ++p, depth_grad += planes.depth_step, weights_grad += planes.weights_step) {
      if constexpr (std::is_same_v<decltype(depth_grad), float*>)
        if (stride == 1) {
          for (int64_t v = 0; v < height; ++v) prefetch(depth_grad + v * row + 2 * planes.depth_step, n * sizeof(float));
          to_rows(weights_grad, planes.weights_stride, height, n, depth_grad, row);
          continue;
        }
      to_rows(weights_grad, planes.weights_stride, height, n, rows.get(), n);
      for (int64_t v = 0; v < height; ++v) copy_row(rows.get() + v * n, 1, n, depth_grad + v * row, stride);
    }
  });
}

/// e^x for x <= 0, within 2 units in the last place; 0 where that is less than the least normal float.
Floats exponential(Floats x) {
  const Ints normal = ~(x < -87.33654f);            // or NaN
  const Floats turns = x * 1.44269504f + 12582912.0f;  // rounds: the integer stands in the last bits
  const Floats n = turns - 12582912.0f;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return as<Floats>(normal & (as<Ints>(p) + (as<Ints>(turns) << 23)));
}

/// Some rows of an array [bin][row], as many as there are lanes or fewer.
struct RowLanes {
  RowLanes(float* array, int64_t height, int64_t row) : values(array + row), height(height), count(smaller(kLanes, height - row)) {}

  Floats get(int64_t bin) const {
    if (count == kLanes) return load(values + bin * height);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = values[bin * height + i];
    return load(lanes);
  }
  void put(int64_t bin, Floats lanes) const {
    if (count == kLanes) return store(values + bin * height, lanes);
    for (int64_t i = 0; i < count; ++i) values[bin * height + i] = lanes[i];
  }

  float* values;
  int64_t height, count;
};

/// Softmax over bins of the weights [bin][row] of a pixel column, in place.
void softmax(float* weights, int64_t bins, int64_t height) {
  for (int64_t row = 0; row < height; row += kLanes) {
    const RowLanes w(weights, height, row);
    Floats most = w.get(0), total = {};
    for (int64_t d = 1; d < bins; ++d) {
      const Floats x = w.get(d);
      most = x > most ? x : most;
    }
    for (int64_t d = 0; d < bins; ++d) {
      const Floats e = exponential(w.get(d) - most);
      total += e;
      w.put(d, e);
    }
    const Floats scale = 1.0f / total;
    for (int64_t d = 0; d < bins; ++d) w.put(d, w.get(d) * scale);
  }
}

/// The gradient of logits from that of weights, in place.
void softmax_backward(const float* weights, int64_t bins, int64_t height, float* grads) {
  for (int64_t row = 0; row < height; row += kLanes) {
    const RowLanes w(const_cast<float*>(weights), height, row), g(grads, height, row);
    Floats mean = {};
    for (int64_t d = 0; d < bins; ++d) mean += w.get(d) * g.get(d);
    for (int64_t d = 0; d < bins; ++d) g.put(d, w.get(d) * (g.get(d) - mean));
  }
}

// --- forward --------------------------------------------------------------------------------------------------------

/// Features of a sample as float32, whole vectors, one pixel after the other.
struct Rows {
  const float* values;
  int64_t pitch;
};

/// Some cells of a sample, by their places in the order of visits.
struct Cells {
  int64_t sample, begin, end;
  bool stream;  // whether sums go past the caches
};

/// One block of channels, that begins at `channel`, of some cells.
template <int kVectors> void pool_block(const VoxelPoolTask& task, const Rows& features, const Cells& cells, int64_t channel) {
  const PoolPlan& plan = task.plan;
  const int64_t base = plan.samples > 1 ? cells.sample * plan.cells : 0, stride = plan.width * features.pitch;
  const int64_t count = smaller(kVectors * kLanes, task.channels - channel);
  const int32_t* const starts = plan.cell_start + base;
  const int32_t* const order = plan.cell_order + base;
  const float* const weights = static_cast<const float*>(task.weights) + cells.sample * plan.cameras * plan.width * plan.bins * plan.height;
  for (int64_t place = cells.begin; place < cells.end; ++place) {
    const int64_t cell = order[place];
    if (place + kAhead < cells.end) __builtin_prefetch(plan.cell_runs + starts[order[place + kAhead]]);
    const CellRun* const end = plan.cell_runs + starts[cell + 1];
    Floats sums[kVectors] = {};
    for (const CellRun* run = plan.cell_runs + starts[cell]; run < end; ++run) {
      const int64_t length = run->feature & 255;
      const float* weight = weights + run->weight;
      const float* feature = features.values + (run->feature >> 8) * features.pitch + channel;
      for (const float* const stop = weight + length; weight < stop; ++weight, feature += stride) {
        const Floats w = splat(*weight);
        for (int k = 0; k < kVectors; ++k) sums[k] += w * load(feature + k * kLanes);
      }
    }
    as_type(task.bev_number, task.bev, [&](auto* bev) {
      auto* out = bev + (cells.sample * plan.cells + cell) * task.channels + channel;
      if (cells.stream) {
        for (int k = 0; k < kVectors; ++k) stream(out + k * kLanes, sums[k]);
      } else if (count == kVectors * kLanes) {
        for (int k = 0; k < kVectors; ++k) store(out + k * kLanes, sums[k]);
      } else {
        float row[kVectors * kLanes];
        for (int k = 0; k < kVectors; ++k) store(row + k * kLanes, sums[k]);
        copy_row(row, count, out);
      }
    });
  }
  if (cells.stream) fence();
}

template <int kVectors = kMostVectors> void pool(const VoxelPoolTask& task, const Rows& features, const Cells& cells) {
  if constexpr (kVectors > 1)
    if (Blocks(task.channels).vectors < kVectors) return pool<kVectors - 1>(task, features, cells);
  for (int64_t channel = 0; channel < task.channels; channel += kVectors * kLanes) pool_block<kVectors>(task, features, cells, channel);
}

/// Features of a sample as they are, if they are whole vectors of float32, or a copy of them.
Rows read_features(const VoxelPoolTask& task, int64_t sample, float* copy, int threads) {
  constexpr int64_t kChunk = 64;
  const int64_t pixels = task.plan.cameras * task.plan.height * task.plan.width, channels = task.channels, pitch = Blocks(channels).pitch;
  if (!copy) return {static_cast<const float*>(task.features) + sample * pixels * channels, pitch};
  as_type(task.feature_number, task.features, [&](auto* features) {
    features += sample * pixels * channels;
    parallel_for(parts(pixels, kChunk), threads, [&](int64_t i) {
      for (int64_t p = i * kChunk; p < smaller((i + 1) * kChunk, pixels); ++p) widen_row(features + p * channels, channels, copy + p * pitch, pitch);
    });
  });
  return {copy, pitch};
}

/// A large result would leave the caches before it is read, and its memory is not in them when it is written.
bool is_streamed(const VoxelPoolTask& task) {
  const int64_t number = bytes_of(task.bev_number), bytes = task.batch * task.plan.cells * task.channels * number;
  const bool whole = task.channels == Blocks(task.channels).pitch && reinterpret_cast<uintptr_t>(task.bev) % (kLanes * number) == 0;
  return whole && bytes >= 2 << 20;
}

void forward(const VoxelPoolTask& task, int threads) {
  constexpr int64_t kChunk = 128;
  const PoolPlan& plan = task.plan;
  const int64_t columns = plan.cameras * plan.width, size = plan.bins * plan.height, pitch = Blocks(task.channels).pitch;
  each_group(plan, task.batch, threads, [&](const Group& group) {
    float* const weights = static_cast<float*>(task.weights) + (group.camera * plan.width + group.first) * size;
    read_depth(task, group, weights);
    for (int64_t i = 0; i < group.count && task.softmax; ++i) softmax(weights + i * size, plan.bins, plan.height);
  });
  const bool stream = is_streamed(task);
  const bool as_they_are = task.feature_number == Number::float32 && task.channels == pitch;
  const Scratch<float> copy(as_they_are ? 0 : columns * plan.height * pitch);
  for (int64_t sample = 0; sample < task.batch; ++sample) {
    const Rows features = read_features(task, sample, as_they_are ? nullptr : copy.get(), threads);
    parallel_for(parts(plan.cells, kChunk), threads,
                 [&](int64_t i) { pool(task, features, {sample, i * kChunk, smaller((i + 1) * kChunk, plan.cells), stream}); });
  }
}

// --- backward -------------------------------------------------------------------------------------------------------

IRLVLA_INLINE void add_sums(Floats (&values)[4], float* const (&to)[4]) {
  transpose(values);
  const Quad sums = fold((values[0] + values[2]) + (values[1] + values[3]));
  for (int i = 0; i < 4; ++i) *to[i] += sums[i];
}

/// A run, as the image rows in it need it.
struct Sight {
  const float* grads;    // [channel of a block]
  const float* weights;  // [image row]
  float* weights_grad;   // the same
};

/// What the owner of a pixel column works with.
struct Column {
  const VoxelPoolBackwardTask& task;
  int64_t sample, pixel;                    // the pixel of its first row
  const ColumnRun *begin, *end, *next_end;  // its runs; those of the next column follow, if there is one
  const float* weights;                     // [bin][image row]
  float* weights_grad;                      // the same
};

constexpr int kSights = 32;  // that are worked on together, so that their gradients stay in the nearest cache

/// Memory for one pixel column after the other.
struct Workspace {
  static constexpr int64_t kRow = kMostGradients * kLanes;

  explicit Workspace(int64_t height) : sets(height + 1), features(height * kRow), features_grad(height * kRow), grads((kSights + 1) * kRow + 2 * height) {
    float* const nobody = grads.get() + kSights * kRow;
    __builtin_memset(nobody, 0, (kRow + 2 * height) * sizeof(float));
    sights[kSights] = {nobody, nobody + kRow, nobody + kRow + height};
  }

  Sight sights[kSights + 1];                     // the last one adds nothing: it fills up
  const Scratch<uint64_t> sets;                  // [image row]: a bit for each of its sights
  const Scratch<float> features, features_grad;  // [image row][channel of a block]
  const Scratch<float> grads;                    // [sight][channel of a block]
};

/// The set of sights of each image row, of so many runs.
void find_sets(const ColumnRun* runs, int64_t count, int64_t height, uint64_t* sets) {
  __builtin_memset(sets, 0, (height + 1) * sizeof(uint64_t));
  for (int64_t i = 0; i < count; ++i) {  // first what changes from row to row
    sets[runs[i].first] ^= uint64_t{1} << i;
    sets[runs[i].first + runs[i].length] ^= uint64_t{1} << i;
  }
  for (int64_t row = 1; row < height; ++row) sets[row] ^= sets[row - 1];
}

/// What sights add to the gradients of a pixel, whose features stay in registers with their gradients.
template <int kVectors, bool kFeatures, bool kWeights> void differentiate_pixel(const Workspace& space, int64_t row) {
  const float* const features = space.features.get() + row * kVectors * kLanes;
  float* const features_grad = space.features_grad.get() + row * kVectors * kLanes;
  Floats feature[kVectors], feature_grad[kVectors];
  for (int k = 0; k < kVectors; ++k) feature[k] = load(features + k * kLanes), feature_grad[k] = load(features_grad + k * kLanes);
  for (uint64_t set = space.sets.get()[row]; set;) {  // four at a time
    Floats dots[4] = {};
    float* to[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, set &= set - 1) {
      const Sight& sight = space.sights[__builtin_ctzll(set | uint64_t{1} << kSights)];
      const float* const from = sight.grads;
      const Floats weight = splat(sight.weights[row]);
      to[i] = sight.weights_grad + row;
      for (int k = 0; k < kVectors; ++k) {
        const Floats grad = load(from + k * kLanes);
        if (kWeights) dots[i] += feature[k] * grad;
        if (kFeatures) feature_grad[k] += weight * grad;
      }
    }
    if (kWeights) add_sums(dots, to);
  }
  if (kFeatures)
    for (int k = 0; k < kVectors; ++k) store(features_grad + k * kLanes, feature_grad[k]);
}

/// The gradients of one block of channels, that begins at `channel`.
template <int kVectors, bool kFeatures, bool kWeights> void differentiate_block(const Column& c, Workspace& space, int64_t channel) {
  constexpr int64_t kChannels = kVectors * kLanes;
  const VoxelPoolBackwardTask& task = c.task;
  const PoolPlan& plan = task.plan;
  const int64_t count = smaller(kChannels, task.channels - channel), bytes = bytes_of(task.bev_number) * task.channels;
  const char* const grads = static_cast<const char*>(task.bev_grad) + c.sample * plan.cells * bytes + bytes_of(task.bev_number) * channel;
  const int64_t ahead = bytes_of(task.bev_number) * count;
  const int64_t first = c.pixel * task.channels + channel, stride = plan.width * task.channels;
  as_type(task.feature_number, task.features, [&](auto* features) {
    for (int64_t row = 0; row < plan.height; ++row) widen_row(features + first + row * stride, count, space.features.get() + row * kChannels, kChannels);
  });
  const int64_t number_bytes = bytes_of(task.feature_number), row_bytes = stride * number_bytes, pixel_bytes = count * number_bytes;
  const char* const features = static_cast<const char*>(task.features) + (first + task.channels) * number_bytes;  // of the next pixel
  const char* const features_grad = static_cast<const char*>(task.features_grad) + (first + task.channels) * number_bytes;
  const bool as_they_are = task.bev_number == Number::float32 && count == kChannels;
  __builtin_memset(space.features_grad.get(), 0, plan.height * kChannels * sizeof(float));
  for (const ColumnRun *run = c.begin, *end; run < c.end; run = end) {
    end = run + smaller(kSights, c.end - run);
    find_sets(run, end - run, plan.height, space.sets.get());
    for (int64_t i = 0; i < end - run; ++i) {
      const int64_t place = run[i].bin * plan.height;
      const void* const from = grads + run[i].cell * bytes;
      float* const copy = space.grads.get() + i * kChannels;
      space.sights[i] = {as_they_are ? static_cast<const float*>(from) : copy, c.weights + place, c.weights_grad + place};
      if (!as_they_are) as_type(task.bev_number, from, [&](auto* values) { widen_row(values, count, copy, kChannels); });
    }
    for (int64_t row = 0; row < plan.height; ++row) {
      for (const ColumnRun* next = end + row * kSights / plan.height; next < end + (row + 1) * kSights / plan.height; ++next)
        if (next < c.next_end) prefetch(grads + next->cell * bytes, ahead);
      prefetch(features + row * row_bytes, pixel_bytes);
      if (kFeatures) prefetch(features_grad + row * row_bytes, pixel_bytes);
      differentiate_pixel<kVectors, kFeatures, kWeights>(space, row);
    }
  }
  if (kFeatures)
    as_type(task.feature_number, task.features_grad, [&](auto* features_grad) {
      for (int64_t row = 0; row < plan.height; ++row) copy_row(space.features_grad.get() + row * kChannels, count, features_grad + first + row * stride);
    });
}

/// All gradients of one pixel column; those of weights go to `weights_grad`, where they are wanted.
template <int kVectors = kMostGradients> void differentiate_column(const Column& c, Workspace& space) {
  const VoxelPoolBackwardTask& task = c.task;
  if constexpr (kVectors > 1)
    if (Blocks(task.channels, kMostGradients).vectors < kVectors) return differentiate_column<kVectors - 1>(c, space);
  for (int64_t channel = 0; channel < task.channels; channel += kVectors * kLanes) {
    if (!task.depth_grad) differentiate_block<kVectors, true, false>(c, space, channel);
    else if (!task.features_grad) differentiate_block<kVectors, false, true>(c, space, channel);
    else differentiate_block<kVectors, true, true>(c, space, channel);
  }
  if (task.depth_grad && task.softmax) softmax_backward(c.weights, task.plan.bins, task.plan.height, c.weights_grad);
}

void differentiate_group(const VoxelPoolBackwardTask& task, const Group& group, float* weights_grad) {
  const PoolPlan& plan = task.plan;
  const int64_t columns = plan.cameras * plan.width, size = plan.bins * plan.height, first = group.camera * plan.width + group.first;
  const int32_t* const starts = plan.column_start + (plan.samples > 1 ? first : first % columns);
  Workspace space(plan.height);
  const float* weights = static_cast<const float*>(task.weights) + first * size;
  if (task.depth_grad && task.weights_grad)
    __builtin_memcpy(weights_grad, static_cast<const float*>(task.weights_grad) + first * size, group.count * size * sizeof(float));
  else if (task.depth_grad)
    __builtin_memset(weights_grad, 0, group.count * size * sizeof(float));
  for (int64_t i = 0; i < group.count; ++i, weights += size, weights_grad += size) {
    const ColumnRun* const end = plan.column_runs + starts[i + 1];
    differentiate_column({task, first / columns, group.camera * plan.height * plan.width + group.first + i, plan.column_runs + starts[i], end,
                          i + 1 < group.count ? plan.column_runs + starts[i + 2] : end, weights, weights_grad}, space);
  }
}

void backward(const VoxelPoolBackwardTask& task, int threads) {
  const int64_t size = task.plan.bins * task.plan.height;
  each_group(task.plan, task.batch, threads, [&](const Group& group) {
    const Scratch<float> weights_grad(task.depth_grad ? group.count * size : 0);
    differentiate_group(task, group, weights_grad.get());
    if (task.depth_grad) write_depth_grad(task, group, weights_grad.get());
  });
}

}  // namespace

extern const PoolKernels kPoolKernels;
const PoolKernels kPoolKernels{forward, backward};

}  // namespace IRLVLA_ISA
}  // namespace irlvla
