// Preparation of a scene: derived boxes, a grid over its polygons and centreline, and what is the same for every
// candidate. Runs once per scene, on the CPU.
#include "epdms.h"
#include "scene_checks.h"
#include "traffic_scene.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace irlvla {
namespace baseline {
namespace {

constexpr double kSlop = 1e-6;  // cells are a little larger than drawn, so rounding cannot lose an edge

struct NearEdge {
  uint32_t cell, item;  // item: edge or segment number
  int32_t polygon;
  bool left, inside, whole;  // of the witness; `whole`: it lies on the boundary
};

/// Kept by each thread from scene to scene: fresh pages would cost more than the work.
struct Workspace {
  std::vector<uint32_t> flags, start;
  std::vector<uint32_t> bordered, inside, whole;  // stamps: cells are marked with polygon number + 1
  std::vector<uint64_t> covering;
  std::vector<NearEdge> near, lines, sorted;
  std::vector<std::pair<int, double>> crossings;
};

// Not inline: compilers look up what belongs to a thread again at each use.
[[gnu::noinline]] Workspace& workspace() {
  static thread_local Workspace work;
  return work;
}

/// One scene under construction.
struct Builder {
  const SceneArrays& in;
  const int64_t scene;
  PackedScene head{};
  std::vector<uint32_t> grid;
  std::vector<Cell> cells;
  std::vector<uint64_t> lanes;
  std::vector<Border> borders;
  std::vector<uint32_t> near_edges, near_lines;
  std::vector<Polygon> polygons;
  std::vector<Edge> edges, line;
  std::vector<Agent> agents;
  std::vector<Light> lights;
  std::vector<double> line_start;
  std::vector<Bounds> line_blocks;
  TrafficArrays traffic;

  Builder(const SceneArrays& arrays, int64_t index) : in(arrays), scene(index) {}

  void build() {
    check();
    set_ego();
    add_history();
    add_polygons();
    add_lights();
    add_agents();
    add_centerline();
    make_grid();
    if (in.reactive) traffic = prepare_traffic(in, scene, head, polygons, edges, agents);
  }

  // --- checks -------------------------------------------------------------------------------------------------------

  /// Values that would give a wrong number or none. Shapes and offsets were checked by the caller.
  void check() const {
    const double* ego = in.ego + scene * kStateSize;
    require(sane(ego, kStateSize) && sane_heading(ego[2]), "the ego state holds NaN, infinity, or a value beyond 1e8 (heading: 1e6)");
    require(exact_time(in.time_us[scene]), "time_us is beyond 2^53; it counts microseconds");
    const int64_t* time = in.history_time_us + scene * in.history;
    require(sane(in.history_states + scene * in.history * 8, in.history * 8), "the history holds NaN, infinity or a value beyond 1e8");
    for (int64_t i = 0; i < in.history; ++i) require(exact_time(time[i]), "history_time_us is beyond 2^53; it counts microseconds");
    for (int64_t i = 0; i + 1 < in.history; ++i) require(time[i] < time[i + 1], "history_time_us must rise, frame ", i + 1, " does not");
    require(time[in.history - 1] - time[0] <= 2400000, "the history must span at most 2.4 s");
    check_agents();
    check_map();
    const int64_t begin = in.centerline_offsets[scene], end = in.centerline_offsets[scene + 1];
    require(end - begin >= 2, "the centreline has ", end - begin, " points; progress and lane keeping need at least 2");
    require(sane(in.centerline + 3 * begin, 3 * (end - begin)), "the centreline holds NaN, infinity or a value beyond 1e8");
  }

  void check_agents() const {
    for (int64_t a = in.agent_offsets[scene], i = 0; a < in.agent_offsets[scene + 1]; ++a, ++i) {
      const double *size = in.agent_size + 2 * a, *state = in.agent_state + a * in.agent_steps * 5;
      require(sane(size, 2) && size[0] > 0.0 && size[1] > 0.0, "agent ", i, " has size ", size[0], " x ", size[1], "; both must be positive");
      for (int64_t t = 0; t < in.agent_steps; ++t)
        require(!in.agent_valid[a * in.agent_steps + t] || (sane(state + 5 * t, 5) && sane_heading(state[5 * t + 2])), "agent ", i,
                " holds NaN, infinity or a value beyond 1e8 (heading: 1e6) at step ", t);
    }
  }

  void check_map() const {
    const int64_t begin = in.polygon_offsets[scene], end = in.polygon_offsets[scene + 1];
    int64_t lanes = 0;
    for (int64_t p = begin; p < end; ++p) {
      lanes += in.polygon_layer[p] == kLane || in.polygon_layer[p] == kConnector;
      require(in.ring_offsets[p + 1] > in.ring_offsets[p], "polygon ", p - begin, " has no ring");
      for (int64_t r = in.ring_offsets[p]; r < in.ring_offsets[p + 1]; ++r) {
        const int64_t first = in.point_offsets[r], count = in.point_offsets[r + 1] - first;
        require(count >= 3, "a ring of polygon ", p - begin, " has ", count, " points; it needs 3 (the first is not repeated)");
        require(sane(in.points + 2 * first, 2 * count), "polygon ", p - begin, " holds NaN, infinity or a value beyond 1e8");
      }
    }
    require(lanes <= 64 * kMaxLaneWords, lanes, " lanes and connectors; at most 1024 (the devkit takes those within 100 m)");
    for (int64_t q = in.light_offsets[scene]; q < in.light_offsets[scene + 1]; ++q)
      require(in.light_polygon[q] >= 0 && in.light_polygon[q] < end - begin, "a light names polygon ", in.light_polygon[q], " of ", end - begin);
  }

  // --- parts --------------------------------------------------------------------------------------------------------

  void set_ego() {
    const double* e = in.ego + scene * kStateSize;
    head.ego = {e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7], e[8], e[9], e[10]};
    round_trip(head.ego);
    head.origin_x = e[0], head.origin_y = e[1];
    head.time_us = in.time_us[scene];
    head.steps = static_cast<int32_t>(in.agent_steps);
  }

  /// Samples of the logged past every 100,000 us, the last dropped (_calculate_history_comfort): with exact 0.5 s stamps
  /// they end 0.2 s before the simulated states, and the gap is treated as 0.1 s.
  void add_history() {
    const int64_t* time = in.history_time_us + scene * in.history;
    const double* states = in.history_states + scene * in.history * 8;
    std::vector<double> heading(in.history);
    double turns = 0.0;
    for (int64_t i = 0; i < in.history; ++i) {
      if (i) turns += unwrapping(states[8 * i + 2] - states[8 * (i - 1) + 2]);
      heading[i] = states[8 * i + 2] + turns;
    }
    int64_t low = 0;
    const int64_t first = time[0], last = time[in.history - 1];
    const int64_t count = (last - first + 99999) / 100000 - 1;
    for (int64_t k = 0; k < count && k < kMaxHistory; ++k) {
      const int64_t query = first + k * 100000;
      while (low + 2 < in.history && time[low + 1] <= query) ++low;
      const double span = static_cast<double>(time[low + 1] - time[low]), passed = static_cast<double>(query - time[low]);
      const double *a = states + 8 * low, *b = a + 8;
      head.history_ax[k] = (b[5] - a[5]) / span * passed + a[5];
      head.history_ay[k] = (b[6] - a[6]) / span * passed + a[6];
      head.history_heading[k] = principal((heading[low + 1] - heading[low]) / span * passed + heading[low]);
      head.history = static_cast<int32_t>(k + 1);
    }
  }

  void add_polygons() {
    head.map = {kInfinity, kInfinity, -kInfinity, -kInfinity};
    int32_t lane = 0;
    for (int64_t p = in.polygon_offsets[scene]; p < in.polygon_offsets[scene + 1]; ++p) {
      const int64_t layer = in.polygon_layer[p];
      const bool is_lane = layer == kLane || layer == kConnector, is_intersection = layer == kIntersectionLayer;
      const bool drivable = is_intersection || layer == kRoadblock || layer == kDrivableArea || layer == kCarpark;
      Polygon polygon{{kInfinity, kInfinity, -kInfinity, -kInfinity}, static_cast<int32_t>(edges.size()), 0, 0, is_lane ? lane++ : -1};
      polygon.flags = (drivable ? kDrivable : 0u) | (is_intersection ? kIntersection : 0u) | (is_lane && in.polygon_on_route[p] ? kRoute : 0u);
      for (int64_t r = in.ring_offsets[p]; r < in.ring_offsets[p + 1]; ++r) {
        const int64_t begin = in.point_offsets[r], end = in.point_offsets[r + 1];
        for (int64_t v = begin; v < end; ++v) {
          const double *a = in.points + 2 * v, *b = in.points + 2 * (v + 1 < end ? v + 1 : begin);
          edges.push_back({a[0], a[1], b[0], b[1]});
          extend(polygon.bounds, a[0], a[1]);
        }
      }
      polygon.edge_count = static_cast<int32_t>(edges.size()) - polygon.edge_begin;
      extend(head.map, polygon.bounds.x0, polygon.bounds.y0);
      extend(head.map, polygon.bounds.x1, polygon.bounds.y1);
      polygons.push_back(polygon);
    }
    head.polygons = static_cast<int32_t>(polygons.size());
    head.lane_words = (lane + 63) / 64;
  }

  static void extend(Bounds& b, double x, double y) {
    b.x0 = std::min(b.x0, x), b.x1 = std::max(b.x1, x);
    b.y0 = std::min(b.y0, y), b.y1 = std::max(b.y1, y);
  }

  /// Lights of connectors that are not on the route are dropped, as when the devkit builds its cache.
  void add_lights() {
    for (int64_t q = in.light_offsets[scene]; q < in.light_offsets[scene + 1]; ++q) {
      Light light{static_cast<int32_t>(in.light_polygon[q]), 0, 0};
      for (int t = 0; t < kSteps; ++t) light.red |= static_cast<uint64_t>(in.light_red[q * kSteps + t] != 0) << t;
      if (light.red && (polygons[light.polygon].flags & kRoute)) lights.push_back(light);
    }
    head.lights = static_cast<int32_t>(lights.size());
  }

  void add_agents() {
    const double* e = in.ego + scene * kStateSize;
    double s, c;
    sine_cosine(e[2], s, c);
    const Corners ego = box_corners(e[0] + kRearToCentre * c, e[1] + kRearToCentre * s, e[2], kHalfLength, kHalfWidth);
    const int64_t begin = in.agent_offsets[scene], end = in.agent_offsets[scene + 1];
    agents.resize(end - begin);
    for (int64_t a = begin; a < end; ++a) fill_agent(agents[a - begin], a, ego);
    head.agents = static_cast<int32_t>(agents.size());
  }

  void fill_agent(Agent& agent, int64_t a, const Corners& ego) {
    std::memset(&agent, 0, sizeof agent);
    agent.half_length = in.agent_size[2 * a] / 2.0, agent.half_width = in.agent_size[2 * a + 1] / 2.0;
    agent.fixed = in.agent_kind[a] > 2;
    agent.x0 = agent.y0 = 3e38f, agent.x1 = agent.y1 = -3e38f;
    bool seen = false;
    for (int t = 0; t < kFrames; ++t) {
      Envelope& v = agent.envelope;
      v.x0[t] = v.y0[t] = 3e38f, v.x1[t] = v.y1[t] = -3e38f;
      if (t >= in.agent_steps || !in.agent_valid[a * in.agent_steps + t]) continue;
      const double* s = in.agent_state + (a * in.agent_steps + t) * 5;
      if (!seen) agent.stopped = agent.fixed || std::hypot(s[3], s[4]) <= 5e-2;  // velocity as first seen, for good
      seen = true;
      agent.x[t] = s[0], agent.y[t] = s[1];
      // Recorded boxes do not move: the library's sine agrees with numpy's to the last bit, or nearly always.
      const double* before = s - 5;
      if (t && in.agent_valid[a * in.agent_steps + t - 1] && before[2] == s[2]) {  // turned as one step before
        agent.cosine[t] = agent.cosine[t - 1], agent.sine[t] = agent.sine[t - 1];
        agent.lateral_cosine[t] = agent.lateral_cosine[t - 1], agent.lateral_sine[t] = agent.lateral_sine[t - 1];
      } else {
        agent.cosine[t] = std::cos(s[2]), agent.sine[t] = std::sin(s[2]);
        agent.lateral_cosine[t] = std::cos(s[2] + kHalfPi), agent.lateral_sine[t] = std::sin(s[2] + kHalfPi);
      }
      const double ex = std::abs(agent.cosine[t]) * agent.half_length + std::abs(agent.sine[t]) * agent.half_width;
      const double ey = std::abs(agent.sine[t]) * agent.half_length + std::abs(agent.cosine[t]) * agent.half_width;
      outward(s[0] - head.origin_x - ex, s[0] - head.origin_x + ex, v.x0[t], v.x1[t]);
      outward(s[1] - head.origin_y - ey, s[1] - head.origin_y + ey, v.y0[t], v.y1[t]);
      agent.x0 = std::min(agent.x0, v.x0[t]), agent.x1 = std::max(agent.x1, v.x1[t]);
      agent.y0 = std::min(agent.y0, v.y0[t]), agent.y1 = std::max(agent.y1, v.y1[t]);
    }
    if (in.agent_valid[a * in.agent_steps]) agent.touches_ego = overlap(agent_corners(agent, 0), ego);
  }

  void add_centerline() {
    const int64_t begin = in.centerline_offsets[scene], end = in.centerline_offsets[scene + 1];
    double along = 0.0;
    for (int64_t i = begin; i + 1 < end; ++i) {
      const double *a = in.centerline + 3 * i, *b = a + 3;
      line.push_back({a[0], a[1], b[0], b[1]});
      line_start.push_back(along);
      const double dx = b[0] - a[0], dy = b[1] - a[1];
      along += std::sqrt(dx * dx + dy * dy);
    }
    for (size_t i = 0; i < line.size(); ++i) {
      if (i % kBlock == 0) line_blocks.push_back({kInfinity, kInfinity, -kInfinity, -kInfinity});
      extend(line_blocks.back(), line[i].x0, line[i].y0);
      extend(line_blocks.back(), line[i].x1, line[i].y1);
    }
    head.segments = static_cast<int32_t>(line.size());
    double s, c, distance;
    sine_cosine(head.ego.heading, s, c);
    head.progress_start = locate_along(line.data(), line_start.data(), line_blocks.data(), head.segments, head.ego.x + kRearToCentre * c,
                                       head.ego.y + kRearToCentre * s, distance);
  }

  // --- the grid -----------------------------------------------------------------------------------------------------

  /// Calls put(cell) for every cell within `slop` of the edge.
  template <class Put> void rasterise(const Edge& e, double slop, Put put) const {
    const double low_y = std::min(e.y0, e.y1) - slop - head.grid_y, high_y = std::max(e.y0, e.y1) + slop - head.grid_y;
    if (high_y < 0.0 || low_y > head.rows * kCell) return;
    const int first = std::max(0, static_cast<int>(std::floor(low_y / kCell)));
    const int last = std::min(head.rows - 1, static_cast<int>(std::floor(high_y / kCell)));
    const double dy = e.y1 - e.y0;
    for (int row = first; row <= last; ++row) {
      double a = 0.0, b = 1.0;  // share of the edge that lies in the row
      if (std::abs(dy) > 1e-9) {
        a = (head.grid_y + row * kCell - slop - e.y0) / dy, b = (head.grid_y + (row + 1) * kCell + slop - e.y0) / dy;
        if (a > b) std::swap(a, b);
        a = std::min(std::max(a, 0.0), 1.0), b = std::min(std::max(b, 0.0), 1.0);
      }
      const double xa = e.x0 + a * (e.x1 - e.x0) - head.grid_x, xb = e.x0 + b * (e.x1 - e.x0) - head.grid_x;
      const double low_x = std::min(xa, xb) - slop, high_x = std::max(xa, xb) + slop;
      if (high_x < 0.0 || low_x > head.columns * kCell) continue;
      const int from = std::max(0, static_cast<int>(std::floor(low_x / kCell)));
      const int to = std::min(head.columns - 1, static_cast<int>(std::floor(high_x / kCell)));
      for (int column = from; column <= to; ++column) put(static_cast<uint32_t>(row * head.columns + column));
    }
  }

  /// Calls put(cell) for every cell whose witness lies inside the polygon, up to rounding.
  template <class Put> void fill(const Polygon& polygon, std::vector<std::pair<int, double>>& crossings, Put put) const {
    crossings.clear();
    for (int32_t i = polygon.edge_begin; i < polygon.edge_begin + polygon.edge_count; ++i) {
      const Edge& e = edges[i];
      double wx, wy0;
      witness(head, 0, 0, wx, wy0);
      const double low = std::min(e.y0, e.y1), high = std::max(e.y0, e.y1);
      if (high < wy0 || low > wy0 + head.rows * kCell) continue;
      const int first = std::max(0, static_cast<int>(std::floor((low - wy0) / kCell)));
      const int last = std::min(head.rows - 1, static_cast<int>(std::floor((high - wy0) / kCell)) + 1);
      for (int row = first; row <= last; ++row) {
        double wy;
        witness(head, 0, row, wx, wy);
        if ((e.y0 > wy) != (e.y1 > wy)) crossings.emplace_back(row, e.x0 + (wy - e.y0) / (e.y1 - e.y0) * (e.x1 - e.x0));
      }
    }
    std::sort(crossings.begin(), crossings.end());
    for (size_t i = 0; i + 1 < crossings.size(); i += 2) {
      double wx, wy;
      witness(head, 0, crossings[i].first, wx, wy);
      const double from = (crossings[i].second - wx) / kCell, to = (crossings[i + 1].second - wx) / kCell;
      if (to < 0.0 || from > head.columns) continue;
      const int first = std::max(0, static_cast<int>(std::ceil(from))), last = std::min(head.columns - 1, static_cast<int>(std::floor(to)));
      for (int column = first; column <= last; ++column) put(static_cast<uint32_t>(crossings[i].first * head.columns + column));
    }
  }

  /// The grid covers the part of the map that a plan can reach; points beyond it are looked up in the polygons.
  void place_grid() {
    const double reach = std::min(160.0, 48.0 + 5.0 * std::hypot(head.ego.vx, head.ego.vy));
    const double x0 = std::max(head.map.x0, head.origin_x - reach), x1 = std::min(head.map.x1, head.origin_x + reach);
    const double y0 = std::max(head.map.y0, head.origin_y - reach), y1 = std::min(head.map.y1, head.origin_y + reach);
    if (!(x0 <= x1 && y0 <= y1)) return;
    head.grid_x = std::floor(x0) - kCell, head.grid_y = std::floor(y0) - kCell;
    head.columns = static_cast<int32_t>((x1 - head.grid_x) / kCell) + 2;
    head.rows = static_cast<int32_t>((y1 - head.grid_y) / kCell) + 2;
  }

  void make_grid() {
    place_grid();
    const size_t count = static_cast<size_t>(head.columns) * head.rows, words = head.lane_words;
    Workspace& work = workspace();
    auto &flags = work.flags, &bordered = work.bordered, &inside = work.inside, &whole = work.whole;
    auto &covering = work.covering;
    auto &near = work.near, &lines = work.lines;
    flags.assign(count, 0), bordered.assign(count, 0), inside.assign(count, 0), whole.assign(count, 0), covering.assign(count * words, 0);
    near.clear(), lines.clear();
    for (int32_t p = 0; p < head.polygons; ++p) {
      const Polygon& polygon = polygons[p];
      const uint32_t stamp = static_cast<uint32_t>(p) + 1;
      const size_t begin = near.size();
      for (int32_t i = polygon.edge_begin; i < polygon.edge_begin + polygon.edge_count; ++i)
        rasterise(edges[i], kSlop, [&](uint32_t cell) {
          bordered[cell] = stamp;
          near.push_back({cell, static_cast<uint32_t>(i), p, false, false, false});
        });
      fill(polygon, work.crossings, [&](uint32_t cell) {
        if (bordered[cell] == stamp) {
          inside[cell] = stamp;
          return;
        }
        flags[cell] |= polygon.flags;
        if (polygon.lane >= 0) covering[cell * words + (polygon.lane >> 6)] |= uint64_t{1} << (polygon.lane & 63);
      });
      ask_witnesses(polygon, stamp, near.begin() + begin, near.end(), inside, whole);
    }
    for (size_t i = 0; i < line.size(); ++i)
      rasterise(line[i], 0.5 + kSlop, [&](uint32_t cell) { lines.push_back({cell, static_cast<uint32_t>(i), 0, false, false, false}); });
    sort_by_cell(near, count, work);
    sort_by_cell(lines, count, work);
    write_cells(flags, covering, near, lines);
  }

  typedef std::vector<NearEdge>::iterator Near;

  /// On which side of each edge its cell's witness lies, and whether inside the polygon. A witness too close to an edge
  /// to trust the fill asks the polygon itself.
  void ask_witnesses(const Polygon& polygon, uint32_t stamp, Near begin, Near end, std::vector<uint32_t>& inside, std::vector<uint32_t>& whole) const {
    for (Near item = begin; item != end; ++item) {
      const Edge& e = edges[item->item];
      double wx, wy;
      witness(head, static_cast<int>(item->cell % head.columns), static_cast<int>(item->cell / head.columns), wx, wy);
      const double dx = e.x1 - e.x0, dy = e.y1 - e.y0, det = dx * (wy - e.y0) - dy * (wx - e.x0);
      item->left = det > 0.0;
      if (std::abs(det) > kSlop * (std::abs(dx) + std::abs(dy))) continue;  // surely farther than kSlop from the line
      item->left = orientation(e.x0, e.y0, e.x1, e.y1, wx, wy) > 0;
      if (segment_distance(e, wx, wy) > kSlop) continue;
      const int where = locate(edges.data() + polygon.edge_begin, polygon.edge_count, wx, wy);
      inside[item->cell] = where > 0 ? stamp : 0;
      whole[item->cell] = where == 0 ? stamp : 0;
    }
    for (Near item = begin; item != end; ++item) {
      item->inside = inside[item->cell] == stamp;
      item->whole = whole[item->cell] == stamp;
    }
  }

  static void sort_by_cell(std::vector<NearEdge>& items, size_t count, Workspace& work) {
    auto& start = work.start;
    auto& sorted = work.sorted;
    start.assign(count + 1, 0);
    for (const NearEdge& item : items) ++start[item.cell + 1];
    for (size_t i = 0; i < count; ++i) start[i + 1] += start[i];
    sorted.resize(items.size());
    for (const NearEdge& item : items) sorted[start[item.cell]++] = item;
    items.swap(sorted);
  }

  void write_cells(const std::vector<uint32_t>& flags, const std::vector<uint64_t>& covering, const std::vector<NearEdge>& near,
                   const std::vector<NearEdge>& lines) {
    const size_t words = head.lane_words, count = flags.size(), columns = head.columns;
    const uint32_t* const flag = flags.data();
    const auto cell_of = [&](const std::vector<NearEdge>& items, size_t i) { return i < items.size() ? items[i].cell : count; };
    grid.resize(count);
    uint32_t* const record_of = grid.data();
    size_t n = 0, l = 0, next = std::min(cell_of(near, 0), cell_of(lines, 0));  // the next cell with an edge or a line in it
    bool plain = false;
    for (size_t cell = 0; cell < count; ++cell) {
      const bool before = plain;
      const uint64_t* own = covering.data() + cell * words;
      plain = cell != next;
      // Neighbours mostly look alike: one record serves a whole run of them.
      if (plain && before && flag[cell] == flag[cell - 1] && std::equal(own, own + words, own - words)) {
        record_of[cell] = record_of[cell - 1];
      } else if (plain && cell >= columns && repeats(record_of[cell - columns], flag[cell], own)) {
        record_of[cell] = record_of[cell - columns];
      } else {
        record_of[cell] = static_cast<uint32_t>(cells.size());
        add_cell(flag[cell], cell, near, n, lines, l);
        lanes.insert(lanes.end(), own, own + words);
        next = std::min(cell_of(near, n), cell_of(lines, l));
      }
    }
  }

  /// The record of a cell, with its items from n and l on.
  void add_cell(uint32_t flags, size_t cell, const std::vector<NearEdge>& near, size_t& n, const std::vector<NearEdge>& lines, size_t& l) {
    Cell record{flags, static_cast<uint32_t>(borders.size()), 0, static_cast<uint32_t>(near_lines.size()), 0};
    while (n < near.size() && near[n].cell == cell) n = add_border(near, n);
    for (; l < lines.size() && lines[l].cell == cell; ++l) near_lines.push_back(lines[l].item);
    record.n_borders = static_cast<uint32_t>(borders.size()) - record.borders;
    record.n_line = static_cast<uint32_t>(near_lines.size()) - record.line;
    cells.push_back(record);
  }

  bool repeats(uint32_t record, uint32_t flags, const uint64_t* own) const {
    const Cell& c = cells[record];
    if (c.n_borders != 0 || c.n_line != 0 || c.flags != flags) return false;
    for (int32_t w = 0; w < head.lane_words; ++w)
      if (own[w] != lanes[record * head.lane_words + w]) return false;
    return true;
  }

  /// The border of one polygon in one cell, from item n on; returns the first item after it.
  size_t add_border(const std::vector<NearEdge>& near, size_t n) {
    const NearEdge& first = near[n];
    Border border{first.polygon, static_cast<uint32_t>(near_edges.size()), 0, first.whole ? kAskPolygon : first.inside ? kInside : kOutside};
    for (; n < near.size() && near[n].cell == first.cell && near[n].polygon == first.polygon; ++n)
      if (!first.whole) near_edges.push_back(near[n].item * 2 + near[n].left);
    border.n_edges = static_cast<uint32_t>(near_edges.size()) - border.edges;
    borders.push_back(border);
    return n;
  }

  // --- one block of memory ------------------------------------------------------------------------------------------

  static int64_t padded(size_t bytes) { return static_cast<int64_t>((bytes + 63) / 64 * 64); }

  /// Calls visit(items, span) for every array, in the order in which they are stored.
  template <class Visit> void each_array(Visit visit) {
    visit(grid, head.grid), visit(cells, head.cells), visit(lanes, head.lanes), visit(borders, head.borders);
    visit(near_edges, head.near_edges), visit(near_lines, head.near_lines), visit(polygons, head.polygon), visit(edges, head.edges);
    visit(agents, head.agent), visit(lights, head.light), visit(line, head.line), visit(line_start, head.line_start);
    visit(line_blocks, head.line_blocks), visit(traffic.path, head.path), visit(traffic.corner_x, head.corner_x);
    visit(traffic.corner_y, head.corner_y), visit(traffic.vehicles, head.vehicle), visit(traffic.meeting_of, head.meeting_of);
    visit(traffic.meetings, head.meeting), visit(traffic.standing, head.stander), visit(traffic.passages, head.passage);
    visit(traffic.plain, head.plain), visit(traffic.path_blocks, head.path_blocks), visit(traffic.stays, head.stays);
    visit(traffic.watch, head.watch), visit(traffic.watch_discs, head.watch_discs);
    visit(traffic.footprints, head.footprint), visit(traffic.plain_met, head.plain_met);
  }

  std::vector<char> pack() {
    head.bytes = padded(sizeof head);
    each_array([&](const auto& items, auto& span) {
      span = {head.bytes, static_cast<int64_t>(items.size())};
      head.bytes += padded(items.size() * sizeof items[0]);
    });
    std::vector<char> out(head.bytes);
    std::memcpy(out.data(), &head, sizeof head);
    each_array([&](const auto& items, auto& span) {
      if (!items.empty()) std::memcpy(out.data() + span.offset, items.data(), items.size() * sizeof items[0]);
    });
    return out;
  }
};

}  // namespace
}  // namespace baseline

std::vector<char> prepare_scene(const SceneArrays& arrays, int64_t scene) {
  baseline::Builder builder(arrays, scene);
  builder.build();
  std::vector<char> packed = builder.pack();
  if (arrays.reactive) baseline::drive_alone(packed);
  return packed;
}

}  // namespace irlvla
