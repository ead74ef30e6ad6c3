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

constexpr int kMostVectors = kRegisters / 2;  // of channels at once: sums or gradients that stay in registers
constexpr int kAhead = 8;                     // cells or runs are fetched while others are worked on

/// Channels are worked on in blocks of as many vectors as stay in registers, nearly equal ones.
struct Blocks {
  explicit Blocks(int64_t channels)
      : vectors(parts(parts(channels, kLanes), parts(channels, kLanes * kMostVectors))),
        pitch(parts(channels, vectors * kLanes) * vectors * kLanes) {}

  int64_t vectors;  // of a block
  int64_t pitch;    // of rows that hold all blocks
};

/// Memory of a task, aligned to cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(static_cast<char*>(::operator new(floats * sizeof(float) + 64))) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(memory_); }
  float* get() const { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63}); }

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

/// to[column][row] = from[row][column].
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t c = 0; c < columns; c += 4)
    for (int64_t r = 0; r < rows; r += 4) {
      if (c + 4 > columns || r + 4 > rows) {
        for (int64_t k = c; k < smaller(c + 4, columns); ++k)
          for (int64_t i = r; i < smaller(r + 4, rows); ++i) to[k * to_stride + i] = from[i * from_stride + k];
        continue;
      }
      Quad tile[4];
      for (int i = 0; i < 4; ++i) __builtin_memcpy(&tile[i], from + (r + i) * from_stride + c, sizeof tile[i]);
      transpose(tile);
      for (int k = 0; k < 4; ++k) __builtin_memcpy(to + (c + k) * to_stride + r, &tile[k], sizeof tile[k]);
    }
}

// --- weights --------------------------------------------------------------------------------------------------------

/// Neighbouring pixel columns of a camera, that one task works on.
struct Group {
  int64_t camera, first, count;  // the camera of the batch
};

template <class Work> void each_group(const PoolPlan& plan, int64_t batch, int threads, Work&& work) {
  constexpr int64_t kColumns = 8;
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
  const Scratch rows(height * n);
  as_type(task.depth_number, task.depth, [&](auto* depth) {
    depth += planes.depth;
    for (int64_t p = 0; p < planes.count; ++p, depth += planes.depth_step, weights += planes.weights_step) {
      if constexpr (std::is_same_v<decltype(depth), const float*>)
        if (stride == 1) {
          transpose(depth, row, height, n, weights, planes.weights_stride);
          continue;
        }
      for (int64_t v = 0; v < height; ++v) copy_row(depth + v * row, stride, n, rows.get() + v * n, 1);
      transpose(rows.get(), n, height, n, weights, planes.weights_stride);
    }
  });
}

void write_depth_grad(const VoxelPoolBackwardTask& task, const Group& group, const float* weights_grad) {
  const int64_t height = task.plan.height, row = task.depth_strides.row;
  const Planes planes(task.plan, task.depth_strides, group);
  const int64_t n = planes.columns, stride = planes.depth_stride;
  const Scratch rows(height * n);
  as_type(task.depth_number, task.depth_grad, [&](auto* depth_grad) {
    depth_grad += planes.depth;
    for (int64_t p = 0; p < planes.count; ++p, depth_grad += planes.depth_step, weights_grad += planes.weights_step) {
      if constexpr (std::is_same_v<decltype(depth_grad), float*>)
        if (stride == 1) {
          transpose(weights_grad, planes.weights_stride, n, height, depth_grad, row);
          continue;
        }
      transpose(weights_grad, planes.weights_stride, n, height, rows.get(), n);
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
      float total[256];
      if (run + 1 < end && run[1].feature == run->feature) {  // the same pixels at the next depth: their weights first
        for (int64_t i = 0; i < length; ++i) total[i] = weight[i] + weights[run[1].weight + i];
        for (++run; run + 1 < end && run[1].feature == run->feature; ++run)
          for (int64_t i = 0; i < length; ++i) total[i] += weights[run[1].weight + i];
        weight = total;
      }
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
  const Scratch copy(as_they_are ? 0 : columns * plan.height * pitch);
  for (int64_t sample = 0; sample < task.batch; ++sample) {
    const Rows features = read_features(task, sample, as_they_are ? nullptr : copy.get(), threads);
    parallel_for(parts(plan.cells, kChunk), threads,
                 [&](int64_t i) { pool(task, features, {sample, i * kChunk, smaller((i + 1) * kChunk, plan.cells), stream}); });
  }
}

// --- backward -------------------------------------------------------------------------------------------------------

/// What the owner of a pixel column works with.
struct Column {
  const VoxelPoolBackwardTask& task;
  const ColumnRun* begin;
  const ColumnRun* end;
  int64_t sample;
  const float* weights;   // [bin][row]
  float* weights_grad;    // [bin][row]
  const float* features;  // of the image rows
  float* features_grad;   // the same
};

template <int kCount> struct Count {
  static constexpr int value = kCount;
};

void add_sums(const Floats (&values)[4], float* to) {
  Quad sums[4], before;
  for (int i = 0; i < 4; ++i) sums[i] = fold(values[i]);
  transpose(sums);
  __builtin_memcpy(&before, to, sizeof before);
  before += (sums[0] + sums[2]) + (sums[1] + sums[3]);
  __builtin_memcpy(to, &before, sizeof before);
}

void add_sums(const Floats (&values)[1], float* to) {
  const Quad sums = fold(values[0]);
  *to += (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

/// Image rows of a pixel column in one block of channels, that see one cell: weights, features and their gradients.
struct Pixels {
  int64_t count, pitch;
  const float* weights;
  float* weights_grad;
  const float* features;
  float* features_grad;
};

template <int kVectors, bool kFeatures, bool kWeights> IRLVLA_INLINE void differentiate_pixels(const Floats (&grad)[kVectors], const Pixels& p) {
  const auto rows = [&](int64_t first, auto count) __attribute__((always_inline)) {
    constexpr int kRows = decltype(count)::value;
    Floats dots[kRows] = {};
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = (first + i) * p.pitch;
      const Floats w = splat(p.weights[first + i]);
      for (int k = 0; k < kVectors; ++k) {
        if (kWeights) dots[i] += grad[k] * load(p.features + at + k * kLanes);
        if (kFeatures) store(p.features_grad + at + k * kLanes, load(p.features_grad + at + k * kLanes) + w * grad[k]);
      }
    }
    if (kWeights) add_sums(dots, p.weights_grad + first);
  };
  int64_t i = 0;
  for (; i + 4 <= p.count; i += 4) rows(i, Count<4>{});
  for (; i < p.count; ++i) rows(i, Count<1>{});
}

/// Whether the next run is that of the same pixels in the same cell, at the next depth.
bool continues(const ColumnRun* run, const ColumnRun* end) {
  return run + 1 < end && run[1].cell == run->cell && run[1].first == run->first && run[1].length == run->length;
}

/// The gradients of one block of channels, that begins at `channel`.
template <int kVectors, bool kFeatures, bool kWeights> void differentiate_block(const Column& c, int64_t channel) {
  const VoxelPoolBackwardTask& task = c.task;
  const int64_t height = task.plan.height, pitch = Blocks(task.channels).pitch, count = smaller(kVectors * kLanes, task.channels - channel);
  const bool as_it_is = task.bev_number == Number::float32 && count == kVectors * kLanes;
  const int64_t bytes = bytes_of(task.bev_number), row_bytes = task.channels * bytes;
  const char* const grads = static_cast<const char*>(task.bev_grad) + c.sample * task.plan.cells * row_bytes + channel * bytes;
  for (int i = 0; i < kAhead && c.begin + i < c.end; ++i) prefetch(grads + c.begin[i].cell * row_bytes, count * bytes);
  for (const ColumnRun* run = c.begin; run < c.end; ++run) {
    if (run + kAhead < c.end) prefetch(grads + run[kAhead].cell * row_bytes, count * bytes);
    float row[kVectors * kLanes];
    const void* const in_memory = grads + run->cell * row_bytes;
    if (!as_it_is) as_type(task.bev_number, in_memory, [&](auto* from) { widen_row(from, count, row, kVectors * kLanes); });
    const float* const values = as_it_is ? static_cast<const float*>(in_memory) : row;
    Floats grad[kVectors];
    for (int k = 0; k < kVectors; ++k) grad[k] = load(values + k * kLanes);

    const auto place = [&](const ColumnRun* at) { return at->bin * height + at->first; };
    const int64_t length = run->length, pixels = run->first * pitch + channel;
    Pixels p{length, pitch, c.weights + place(run), c.weights_grad + place(run), c.features + pixels, c.features_grad + pixels};
    float total[256], dots[256];  // of all depths at which the pixels see the cell
    const ColumnRun* const first = run;
    if (continues(run, c.end)) {
      for (int64_t i = 0; i < length; ++i) total[i] = p.weights[i], dots[i] = 0;
      while (continues(run, c.end)) {
        ++run;
        for (int64_t i = 0; i < length; ++i) total[i] += c.weights[place(run) + i];
      }
      p.weights = total, p.weights_grad = dots;
    }
    differentiate_pixels<kVectors, kFeatures, kWeights>(grad, p);
    for (const ColumnRun* at = first; kWeights && first < run && at <= run; ++at)
      for (int64_t i = 0; i < length; ++i) c.weights_grad[place(at) + i] += dots[i];
  }
}

template <int kVectors = kMostVectors> void differentiate(const Column& c) {
  const VoxelPoolBackwardTask& task = c.task;
  if constexpr (kVectors > 1)
    if (Blocks(task.channels).vectors < kVectors) return differentiate<kVectors - 1>(c);
  for (int64_t channel = 0; channel < task.channels; channel += kVectors * kLanes) {
    if (!task.depth_grad) differentiate_block<kVectors, true, false>(c, channel);
    else if (!task.features_grad) differentiate_block<kVectors, false, true>(c, channel);
    else differentiate_block<kVectors, true, true>(c, channel);
  }
}

/// All gradients of one pixel column of a batch; those of weights go to `weights_grad`, where they are wanted.
void differentiate_column(const VoxelPoolBackwardTask& task, int64_t column, float* weights_grad) {
  const PoolPlan& plan = task.plan;
  const int64_t columns = plan.cameras * plan.width, size = plan.bins * plan.height, pitch = Blocks(task.channels).pitch;
  const int64_t pixel = column / plan.width * plan.height * plan.width + column % plan.width;  // of the first row
  const float* const weights = static_cast<const float*>(task.weights) + column * size;
  const Scratch scratch(2 * plan.height * pitch);
  float* const features = scratch.get();
  float* const features_grad = features + plan.height * pitch;
  as_type(task.feature_number, task.features, [&](auto* from) {
    for (int64_t v = 0; v < plan.height; ++v)
      widen_row(from + (pixel + v * plan.width) * task.channels, task.channels, features + v * pitch, pitch);
  });
  __builtin_memset(features_grad, 0, plan.height * pitch * sizeof(float));
  if (task.depth_grad && task.weights_grad)
    __builtin_memcpy(weights_grad, static_cast<const float*>(task.weights_grad) + column * size, size * sizeof(float));
  else if (task.depth_grad)
    __builtin_memset(weights_grad, 0, size * sizeof(float));

  const int32_t* const start = plan.column_start + (plan.samples > 1 ? column : column % columns);
  differentiate({task, plan.column_runs + start[0], plan.column_runs + start[1], column / columns, weights, weights_grad, features, features_grad});

  if (task.features_grad)
    as_type(task.feature_number, task.features_grad, [&](auto* to) {
      for (int64_t v = 0; v < plan.height; ++v) copy_row(features_grad + v * pitch, task.channels, to + (pixel + v * plan.width) * task.channels);
    });
  if (task.depth_grad && task.softmax) softmax_backward(weights, plan.bins, plan.height, weights_grad);
}

void backward(const VoxelPoolBackwardTask& task, int threads) {
  const PoolPlan& plan = task.plan;
  const int64_t size = plan.bins * plan.height;
  each_group(plan, task.batch, threads, [&](const Group& group) {
    const Scratch weights_grad(task.depth_grad ? group.count * size : 0);
    for (int64_t i = 0; i < group.count; ++i)
      differentiate_column(task, group.camera * plan.width + group.first + i, weights_grad.get() + i * size);
    if (task.depth_grad) write_depth_grad(task, group, weights_grad.get());
  });
}

}  // namespace

extern const PoolKernels kPoolKernels;
const PoolKernels kPoolKernels{forward, backward};

}  // namespace IRLVLA_ISA
}  // namespace irlvla
