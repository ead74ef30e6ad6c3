#include "painting.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"

namespace irlvla {
namespace {

/// Collects the edges of a shape. Per row it keeps how the covered area changes from pixel to pixel; the running sum over
/// the row is then the area itself (the accumulation buffer of font renderers).
class Coverage {
 public:
  Coverage(int height, int width)
      : height_(height), width_(width), stride_(width + 2), change_(static_cast<size_t>(height) * stride_), spans_(height, Span{stride_, -1}) {}

  void add_ring(const double* points, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const double *a = points + 2 * i, *b = points + 2 * (i + 1 == count ? 0 : i + 1);
      add_edge(a[0] + 0.5, a[1] + 0.5, b[0] + 0.5, b[1] + 0.5);
    }
  }

  /// Hands over what the shape covers, and forgets it: `varied(y, first, last, shares)` for a few pixels with a share each,
  /// `even(y, first, last, share)` for a run of pixels with the same.
  template <class Varied, class Even> void take(Varied&& varied, Even&& even) {
    for (int y = top_; y < bottom_; ++y) {
      const Span span = spans_[y];
      if (span.last < 0) continue;
      spans_[y] = {stride_, -1};
      float* change = &change_[static_cast<size_t>(y) * stride_];
      const int touched = std::min(span.last + 1, width_);
      float area = 0.0f;
      int done = span.first;
      const auto share = [&] { return std::min(std::fabs(area), 1.0f); };
      for (int x = span.first; x < touched; x += kBlock) {
        if (x + kBlock <= touched && is_even(change + x)) continue;
        if (done < x && share() > kNothing) even(y, done, x, share());
        done = std::min(x + kBlock, touched);
        float shares[kBlock];
        for (int i = x; i < done; ++i) area += change[i], shares[i - x] = share();
        std::fill(change + x, change + done, 0.0f);
        varied(y, x, done, shares);
      }
      change[width_] = change[width_ + 1] = 0.0f;
      if (share() > kNothing) even(y, done, width_, share());  // the shape goes on beyond the border
    }
    top_ = height_, bottom_ = 0;
  }

 private:
  static constexpr int kBlock = 16;
  static constexpr float kNothing = 1e-4f;  // rounding leaves less

  /// The next pixels are covered as much as the last one.
  static bool is_even(const float* change) {
    uint64_t bits[kBlock / 2], any = 0;
    std::memcpy(bits, change, sizeof(bits));
    for (const uint64_t pair : bits) any |= pair;
    return any == 0;
  }

  struct Span {
    int first, last;
  };

  void add_edge(double x0, double y0, double x1, double y1) {
    const float direction = y0 < y1 ? 1.0f : -1.0f;
    if (y0 > y1) std::swap(x0, x1), std::swap(y0, y1);
    const double from = std::max(y0, 0.0), to = std::min(y1, static_cast<double>(height_));
    if (!(from < to)) return;
    const double slope = (x1 - x0) / (y1 - y0);
    // Left of the image an edge counts as if it stood at the border; right of it, not at all. So cut it at both borders.
    const auto cut = [&](double x) { return slope == 0.0 ? from : std::clamp(y0 + (x - x0) / slope, from, to); };
    const double a = cut(0.0), b = cut(width_);
    const double cuts[4] = {from, std::min(a, b), std::max(a, b), to};
    for (int i = 0; i < 3; ++i) add_piece(x0 - slope * y0, slope, cuts[i], cuts[i + 1], direction);
    top_ = std::min(top_, static_cast<int>(from));
    bottom_ = std::max(bottom_, std::min(static_cast<int>(to) + 1, height_));
  }

  /// A piece that crosses no border: x = offset + slope * y for y in from ... to.
  void add_piece(double offset, double slope, double from, double to, float direction) {
    const double middle = offset + slope * 0.5 * (from + to);
    if (!(from < to) || middle >= width_) return;
    for (int y = static_cast<int>(from); y < height_ && y < to; ++y) {
      const double upper = std::max(from, static_cast<double>(y)), lower = std::min(to, y + 1.0);
      const double xa = middle <= 0.0 ? 0.0 : std::clamp(offset + slope * upper, 0.0, static_cast<double>(width_));
      const double xb = middle <= 0.0 ? 0.0 : std::clamp(offset + slope * lower, 0.0, static_cast<double>(width_));
      add_row(y, static_cast<float>(std::min(xa, xb)), static_cast<float>(std::max(xa, xb)), direction * static_cast<float>(lower - upper));
    }
  }

  /// Within row y the edge goes from left to right over `height` rows: how much less each pixel right of it is covered.
  void add_row(int y, float left, float right, float height) {
    float* change = &change_[static_cast<size_t>(y) * stride_];
    const int first = static_cast<int>(left), beyond = static_cast<int>(right);
    const int last = beyond > first && static_cast<float>(beyond) == right ? beyond - 1 : beyond;
    spans_[y].first = std::min(spans_[y].first, first);
    spans_[y].last = std::max(spans_[y].last, last + 1);
    if (first == last) {
      const float beside = 0.5f * (left + right) - first;
      change[first] += height * (1.0f - beside);
      change[first + 1] += height * beside;
      return;
    }
    const float per_pixel = height / (right - left);
    const float enters = first + 1 - left, leaves = right - last;
    float before = 0.5f * per_pixel * enters * enters;  // area of the pixel at hand that lies right of the edge
    change[first] += before;
    float reached = per_pixel * enters;  // rows that the edge has covered when it leaves a pixel
    for (int x = first + 1; x < last; ++x) {
      const float area = reached + 0.5f * per_pixel;
      change[x] += area - before;
      before = area;
      reached += per_pixel;
    }
    const float area = height - 0.5f * per_pixel * leaves * leaves;
    change[last] += area - before;
    change[last + 1] += height - area;
  }

  int height_, width_, stride_;
  std::vector<float> change_;
  std::vector<Span> spans_;
  int top_ = height_, bottom_ = 0;
};

void to_floats(const uint8_t* __restrict bytes, float* __restrict floats, size_t count) {
  for (size_t i = 0; i < count; ++i) floats[i] = bytes[i];
}

void to_bytes(const float* __restrict floats, uint8_t* __restrict bytes, size_t count) {
  for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(static_cast<int>(floats[i] + 0.5f));
}

void paint_image(const PaintTask& task, int64_t image) {
  const size_t plane = static_cast<size_t>(task.height) * task.width;
  uint8_t* pixels = task.pixels + image * 3 * plane;
  const std::unique_ptr<float[]> canvas(new float[3 * plane]);
  to_floats(pixels, canvas.get(), 3 * plane);
  Coverage coverage(task.height, task.width);
  for (int64_t shape = task.image_offsets[image]; shape < task.image_offsets[image + 1]; ++shape) {
    for (int64_t ring = task.shape_offsets[shape]; ring < task.shape_offsets[shape + 1]; ++ring) {
      const int64_t first = task.ring_offsets[ring];
      coverage.add_ring(task.points + 2 * first, task.ring_offsets[ring + 1] - first);
    }
    const float *colour = task.colours + 4 * shape, opacity = colour[3];
    const auto row = [&](int channel, int y) { return &canvas[channel * plane + static_cast<size_t>(y) * task.width]; };
    coverage.take(
        [&](int y, int first, int last, const float* shares) {
          for (int channel = 0; channel < 3; ++channel) {
            float* values = row(channel, y);
            for (int x = first; x < last; ++x) values[x] += opacity * shares[x - first] * (colour[channel] - values[x]);
          }
        },
        [&](int y, int first, int last, float share) {
          const float kept = 1.0f - opacity * share;
          for (int channel = 0; channel < 3; ++channel) {
            float *values = row(channel, y), added = opacity * share * colour[channel];
            for (int x = first; x < last; ++x) values[x] = added + kept * values[x];
          }
        });
  }
  to_bytes(canvas.get(), pixels, 3 * plane);
}

}  // namespace

void paint(const PaintTask& task, int threads) {
  parallel_for(task.images, threads, [&](int64_t image) { paint_image(task, image); });
}

}  // namespace irlvla
