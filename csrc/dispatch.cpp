// Which instruction set runs: the best this machine has, chosen once, at first use.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "epdms.h"
#include "voxel_pool.h"

namespace irlvla {

namespace baseline {
extern const Kernels kKernels;
extern const PoolKernels kPoolKernels;
}  // namespace baseline
#ifdef __x86_64__
namespace avx2 {
extern const Kernels kKernels;
extern const PoolKernels kPoolKernels;
}  // namespace avx2
namespace avx512 {
extern const Kernels kKernels;
extern const PoolKernels kPoolKernels;
}  // namespace avx512
#endif

namespace {

struct InstructionSet {
  const Kernels& kernels;
  const PoolKernels& pool_kernels;
};

InstructionSet choose() {
  const char* wanted = std::getenv("IRLVLA_ISA");  // for tests and for comparing instruction sets
  const auto allowed = [&](const Kernels& k, bool runs) { return runs && (!wanted || std::strcmp(wanted, k.name) == 0); };
#ifdef __x86_64__
  __builtin_cpu_init();
  if (allowed(avx512::kKernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                                    __builtin_cpu_supports("avx512vl")))
    return {avx512::kKernels, avx512::kPoolKernels};
  if (allowed(avx2::kKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                                  __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return {avx2::kKernels, avx2::kPoolKernels};
#endif
  if (allowed(baseline::kKernels, true)) return {baseline::kKernels, baseline::kPoolKernels};
  throw std::invalid_argument(std::string("IRLVLA_ISA=") + wanted + " is not an instruction set that this build has and this machine runs");
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

}  // namespace

const Kernels& kernels() { return chosen().kernels; }
const PoolKernels& pool_kernels() { return chosen().pool_kernels; }

}  // namespace irlvla
