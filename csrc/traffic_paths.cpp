// The paths of vehicles in reactive traffic: their outlines, what each vehicle can reach, and who may come into whose way.
#include "traffic_scene.h"

#include <algorithm>
#include <cmath>

namespace irlvla {
namespace baseline {
namespace {

/// No vehicle gets farther within the horizon, its strip included: it gains at most 1 m/s each second.
double farthest(const Vehicle& v) { return v.progress + 4.0 * v.speed + 8.0 + v.length / 2.0 + kHeadway * (v.speed + 4.0) + 1.0; }

/// Marks the cells of a grid that come within some distance of a line, which is followed from one progress to another.
struct Marker {
  const PackedScene& head;
  std::vector<uint64_t>& cells;
  bool outside = false;  // some of it lies off the grid

  void mark(double x, double y, double radius, uint64_t bit) {
    const double gx = (x - head.watch_x) / kWatchCell, gy = (y - head.watch_y) / kWatchCell, r = radius / kWatchCell;
    if (gx + r < 0.0 || gy + r < 0.0 || gx - r >= kWatch || gy - r >= kWatch) {
      outside = true;
      return;
    }
    outside = outside || gx - r < 0.0 || gy - r < 0.0 || gx + r >= kWatch || gy + r >= kWatch;
    const int y0 = std::max(0, static_cast<int>(std::floor(gy - r))), y1 = std::min(kWatch - 1, static_cast<int>(std::floor(gy + r)));
    for (int row = y0; row <= y1; ++row) {
      const double dy = std::max(0.0, std::max(row - gy, gy - (row + 1))), half = std::sqrt(std::max(0.0, r * r - dy * dy));
      const int x0 = std::max(0, static_cast<int>(std::floor(gx - half))), x1 = std::min(kWatch - 1, static_cast<int>(std::floor(gx + half)));
      for (int column = x0; column <= x1; ++column) cells[row * kWatch + column] |= bit;
    }
  }

  void follow(const Path& path, double from, double to, double overhang, double radius, uint64_t bit) {
    constexpr double kPace = 0.3;
    const double start = path.at[0].progress, end = path.at[path.count - 1].progress;
    const double first = std::min(std::max(from, start), end), last = std::min(std::max(to, first), end);
    const int paces = static_cast<int>((last - first) / kPace) + 1;
    for (int i = 0; i <= paces; ++i) {
      const Pose<double> p = path.pose(first + (last - first) * i / paces);
      mark(p.x, p.y, radius + kPace / 2.0, bit);
    }
    for (double beyond = kPace; overhang > 0.0 && beyond < overhang + kPace; beyond += kPace) {
      const Pose<double> a = path.pose(first), b = path.pose(last);
      mark(a.x - beyond * std::cos(a.heading), a.y - beyond * std::sin(a.heading), radius + kPace / 2.0, bit);
      mark(b.x + beyond * std::cos(b.heading), b.y + beyond * std::sin(b.heading), radius + kPace / 2.0, bit);
    }
  }
};

struct Relations {
  PackedScene& head;
  TrafficArrays& out;

  void build() {
    head.reach = nothing();
    for (Vehicle& v : out.vehicles) {
      add_blocks(v);
      add_corners(v);
      bound(v);
      head.reach = both(head.reach, v.reach);
    }
    const size_t count = out.vehicles.size();
    head.vehicles = static_cast<int32_t>(count), head.standing = static_cast<int32_t>(out.standing.size());
    out.plain.resize(count * 2 * kSteps), out.stays.resize(out.standing.size());
    out.footprints.resize(count * kSteps), out.plain_met.resize(count * kSteps);
    keep_watch();
    add_meetings();
    for (const Standing& standing : out.standing)
      for (const Vehicle& v : out.vehicles) out.passages.push_back(passage(v, standing.box));
    int64_t room = 0, most = 0;
    for (const Vehicle& v : out.vehicles) {
      room += v.room;
      most = std::max<int64_t>(most, std::max(v.room, ring_room(v.path_count + 2, turning(v, 0, v.path_count))));
    }
    head.corridor_room = static_cast<int32_t>(most);
    head.world_bytes = World::bytes(head.vehicles, head.standing, room + most);
  }

  Path path_of(const Vehicle& v) const { return {out.path.data() + v.path, v.path_count, out.corner_x.data(), out.corner_y.data()}; }

  void add_blocks(Vehicle& v) {
    const PathPoint* p = out.path.data() + v.path;
    v.blocks = static_cast<int32_t>(out.path_blocks.size());
    for (int k = 0; k + 1 < v.path_count; ++k) {
      if (k % kBlock == 0) out.path_blocks.push_back(nothing());
      include(out.path_blocks.back(), p[k].x, p[k].y);
      include(out.path_blocks.back(), p[k + 1].x, p[k + 1].y);
    }
  }

  /// The outline of the whole path, but for its ends: the left side, then the right on the way back.
  void add_corners(const Vehicle& v) {
    PathPoint* p = out.path.data() + v.path;
    const int last = v.path_count - 1;
    for (int k = 0; k < last; ++k) {
      const Across a = across(p[k].x, p[k].y, p[k + 1].x, p[k + 1].y, v.width / 2.0);
      p[k].across_x = a.x, p[k].across_y = a.y;
    }
    const Path path = path_of(v);
    const Part whole = path.vertices(0, v.path_count);
    std::vector<double> x(ring_room(v.path_count, turning(v, 0, v.path_count))), y(x.size());
    const int32_t begin = static_cast<int32_t>(out.corner_x.size());
    Ring left{x.data(), y.data(), 0, nothing()};
    p[0].left = begin;
    for (int k = 1; k <= last; ++k) {
      p[k].left = begin + left.size;
      if (k < last) Outline{left, v.width / 2.0}.left(joint_at(path, whole, k, {}, {}));
    }
    keep(left);
    Ring right{x.data(), y.data(), 0, nothing()};
    p[last].right = begin + left.size;
    for (int k = last - 1; k >= 0; --k) {
      p[k].right = begin + left.size + right.size;
      if (k > 0) Outline{right, v.width / 2.0}.right(joint_at(path, whole, k, {}, {}));
    }
    keep(right);
  }

  void keep(const Ring& side) {
    out.corner_x.insert(out.corner_x.end(), side.x, side.x + side.size);
    out.corner_y.insert(out.corner_y.end(), side.y, side.y + side.size);
  }

  double turning(const Vehicle& v, int first, int last) const {
    double sum = 0.0;
    for (int k = first + 1; k < last; ++k) sum += std::abs(out.path[v.path + k].heading - out.path[v.path + k - 1].heading);
    return sum;
  }

  /// How far a box, which does not bend with the path, strays from it.
  double aslant(const Vehicle& v) const { return v.length / 2.0 * std::min(1.0, sharpest(v)); }

  /// Largest turning within a length of the vehicle.
  double sharpest(const Vehicle& v) const {
    double most = 0.0;
    const PathPoint* p = out.path.data() + v.path;
    for (int k = v.first, end = k; k < v.last; ++k) {
      while (end < v.last && p[end].progress < p[k + 1].progress + v.length) ++end;
      double sum = 0.0;
      for (int j = k + 1; j <= end; ++j) sum += std::abs(p[j].heading - p[j - 1].heading);
      most = std::max(most, sum);
    }
    return most;
  }

  /// What the vehicle can occupy: it gains at most 1 m/s each second.
  void bound(Vehicle& v) const {
    const Path own = path_of(v);
    const double far = farthest(v);
    const int first = std::max(0, own.lower(v.progress - v.length) - 2), last = std::min(v.path_count, own.upper(far) + 2);
    v.first = first, v.last = last - 1;
    v.room = ring_room(last - first + 2, turning(v, first, last)) + 4;  // and its box
    v.reach = v.corridor = nothing();
    for (int k = 0; k < 4; ++k) include(v.reach, v.box.x[k], v.box.y[k]);
    for (int k = first; k < last; ++k) include(v.reach, own.at[k].x, own.at[k].y);
    for (int k = first; k < v.path_count; ++k) include(v.corridor, own.at[k].x, own.at[k].y);
    const double margin = std::hypot(v.length, v.width) / 2.0 + 0.1;
    v.reach = {v.reach.x0 - margin, v.reach.y0 - margin, v.reach.x1 + margin, v.reach.y1 + margin};
    v.corridor = {v.corridor.x0 - margin, v.corridor.y0 - margin, v.corridor.x1 + margin, v.corridor.y1 + margin};
  }

  /// Where the ego can get into the way of a vehicle, and which vehicles can.
  void keep_watch() {
    const double ahead = std::min(2.0 * std::max(head.ego.vx, 0.0), 32.0);
    head.watch_x = head.origin_x + ahead * std::cos(head.ego.heading) - kWatch * kWatchCell / 2.0;
    head.watch_y = head.origin_y + ahead * std::sin(head.ego.heading) - kWatch * kWatchCell / 2.0;
    out.watch.assign(kWatch * kWatch, 0), out.watch_discs.assign(kWatch * kWatch, 0);
    std::vector<uint64_t> reached(kWatch * kWatch, 0);
    std::vector<char> corridor_out(out.vehicles.size()), reach_out(out.vehicles.size());
    for (size_t v = 0; v < out.vehicles.size(); ++v) {
      const Vehicle& own = out.vehicles[v];
      const uint64_t bit = uint64_t{1} << (v & 63);
      const Path path = path_of(own);
      Marker corridor{head, out.watch}, discs{head, out.watch_discs}, reach{head, reached};
      const double behind = path.count > 1 ? path.at[path.count - 2].progress : own.progress;  // at its end a vehicle sees the last piece
      corridor.follow(path, std::min(own.progress, behind), kInfinity, 0.0, own.width / 2.0 + 0.05, bit);
      discs.follow(path, std::min(own.progress, behind), kInfinity, 0.0, own.width / 2.0 + 0.05 + kDisc, bit);
      reach.follow(path, own.progress - own.length / 2.0, farthest(own), own.length / 2.0 + 0.5, own.width / 2.0 + aslant(own) + 0.1, bit);
      corridor_out[v] = corridor.outside, reach_out[v] = reach.outside;
    }
    add_neighbours(reached, corridor_out, reach_out);
  }

  /// Bits of the vehicles that may come into each other's way: their marks meet, or their bounds where marks end.
  void add_neighbours(const std::vector<uint64_t>& reached, const std::vector<char>& corridor_out, const std::vector<char>& reach_out) {
    for (size_t cell = 0; cell < out.watch.size(); ++cell) {
      if (!reached[cell]) continue;
      for (uint64_t bits = out.watch[cell]; bits; bits &= bits - 1)
        for (size_t v = lowest_bit(bits); v < out.vehicles.size(); v += 64) out.vehicles[v].near |= reached[cell];
    }
    for (size_t v = 0; v < out.vehicles.size(); ++v)
      for (size_t u = 0; u < out.vehicles.size(); ++u)
        if (corridor_out[v] && reach_out[u] && meets(out.vehicles[v].corridor, out.vehicles[u].reach)) out.vehicles[v].near |= bit_of(static_cast<int>(u));
    for (size_t v = 0; v < out.vehicles.size(); ++v)
      for (size_t u = 0; u < out.vehicles.size(); ++u)
        if (may_meet(out.vehicles[v], static_cast<int>(u))) out.vehicles[u].felt |= bit_of(static_cast<int>(v));
  }

  // --- meetings -----------------------------------------------------------------------------------------------------

  void add_meetings() {
    const size_t count = out.vehicles.size();
    out.meeting_of.assign(count * count, -1);
    for (size_t v = 0; v < count; ++v) {
      const bool simple = is_simple(out.vehicles[v]);
      for (size_t u = 0; u < count; ++u) {
        if (u == v || !may_meet(out.vehicles[v], static_cast<int>(u))) continue;
        out.meeting_of[v * count + u] = static_cast<int32_t>(out.meetings.size());
        add_meetings(out.vehicles[v], out.vehicles[u], simple);
      }
    }
  }

  /// Whether the pieces of a path are so long for its turns that its outline never runs backwards.
  bool is_simple(const Vehicle& v) const {
    const PathPoint* p = out.path.data() + v.path;
    double before = 0.0;  // what the turn behind takes of a piece
    for (int k = 0; k + 1 < v.path_count; ++k) {
      const double turn = k + 2 < v.path_count ? std::abs(p[k + 1].heading - p[k].heading) : 0.0;
      const double after = turn < 1.0 ? v.width / 2.0 * std::tan(turn / 2.0) : kInfinity;
      if (!(before + after < 0.9 * (p[k + 1].progress - p[k].progress))) return false;
      before = after;
    }
    return true;
  }

  void add_meetings(const Vehicle& v, const Vehicle& u, bool simple) {
    const double reach = v.width / 2.0 + u.width / 2.0 + aslant(u) + 0.05;  // a box does not bend with the path
    std::vector<int> near;
    for (int k = u.first; k < u.last; ++k) {
      find_near(v, piece(u, k), reach, near);
      out.meetings.push_back({last_near(v, piece(u, k), reach, near), simple ? sure_within(v, piece(u, k), near) : -3e38f, k});
    }
    const double least = std::min(v.progress, out.path[v.path + v.path_count - 2].progress);  // at its end a vehicle sees the last piece
    int32_t next = u.last;
    for (int k = u.last - 1, i = static_cast<int>(out.meetings.size()) - 1; k >= u.first; --k, --i) {
      if (static_cast<double>(out.meetings[i].last) >= least) next = k;
      out.meetings[i].next = next;
    }
  }

  Edge piece(const Vehicle& v, int k) const {
    const PathPoint* p = out.path.data() + v.path + k;
    return {p[0].x, p[0].y, p[1].x, p[1].y};
  }

  /// A box strays no farther from the path that it spans than its half width and `aslant`, but for the ends of the path.
  Passage passage(const Vehicle& v, Corners box) const {
    const Ring ring = ring_of(box);
    const double half = v.length / 2.0, beside = v.width / 2.0 + aslant(v) + 0.05, around = std::hypot(half, v.width / 2.0) + 0.05;
    Passage found{kInfinity, -kInfinity};
    for (int k = v.first; k <= v.last && k + 1 < v.path_count; ++k) {
      const Edge e = piece(v, k);
      const double gap = gap2(bounds_of(e), ring.bounds);
      const bool at_end = k == 0 || k + 2 == v.path_count;
      bool near = at_end && gap <= around * around;
      if (gap <= beside * beside && !near) {
        near = ring.bounds.contains(e.x0, e.y0);
        for (int i = 0; i < 4 && !near; ++i) near = edges_near(e, edge_of(ring, i), beside);
      }
      if (!near) continue;
      const PathPoint* p = out.path.data() + v.path + k;
      found.from = std::min(found.from, p[0].progress - half - 0.01), found.to = std::max(found.to, p[1].progress + half + 0.01);
    }
    return found;
  }

  static bool edges_near(const Edge& e, const Edge& f, double reach) {
    return edges_distance(e, f) <= reach || segments_touch(e.x0, e.y0, e.x1, e.y1, f.x0, f.y0, f.x1, f.y1);
  }

  /// Pieces of v's path ahead within reach of an edge.
  void find_near(const Vehicle& v, const Edge& e, double reach, std::vector<int>& near) const {
    near.clear();
    const Bounds around = bounds_of(e);
    for (int k = v.first; k + 1 < v.path_count; ++k) {
      const Edge f = piece(v, k);
      if (gap2(bounds_of(f), around) > reach * reach) continue;
      if (edges_near(e, f, reach)) near.push_back(k);
    }
  }

  /// The farthest progress of v that may come within reach of an edge.
  float last_near(const Vehicle& v, const Edge& e, double reach, const std::vector<int>& near) const {
    if (near.empty()) return -3e38f;
    const int k = near.back();
    const Edge f = piece(v, k);
    const double size = length(f), along = std::max(segment_fraction(f, e.x0, e.y0), segment_fraction(f, e.x1, e.y1)) * size + reach;
    return static_cast<float>(out.path[v.path + k].progress + std::min(along, size) + 0.01);
  }

  /// The progress of v up to which all of an edge lies within its corridor, well away from the corridor's ends.
  float sure_within(const Vehicle& v, const Edge& e, const std::vector<int>& near) const {
    constexpr double kPace = 0.25;
    const PathPoint* p = out.path.data() + v.path;
    const int paces = static_cast<int>(length(e) / kPace) + 1;
    double sure = p[v.path_count - 1].progress - 1.0;
    for (int i = 0; i <= paces; ++i) {
      const double x = e.x0 + (e.x1 - e.x0) * i / paces, y = e.y0 + (e.y1 - e.y0) * i / paces;
      double least = 0.9 * v.width / 2.0 - kPace, progress = -kInfinity;
      for (const int k : near) {
        const Edge f = piece(v, k);
        const double distance = segment_distance(f, x, y);
        if (distance < least) least = distance, progress = p[k].progress + segment_fraction(f, x, y) * length(f);
      }
      if (progress > p[v.path_count - 1].progress - 1.0) return -3e38f;
      sure = std::min(sure, progress - v.width - 0.5);
    }
    return sure > -3e38 ? static_cast<float>(sure - 0.01) : -3e38f;
  }
};

}  // namespace

void relate_vehicles(PackedScene& head, TrafficArrays& traffic) { Relations{head, traffic}.build(); }

}  // namespace baseline
}  // namespace irlvla
