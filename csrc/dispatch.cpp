// Which instruction set runs: the best this machine has, chosen once, at first use.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "epdms.h"

namespace irlvla {

namespace baseline {
extern const Kernels kKernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("IRLVLA_ISA");  // for tests and for comparing instruction sets
  const auto allowed = [&](const Kernels& k, bool runs) { return runs && (!wanted || std::strcmp(wanted, k.name) == 0); };
#ifdef __x86_64__
  __builtin_cpu_init();
  if (allowed(avx512::kKernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                                    __builtin_cpu_supports("avx512vl")))
    return avx512::kKernels;
  if (allowed(avx2::kKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")))
    return avx2::kKernels;
#endif
  if (allowed(baseline::kKernels, true)) return baseline::kKernels;
  throw std::invalid_argument(std::string("IRLVLA_ISA=") + wanted + " is not an instruction set that this build has and this machine runs");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace irlvla
