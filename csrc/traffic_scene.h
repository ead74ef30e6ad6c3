// Preparation of a scene for reactive traffic: who drives, along which path, what of it is the same for every candidate.
#pragma once
#include "traffic.h"

#include <vector>

namespace irlvla {
namespace baseline {

/// What is added to a scene.
struct TrafficArrays {
  std::vector<PathPoint> path;
  std::vector<double> corner_x, corner_y;
  std::vector<Bounds> path_blocks;
  std::vector<Vehicle> vehicles;
  std::vector<int32_t> meeting_of;
  std::vector<Meeting> meetings;
  std::vector<Standing> standing;
  std::vector<Passage> passages;
  std::vector<double> plain;
  std::vector<uint64_t> stays, watch, watch_discs, plain_met;
  std::vector<Footprint> footprints;
};

/// Vehicles of t = 0 are put on their lanes; `agents` forget what was recorded of them later.
TrafficArrays prepare_traffic(const SceneArrays& in, int64_t scene, PackedScene& head, const std::vector<Polygon>& polygons,
                              const std::vector<Edge>& edges, std::vector<Agent>& agents);

/// The paths of vehicles that are on their lanes: where they lead, and who may come into whose way. (traffic_paths.cpp)
void relate_vehicles(PackedScene& head, TrafficArrays& traffic);

/// What traffic does without the ego, written into the packed scene; the rings of footprints are added at its end.
void drive_alone(std::vector<char>& packed);

}  // namespace baseline
}  // namespace irlvla
