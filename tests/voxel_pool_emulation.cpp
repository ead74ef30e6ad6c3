// Runs voxel pooling as on a GPU. Arguments: a file with a task (what test_voxel_pool_cuda.py writes), and one for its outputs.
#include "cuda_emulation.h"

#include "../csrc/voxel_pool.cu"
#include "../csrc/voxel_pool_backward.cu"

using namespace irlvla;

namespace {

std::FILE* opened(const char* name, const char* mode) {
  std::FILE* file = std::fopen(name, mode);
  if (!file) emulation::fail("a file cannot be opened");
  return file;
}

/// Bytes that begin `shift` bytes after an aligned address; none at all if their size is negative.
struct Buffer {
  Buffer(std::FILE* file, int64_t shift) : shift(shift) {
    if (std::fread(&size, sizeof size, 1, file) != 1) emulation::fail("the file ends early");
    if (size < 0) return;
    memory.reset(new char[shift + size]);
    if (std::fread(get(), 1, size, file) != static_cast<size_t>(size)) emulation::fail("the file ends early");
  }
  char* get() const { return memory ? memory.get() + shift : nullptr; }
  int64_t size, shift;
  std::unique_ptr<char[]> memory;
};

/// The products by pixel column whatever the number of cells, which decides otherwise.
const char* pool_by_column(const VoxelPoolTask& task) {
  using namespace device;
  if (const char* problem = task.weights == task.depth ? nullptr : prepare(task, nullptr)) return problem;
  return with_type(task.feature_number, [&](auto* feature) {
    return with_type(task.weight_number, [&](auto* weight) -> const char* {
      using F = std::remove_pointer_t<decltype(feature)>;
      using W = std::remove_pointer_t<decltype(weight)>;
      if constexpr (sizeof(F) == 2 && (sizeof(W) == 4 || kNumber<F> == kNumber<W>))
        return launch_columns<F, W>(task, nullptr);
      return "no matrix products of these types";
    });
  });
}

}  // namespace

int main(int, char** arguments) {
  std::FILE* file = opened(arguments[1], "rb");
  int64_t n[21];
  if (std::fread(n, sizeof n, 1, file) != 1) emulation::fail("the file ends early");
  const auto [kind, order, shift, softmax] = std::array{n[0], n[1], n[2], n[3]};
  emulation::order = static_cast<int>(order);
  std::vector<Buffer> buffers;
  for (size_t i = 0; i < (kind == 2 ? 11 : 9); ++i) buffers.emplace_back(file, i < 5 ? 0 : shift);
  std::fclose(file);
  const auto table = [&](int i) { return reinterpret_cast<const int32_t*>(buffers[i].get()); };
  const auto number = [&](int i) { return static_cast<Number>(n[i]); };
  const PoolPlan plan = {n[6],     n[7],     n[8], n[9], n[10], n[11], table(0), table(1), reinterpret_cast<const CellRun*>(table(2)),
                         table(3), reinterpret_cast<const ColumnRun*>(table(4))};
  const DepthStrides strides = {n[16], n[17], n[18], n[19]};
  const char* problem = nullptr;
  if (kind == 2) {
    problem = cuda::voxel_pool_backward({plan, n[4], n[5], number(12), number(13), number(14), number(15), buffers[5].get(), buffers[6].get(),
                                         buffers[7].get(), buffers[8].get(), strides, softmax != 0, buffers[9].get(), buffers[10].get()},
                                        nullptr);
  } else {
    char* weights = n[20] ? buffers[6].get() : buffers[7].get();
    const VoxelPoolTask task = {plan,       n[4],    n[5],         number(12), number(13),        number(14), number(15), buffers[5].get(),
                                buffers[6].get(), strides, softmax != 0, weights,    buffers[8].get()};
    problem = kind == 1 ? pool_by_column(task) : cuda::voxel_pool(task, nullptr);
  }
  if (problem) emulation::fail(problem);
  file = opened(arguments[2], "wb");
  for (size_t i = buffers.size() - 2; i < buffers.size(); ++i) {
    if (buffers[i].get()) std::fwrite(buffers[i].get(), 1, buffers[i].size, file);
  }
  std::fclose(file);
}
