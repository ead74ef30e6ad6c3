// Coloured polygons over images, without samples: each pixel takes the share of its area that a polygon covers.
#pragma once
#include <cstdint>

namespace irlvla {

/// N images and what is painted over each, one shape after the other. A shape is a set of rings of one colour; what it covers
/// of a pixel is the absolute sum of their signed areas in it, at most all of it. Centres of pixels are integers.
struct PaintTask {
  int64_t images;
  int height, width;
  uint8_t* pixels;               // N 3 H W
  const int64_t* image_offsets;  // N + 1: shapes of an image
  const float* colours;          // shapes x 4: red, green, blue in 0 ... 255, opacity in 0 ... 1
  const int64_t* shape_offsets;  // rings of a shape
  const int64_t* ring_offsets;   // points of a ring
  const double* points;          // u v
};

void paint(const PaintTask& task, int threads);

}  // namespace irlvla
