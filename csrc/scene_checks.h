// What the preparation of scenes refuses, and how it says so.
#pragma once
#include "scene.h"

#include <cmath>
#include <sstream>
#include <stdexcept>

namespace irlvla {
namespace baseline {

enum Layer { kLane = 0, kIntersectionLayer = 1, kDrivableArea = 5, kConnector = 11, kCarpark = 15, kRoadblock = 17 };

template <class... Words> void require(bool good, const Words&... words) {
  if (good) return;
  std::ostringstream message;
  (message << ... << words);
  throw std::invalid_argument(message.str());
}

/// Times beyond 2^53 us have no exact double, headings beyond 1e6 no exact sine.
inline bool exact_time(int64_t time_us) { return time_us < kTimeLimit && time_us > -kTimeLimit; }
inline bool sane_heading(double heading) { return std::abs(heading) < 1e6; }

inline bool sane(const double* values, int64_t count) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good = good & (std::abs(values[i]) < kLimit);
  return good;
}

}  // namespace baseline
}  // namespace irlvla
