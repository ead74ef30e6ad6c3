// Who drives in reactive traffic: vehicles of t = 0 on the baselines of their lanes, and those that stand.
#include "traffic_scene.h"
#include "scene_checks.h"

#include <cmath>
#include <cstring>
#include <utility>

namespace irlvla {
namespace baseline {
namespace {

/// The baseline of a polygon of this scene, as GEOS measures along a line.
struct Baseline {
  const double* points;
  int64_t count;
  double length() const {
    double sum = 0.0;
    for (int64_t i = 0; i + 1 < count; ++i) sum += irlvla::baseline::length(piece(i));
    return sum;
  }
  Edge piece(int64_t i) const { return {points[2 * i], points[2 * i + 1], points[2 * i + 2], points[2 * i + 3]}; }
  double project(double x, double y) const {
    double best = kInfinity, along = 0.0, start = 0.0;
    for (int64_t i = 0; i + 1 < count; ++i) {
      const Edge e = piece(i);
      const double d = segment_distance(e, x, y);
      if (d < best) best = d, along = start + segment_fraction(e, x, y) * irlvla::baseline::length(e);
      start += irlvla::baseline::length(e);
    }
    return along;
  }
  Pose<double> at(double along) const {  // a negative distance counts from the end
    if (along < 0.0) along += length();
    if (along <= 0.0) return {points[0], points[1], 0.0};
    double start = 0.0;
    for (int64_t i = 0; i + 1 < count; ++i) {
      const Edge e = piece(i);
      const double size = irlvla::baseline::length(e);
      if (start + size > along) {
        const double share = (along - start) / size;
        return {(e.x1 - e.x0) * share + e.x0, (e.y1 - e.y0) * share + e.y0, 0.0};
      }
      start += size;
    }
    return {points[2 * count - 2], points[2 * count - 1], 0.0};
  }
  /// Its heading is that of the next half metre (get_nearest_pose_from_position).
  Pose<double> nearest(double x, double y) const {
    const double along = project(x, y);
    Pose<double> here = at(along), from = here, to = at(along + kLookAhead);
    if (from.x == to.x && from.y == to.y) from = at(along - kLookAhead), to = here;
    here.heading = std::atan2(to.y - from.y, to.x - from.x);
    return here;
  }
};

struct Traffic {
  const SceneArrays& in;
  const int64_t scene;
  PackedScene& head;
  const std::vector<Polygon>& polygons;
  const std::vector<Edge>& edges;
  std::vector<Agent>& agents;
  TrafficArrays out;

  /// Vehicles of t = 0 in their order: snapped to a lane if they can be (build_idm_agents_on_map_rails).
  void build() {
    check_baselines();
    std::vector<Corners> taken{box_corners(head.ego.x + kRearToCentre * std::cos(head.ego.heading), head.ego.y + kRearToCentre * std::sin(head.ego.heading),
                                           head.ego.heading, kHalfLength, kHalfWidth)};
    double target = kTargetSpeed;
    for (int64_t a = in.agent_offsets[scene], i = 0; a < in.agent_offsets[scene + 1]; ++a, ++i) {
      if (in.agent_kind[a] != 0) continue;
      agents[i].touches_ego = 0;
      empty(agents[i], in.agent_valid[a * in.agent_steps] ? 1 : 0);
      if (in.agent_valid[a * in.agent_steps] && !snap(a, i, taken, target)) let_stand(a, i);
    }
    relate_vehicles(head, out);
  }

  void check_baselines() const {
    const int64_t begin = in.polygon_offsets[scene], end = in.polygon_offsets[scene + 1];
    for (int64_t p = begin; p < end; ++p) {
      const int64_t count = in.baseline_offsets[p + 1] - in.baseline_offsets[p];
      const bool is_lane = in.polygon_layer[p] == kLane || in.polygon_layer[p] == kConnector;
      require(!is_lane || count >= 2, "reactive traffic needs the baseline of every lane and connector; that of polygon ", p - begin, " has ", count,
              " points");
      require(sane(in.baseline + 2 * in.baseline_offsets[p], 2 * count), "the baseline of polygon ", p - begin, " holds NaN, infinity or a value beyond 1e8");
      require(!(in.polygon_speed_limit[p] < 0.0), "the speed limit of polygon ", p - begin, " is negative");
    }
  }

  bool within(int64_t polygon, double x, double y) const {
    const Polygon& p = polygons[polygon];
    return p.bounds.contains(x, y) && locate(edges.data() + p.edge_begin, p.edge_count, x, y) > 0;
  }

  bool within_layer(int layer, double x, double y) const {
    for (size_t p = 0; p < polygons.size(); ++p)
      if (in.polygon_layer[in.polygon_offsets[scene] + p] == layer && within(p, x, y)) return true;
    return false;
  }

  Baseline baseline_of(int64_t polygon) const {
    const int64_t begin = in.baseline_offsets[in.polygon_offsets[scene] + polygon];
    return {in.baseline + 2 * begin, in.baseline_offsets[in.polygon_offsets[scene] + polygon + 1] - begin};
  }

  /// The lane, or in an intersection the connector, whose heading is nearest; the difference is not wrapped. -1: none.
  int64_t starting_lane(double x, double y, double heading) const {
    int64_t best = -1;
    double least = kInfinity;
    for (const int layer : {kLane, kConnector}) {
      if (layer == kConnector && (within_layer(kLane, x, y) || !within_layer(kIntersectionLayer, x, y))) break;
      for (size_t p = 0; p < polygons.size(); ++p) {
        if (in.polygon_layer[in.polygon_offsets[scene] + p] != layer || !within(p, x, y)) continue;
        const double difference = std::abs(baseline_of(p).nearest(x, y).heading - heading);
        if (difference < least) least = difference, best = p;
      }
    }
    return best;
  }

  bool snap(int64_t a, int64_t i, std::vector<Corners>& taken, double& target) {
    const double *s = in.agent_state + a * in.agent_steps * 5, length = in.agent_size[2 * a], width = in.agent_size[2 * a + 1];
    const int64_t lane = starting_lane(s[0], s[1], s[2]);
    if (lane < 0) return false;
    const Baseline line = baseline_of(lane);
    const Pose<double> pose = line.nearest(s[0], s[1]);
    if (std::hypot(pose.x - s[0], pose.y - s[1]) > kSnap) return false;
    const Corners box = box_corners(pose.x, pose.y, pose.heading, length / 2.0, width / 2.0);
    for (const Corners& other : taken)
      if (overlap(box, other)) return false;
    taken.push_back(box);
    const double limit = in.polygon_speed_limit[in.polygon_offsets[scene] + lane];
    if (limit > 0.0) target = limit;  // the devkit's loop overwrites it for those that follow
    Vehicle vehicle{};
    vehicle.agent = static_cast<int32_t>(i), vehicle.path = static_cast<int32_t>(out.path.size());
    add_path(line);
    vehicle.path_count = static_cast<int32_t>(out.path.size()) - vehicle.path;
    require(vehicle.path_count >= 2, "agent ", i, " drives on polygon ", lane, ", whose baseline has fewer than 3 points; the devkit fails on it, too");
    vehicle.progress = line.project(s[0], s[1]), vehicle.speed = std::hypot(s[3], s[4]);
    vehicle.target = target, vehicle.limit = limit, vehicle.length = length, vehicle.width = width, vehicle.box = box;
    const Path own{out.path.data() + vehicle.path, vehicle.path_count, nullptr, nullptr};
    const Pose<double> start = own.pose(own.clamp(vehicle.progress));
    if (std::hypot(start.x - head.ego.x, start.y - head.ego.y) > kRadius) {  // it leaves before the first step
      out.path.resize(vehicle.path);
      return true;
    }
    out.vehicles.push_back(vehicle);
    agents[i].role = static_cast<int32_t>(out.vehicles.size());
    return true;
  }

  void add_path(const Baseline& line) {
    std::vector<PathPoint>& path = out.path;
    const size_t begin = path.size();
    double along = 0.0, turns = 0.0, before = 0.0;
    for (int64_t i = 0; i + 1 < line.count; ++i) {
      const Edge e = line.piece(i);
      const double size = irlvla::baseline::length(e), heading = std::atan2(e.y1 - e.y0, e.x1 - e.x0);
      if (size > 1e-8) {
        if (path.size() > begin) turns += unwrapping(heading - before);
        before = heading;
        path.push_back({e.x0, e.y0, along, heading + turns, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0});
      }
      along += size;
    }
    for (size_t i = begin; i + 1 < path.size(); ++i) {
      const double span = path[i + 1].progress - path[i].progress;
      path[i].slope_x = (path[i + 1].x - path[i].x) / span, path[i].slope_y = (path[i + 1].y - path[i].y) / span;
      path[i].slope_heading = (path[i + 1].heading - path[i].heading) / span;
    }
  }

  void let_stand(int64_t a, int64_t i) {
    const double* s = in.agent_state + a * in.agent_steps * 5;
    const bool on_road = within_layer(kLane, s[0], s[1]) || within_layer(kIntersectionLayer, s[0], s[1]);
    bool stands = std::hypot(s[3], s[4]) < kStationary && !on_road;
    const int64_t lane = starting_lane(s[0], s[1], s[2]);
    if (!stands && lane >= 0) {
      const Pose<double> pose = baseline_of(lane).nearest(s[0], s[1]);
      stands = std::hypot(pose.x - s[0], pose.y - s[1]) > kSnap;
    }
    if (!stands) return;
    out.standing.push_back({static_cast<int32_t>(i), 0, agent_corners(agents[i], 0)});
    agents[i].role = -static_cast<int32_t>(out.standing.size());
  }
};

}  // namespace

TrafficArrays prepare_traffic(const SceneArrays& in, int64_t scene, PackedScene& head, const std::vector<Polygon>& polygons,
                              const std::vector<Edge>& edges, std::vector<Agent>& agents) {
  Traffic traffic{in, scene, head, polygons, edges, agents, {}};
  traffic.build();
  return std::move(traffic.out);
}

namespace {

void append(std::vector<char>& packed, const std::vector<double>& items, Span<double> PackedScene::*span) {
  const size_t begin = packed.size();
  packed.resize(begin + (items.size() * sizeof(double) + 63) / 64 * 64);
  if (!items.empty()) std::memcpy(packed.data() + begin, items.data(), items.size() * sizeof(double));
  PackedScene& scene = *reinterpret_cast<PackedScene*>(packed.data());
  scene.*span = {static_cast<int64_t>(begin), static_cast<int64_t>(items.size())};
  scene.bytes = static_cast<int64_t>(packed.size());
}

}  // namespace

void drive_alone(std::vector<char>& packed) {
  PackedScene& scene = *reinterpret_cast<PackedScene*>(packed.data());
  std::vector<char> memory(scene.world_bytes);
  World world = world_in(scene, memory.data());
  std::vector<double> x, y;
  rollout_alone(scene, world, const_cast<uint64_t*>(scene.at(scene.plain_met)), [&](int v, int t) {
    const Driver& d = world.driver[v];
    Footprint& out = const_cast<Footprint*>(scene.at(scene.footprint))[v * kSteps + t];
    out = {d.bounds, d.ring[0].bounds, d.ring[1].bounds, d.pose, static_cast<int32_t>(x.size()), d.ring[1].size, d.ring[1].tail, 0};
    for (const Ring& ring : d.ring) x.insert(x.end(), ring.x, ring.x + ring.size), y.insert(y.end(), ring.y, ring.y + ring.size);
  });
  auto* plain = const_cast<double*>(scene.at(scene.plain));
  auto* agent = const_cast<Agent*>(scene.at(scene.agent));
  for (int v = 0; v < scene.vehicles; ++v) {
    std::memcpy(plain + 2 * v * kSteps, world.progress + v * kSteps, kSteps * sizeof(double));
    std::memcpy(plain + (2 * v + 1) * kSteps, world.speed + v * kSteps, kSteps * sizeof(double));
    dress(scene, world, v, 1, agent[scene.at(scene.vehicle)[v].agent]);
  }
  for (int i = 0; i < scene.standing; ++i) {
    const_cast<uint64_t*>(scene.at(scene.stays))[i] = world.standing[i];
    remain(world.standing[i], agent[scene.at(scene.stander)[i].agent]);
  }
  append(packed, x, &PackedScene::ring_x);
  append(packed, y, &PackedScene::ring_y);
}

}  // namespace baseline
}  // namespace irlvla
