// The sub-metrics of one simulated candidate on the map and among others. Inline, host and device. Rule sources are files
// of the NAVSIM v2.2 devkit (pdm_scorer.py unless said); what looks odd in a rule is part of the official score.
#pragma once
#include "comfort.h"

namespace irlvla {
namespace IRLVLA_ISA {

// --- the candidate's box over time ----------------------------------------------------------------------------------

constexpr int kOffsets = 4;  // TTC looks 0, 3, 6 and 9 steps ahead (arange(0, 10, 3))
constexpr int kTtcSteps = 32;

struct Track {
  double x[kSteps], y[kSteps], cosine[kSteps], sine[kSteps], speed[kSteps];
  double centre_x[kSteps], centre_y[kSteps], corner_x[4][kSteps], corner_y[4][kSteps];
  Envelope envelope[kOffsets];  // of the box as it stands, and moved on by 0.3, 0.6, 0.9 s
  float x0, x1, y0, y1;         // of all of them
};

/// Float interval that surely holds [low, high].
IRLVLA_HD void outward(double low, double high, float& a, float& b) {
  a = static_cast<float>(low - (1e-3 + 2.4e-7 * absolute(low)));
  b = static_cast<float>(high + (1e-3 + 2.4e-7 * absolute(high)));
}

/// Derived positions of step t, from x, y, sine, cosine and speed; `ls`, `lc` are sine and cosine of heading + pi/2.
IRLVLA_HD void place(const PackedScene& scene, Track& track, int t, double ls, double lc) {
  const double c = track.cosine[t], s = track.sine[t];
  const double cx = track.x[t] + kRearToCentre * c, cy = track.y[t] + kRearToCentre * s;
  track.centre_x[t] = cx, track.centre_y[t] = cy;
  for (int k = 0; k < 4; ++k) {
    const double lon = (k == 0 || k == 3) ? kHalfLength : -kHalfLength, lat = k < 2 ? kHalfWidth : -kHalfWidth;
    corner(cx, cy, c, s, lc, ls, lon, lat, track.corner_x[k][t], track.corner_y[k][t]);
  }
  const double ex = absolute(c) * kHalfLength + absolute(s) * kHalfWidth, ey = absolute(s) * kHalfLength + absolute(c) * kHalfWidth;
  for (int i = 0; i < kOffsets; ++i) {
    const double ahead = i * 3 * kStep;
    const double px = cx + c * track.speed[t] * ahead - scene.origin_x, py = cy + s * track.speed[t] * ahead - scene.origin_y;
    Envelope& e = track.envelope[i];
    outward(px - ex, px + ex, e.x0[t], e.x1[t]);
    outward(py - ey, py + ey, e.y0[t], e.y1[t]);
  }
}

/// The threads that share a candidate: one on the CPU, a warp on a GPU.
struct Alone {
  static constexpr int size = 1;
  IRLVLA_HD int rank() const { return 0; }
  IRLVLA_HD void wait() const {}
  IRLVLA_HD uint64_t either(uint64_t bits) const { return bits; }
  IRLVLA_HD uint64_t least(uint64_t value) const { return value; }
  IRLVLA_HD float least(float value) const { return value; }
};

/// Bounds of all envelopes; steps beyond the last are emptied.
template <class Group> IRLVLA_HD void enclose(Track& track, const Group& group) {
  float x0 = 3e38f, x1 = -3e38f, y0 = 3e38f, y1 = -3e38f;
  for (int i = 0; i < kOffsets; ++i) {
    Envelope& e = track.envelope[i];
    for (int t = group.rank(); t < kSteps; t += Group::size) {
      x0 = e.x0[t] < x0 ? e.x0[t] : x0, x1 = e.x1[t] > x1 ? e.x1[t] : x1;
      y0 = e.y0[t] < y0 ? e.y0[t] : y0, y1 = e.y1[t] > y1 ? e.y1[t] : y1;
    }
    for (int t = kSteps + group.rank(); t < kFrames; t += Group::size) e.x0[t] = e.y0[t] = 3e38f, e.x1[t] = e.y1[t] = -3e38f;
  }
  x0 = group.least(x0), x1 = -group.least(-x1), y0 = group.least(y0), y1 = -group.least(-y1);
  if (group.rank() == 0) track.x0 = x0, track.x1 = x1, track.y0 = y0, track.y1 = y1;
}

IRLVLA_HD Corners corners_at(const Track& track, int t, double dx = 0.0, double dy = 0.0) {
  Corners c;
  for (int k = 0; k < 4; ++k) c.x[k] = track.corner_x[k][t] + dx, c.y[k] = track.corner_y[k][t] + dy;
  return c;
}

// --- areas ----------------------------------------------------------------------------------------------------------

/// Whether a point of a cell lies strictly inside a polygon that has edges there.
IRLVLA_HD bool inside(const PackedScene& scene, const Border& border, double wx, double wy, double px, double py) {
  const Edge* edges = scene.at(scene.edges);
  if (border.witness == kAskPolygon) {
    const Polygon& polygon = scene.at(scene.polygon)[border.polygon];
    return locate(edges + polygon.edge_begin, polygon.edge_count, px, py) > 0;
  }
  const uint32_t* near = scene.at(scene.near_edges) + border.edges;
  bool in = border.witness == kInside;
  for (uint32_t i = 0; i < border.n_edges; ++i) {
    const Edge& e = edges[near[i] >> 1];
    const int side = orientation(e.x0, e.y0, e.x1, e.y1, px, py);
    if (side == 0 && within_bounds(e.x0, e.y0, e.x1, e.y1, px, py)) return false;  // on the boundary
    if ((side > 0) == ((near[i] & 1) != 0)) continue;
    in ^= (orientation(px, py, wx, wy, e.x0, e.y0) > 0) != (orientation(px, py, wx, wy, e.x1, e.y1) > 0);
  }
  return in;
}

/// Flags of the polygons around a point, and, where asked, the lanes it lies in (bits) and its cell.
IRLVLA_HD uint32_t areas_at(const PackedScene& scene, double px, double py, uint64_t* lanes, const Cell** cell = nullptr) {
  const double gx = px - scene.grid_x, gy = py - scene.grid_y;
  const Polygon* polygons = scene.at(scene.polygon);
  uint32_t flags = 0;
  if (gx >= 0.0 && gx < scene.columns * kCell && gy >= 0.0 && gy < scene.rows * kCell) {
    const int column = static_cast<int>(gx / kCell), row = static_cast<int>(gy / kCell);
    const uint32_t record = scene.at(scene.grid)[row * scene.columns + column];
    const Cell& c = scene.at(scene.cells)[record];
    flags = c.flags;
    if (cell) *cell = &c;
    if (lanes)
      for (int w = 0; w < scene.lane_words; ++w) lanes[w] = scene.at(scene.lanes)[record * scene.lane_words + w];
    if (c.n_borders == 0) return flags;
    double wx, wy;
    witness(scene, column, row, wx, wy);
    const Border* borders = scene.at(scene.borders) + c.borders;
    for (uint32_t i = 0; i < c.n_borders; ++i) {
      const Polygon& polygon = polygons[borders[i].polygon];
      const bool asked = (polygon.flags & ~flags) != 0 || (lanes && polygon.lane >= 0);
      if (!asked || !inside(scene, borders[i], wx, wy, px, py)) continue;
      flags |= polygon.flags;
      if (lanes && polygon.lane >= 0) lanes[polygon.lane >> 6] |= uint64_t{1} << (polygon.lane & 63);
    }
    return flags;
  }
  if (cell) *cell = nullptr;
  if (lanes)
    for (int w = 0; w < scene.lane_words; ++w) lanes[w] = 0;
  if (!scene.map.contains(px, py)) return 0;
  const Edge* edges = scene.at(scene.edges);
  for (int p = 0; p < scene.polygons; ++p) {
    if (!polygons[p].bounds.contains(px, py) || locate(edges + polygons[p].edge_begin, polygons[p].edge_count, px, py) <= 0) continue;
    flags |= polygons[p].flags;
    if (lanes && polygons[p].lane >= 0) lanes[polygons[p].lane >> 6] |= uint64_t{1} << (polygons[p].lane & 63);
  }
  return flags;
}

constexpr uint32_t kMultipleLanes = 1, kOffRoad = 2, kOffRoute = 4, kInIntersection = 8, kOffCentre = 16;

/// Lane keeping asks only whether some segment of the centreline is within 0.5 m.
IRLVLA_HD bool off_centre(const PackedScene& scene, const Cell* cell, double px, double py) {
  const Edge* line = scene.at(scene.line);
  if (cell) {
    const uint32_t* near = scene.at(scene.near_lines) + cell->line;
    for (uint32_t i = 0; i < cell->n_line; ++i)
      if (!(segment_distance(line[near[i]], px, py) > 0.5)) return false;
    return true;
  }
  const Bounds* blocks = scene.at(scene.line_blocks);
  for (int b = 0; b * kBlock < scene.segments; ++b) {
    if (blocks[b].distance2(px, py) > 0.26) continue;
    for (int i = b * kBlock; i < scene.segments && i < (b + 1) * kBlock; ++i)
      if (!(segment_distance(line[i], px, py) > 0.5)) return false;
  }
  return true;
}

/// Area bits of step t (_calculate_ego_area): in several lanes and wholly in none; a corner in no drivable polygon (a
/// corner on a shared edge is in neither); the centre in no lane of the route.
IRLVLA_HD uint32_t areas(const PackedScene& scene, const Track& track, int t) {
  uint64_t some[kMaxLaneWords], every[kMaxLaneWords], lanes[kMaxLaneWords];
  const int words = scene.lane_words;
  uint32_t drivable = kDrivable;
  for (int k = 0; k < 4; ++k) {
    drivable &= areas_at(scene, track.corner_x[k][t], track.corner_y[k][t], lanes);
    for (int w = 0; w < words; ++w) {
      some[w] = k ? some[w] | lanes[w] : lanes[w];
      every[w] = k ? every[w] & lanes[w] : lanes[w];
    }
  }
  int touched = 0;
  bool in_one = false;
  for (int w = 0; w < words; ++w) {
    for (uint64_t bits = some[w]; bits && touched < 2; bits &= bits - 1) ++touched;
    in_one = in_one || every[w];
  }
  const Cell* cell = nullptr;
  const uint32_t centre = areas_at(scene, track.centre_x[t], track.centre_y[t], nullptr, &cell);
  uint32_t bits = (touched > 1 && !in_one ? kMultipleLanes : 0u) | (drivable ? 0u : kOffRoad) | (centre & kRoute ? 0u : kOffRoute);
  if (centre & kIntersection) return bits | kInIntersection;  // lane keeping does not ask there
  return bits | (off_centre(scene, cell, track.centre_x[t], track.centre_y[t]) ? kOffCentre : 0u);
}

/// Area bits of all steps, as masks over time.
struct Areas {
  uint64_t multiple_lanes, off_road, off_route, in_intersection, off_centre;
};

// --- collisions and time to collision -------------------------------------------------------------------------------

/// Steps at which two envelopes overlap; `b` is read `shift` steps later.
IRLVLA_HD uint64_t overlapping_steps(const Envelope& a, const Envelope& b, int shift) {
  constexpr int count = 48;  // 41, padded: steps beyond are empty in `a`
  static_assert(count + 9 <= kFrames, "the shifted read stays inside");
#ifdef __CUDA_ARCH__
  uint64_t mask = 0;
  for (int t = 0; t < kSteps; ++t) {
    const int u = t + shift;
    mask |= static_cast<uint64_t>(a.x0[t] <= b.x1[u] && b.x0[u] <= a.x1[t] && a.y0[t] <= b.y1[u] && b.y0[u] <= a.y1[t]) << t;
  }
  return mask;
#else
  uint8_t hit[count];
  for (int t = 0; t < count; ++t) {
    const int u = t + shift;
    hit[t] = (a.x0[t] <= b.x1[u]) & (b.x0[u] <= a.x1[t]) & (a.y0[t] <= b.y1[u]) & (b.y0[u] <= a.y1[t]);
  }
  uint64_t mask = 0;
  for (int i = 0; i < count; i += 8) mask |= eight_bits(hit + i) << i;
  return mask;
#endif
}

IRLVLA_HD Corners agent_corners(const Agent& agent, int t) {
  return box_corners(agent.x[t], agent.y[t], agent.cosine[t], agent.sine[t], agent.lateral_cosine[t], agent.lateral_sine[t], agent.half_length,
                     agent.half_width);
}

/// The candidate's box at step t, moved by (dx, dy), touches the agent's box at step u. Exact.
IRLVLA_HD bool touches(const Track& track, int t, double dx, double dy, const Agent& agent, int u) {
  const Box ego{track.centre_x[t] + dx, track.centre_y[t] + dy, track.cosine[t], track.sine[t], kHalfLength, kHalfWidth};
  const Box other{agent.x[u], agent.y[u], agent.cosine[u], agent.sine[u], agent.half_length, agent.half_width};
  const double gap = separation(ego, other);
  if (gap > kCertain) return false;
  if (gap < -kCertain) return true;
  return overlap(corners_at(track, t, dx, dy), agent_corners(agent, u));
}

/// Whether the agent's centroid lies within 30 degrees of the heading, or beyond 150, seen from the rear axle at step t
/// (idm/utils.py). For an agent exactly in line, rounding can carry the devkit's cosine past 1 and its arccos to NaN,
/// so that the agent is neither; whether it does hangs on the last bit of the simulated state. Here it is in line.
struct Bearing {
  bool ahead, behind;
};

IRLVLA_HD Bearing bearing(const Track& track, int t, const Corners& agent) {
  double x, y;
  centroid(agent, x, y);
  const double dx = x - track.x[t], dy = y - track.y[t], norm = square_root(dx * dx + dy * dy);
  const double cosine = track.cosine[t] * (dx / norm) + track.sine[t] * (dy / norm);  // NaN on the axle itself: neither
  return {cosine > 0.8660254037844387, cosine < -0.8660254037844387};
}

/// First contact with an agent. Only the first decides: a fault cannot get worse, and anything else makes the devkit
/// ignore the agent from then on.
struct Contact {
  int step = -1;
  bool counts = false;
  int ahead = 0;  // which of the TTC offsets
};

/// _calculate_no_at_fault_collision, get_collision_type.
IRLVLA_HD Contact first_collision(const Track& track, const Areas& areas, const Agent& agent) {
  uint64_t steps = overlapping_steps(track.envelope[0], agent.envelope, 0);
  for (; steps; steps &= steps - 1) {
    const int t = lowest_bit(steps);
    if (!touches(track, t, 0.0, 0.0, agent, t)) continue;
    Contact contact{t, false};
    if (track.speed[t] <= 5e-2) return contact;  // stopped ego
    if (agent.stopped) return {t, true};
    const Corners other = agent_corners(agent, t);
    if (bearing(track, t, other).behind) return contact;                  // active rear
    if (side_touches(corners_at(track, t), 0, 3, other)) return {t, true};  // active front
    contact.counts = ((areas.multiple_lanes | areas.off_road) >> t) & 1;  // active lateral
    return contact;
  }
  return {};
}

/// _calculate_ttc. The box moves on along its heading with hypot(vx, vy): a reversing car is projected forwards.
IRLVLA_HD Contact first_approach(const PackedScene& scene, const Track& track, const Areas& areas, const Agent& agent, uint64_t moving) {
  uint64_t steps[kOffsets];
  for (int i = 0; i < kOffsets; ++i) steps[i] = overlapping_steps(track.envelope[i], agent.envelope, 3 * i) & moving;
  uint64_t any = steps[0] | steps[1] | steps[2] | steps[3];
  for (; any; any &= any - 1) {
    const int t = lowest_bit(any);
    for (int i = 0; i < kOffsets; ++i) {
      if (!((steps[i] >> t) & 1)) continue;
      const double ahead = (3 * i) * kStep;
      const double dx = track.cosine[t] * track.speed[t] * ahead, dy = track.sine[t] * track.speed[t] * ahead;
      const int u = t + 3 * i;
      if (!touches(track, t, dx, dy, agent, u)) continue;
      const Bearing where = bearing(track, t, agent_corners(agent, u));
      if (where.ahead) return {t, true, i};
      if (where.behind) return {t, false, i};
      const bool exposed = (((areas.multiple_lanes | areas.off_road) >> t) & 1) || (areas_at(scene, track.x[t], track.y[t], nullptr) & kIntersection);
      return {t, exposed, i};
    }
  }
  return {};
}

/// First step at which the box touches a red polygon (_calculate_traffic_light_compliance); -1: never.
IRLVLA_HD int first_red_light(const PackedScene& scene, const Track& track, const Light& light) {
  const Polygon& polygon = scene.at(scene.polygon)[light.polygon];
  const Edge* edges = scene.at(scene.edges) + polygon.edge_begin;
  const Bounds& b = polygon.bounds;
  for (uint64_t steps = light.red; steps; steps &= steps - 1) {
    const int t = lowest_bit(steps);
    const Envelope& e = track.envelope[0];
    if (e.x1[t] < b.x0 - scene.origin_x || b.x1 - scene.origin_x < e.x0[t]) continue;
    if (e.y1[t] < b.y0 - scene.origin_y || b.y1 - scene.origin_y < e.y0[t]) continue;
    if (box_touches_polygon(corners_at(track, t), edges, polygon.edge_count)) return t;
  }
  return -1;
}

// --- counters -------------------------------------------------------------------------------------------------------

/// Largest distance within 11 samples (1.1 s, although the parameter says 1.0) while off the route; steps of `exempt`
/// do not count. Sums in the order of numpy's pairwise sum, since 2 m and 6 m are compared strictly.
IRLVLA_HD double oncoming_distance(const Track& track, uint64_t off_route, uint64_t exempt) {
  double step[kSteps];
  const uint64_t counted = off_route & ~exempt;
  for (int t = 0; t < kSteps; ++t) {
    if (t == 0 || !((counted >> t) & 1)) {
      step[t] = 0.0;
      continue;
    }
    step[t] = magnitude(track.centre_x[t] - track.centre_x[t - 1], track.centre_y[t] - track.centre_y[t - 1]);
  }
  double most = 0.0;
  for (int t = 0; t < kSteps && counted; ++t) {
    const int first = t > 10 ? t - 10 : 0, count = t - first + 1;
    const double* s = step + first;
    double sum = 0.0;
    int i = 0;
    if (count >= 8) sum = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])), i = 8;
    for (; i < count; ++i) sum += s[i];
    most = larger(most, sum);
  }
  return most;
}

/// Longest run of steps off the centreline; inside an intersection the counter neither grows nor resets.
IRLVLA_HD int off_centre_run(uint64_t off, uint64_t in_intersection) {
  int run = 0, longest = 0;
  for (int t = 0; t < kSteps; ++t) {
    if ((in_intersection >> t) & 1) continue;
    run = (off >> t) & 1 ? run + 1 : 0;
    longest = run > longest ? run : longest;
  }
  return longest;
}

IRLVLA_HD double direction_compliance(double oncoming) { return oncoming < 2.0 ? 1.0 : oncoming < 6.0 ? 0.5 : 0.0; }

}  // namespace IRLVLA_ISA
}  // namespace irlvla
