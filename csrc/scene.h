// A scene prepared for scoring: one block of memory without pointers, so it can be copied to a GPU or kept with the scene.
#pragma once
#include "dynamics.h"

namespace irlvla {

/// Raw arrays of B scenes in the layout of irlvla.types.Scene (offsets have one entry more than their rows).
struct SceneArrays {
  int64_t scenes, history, agent_steps;
  const int64_t* time_us;
  const double* ego;              // B 11
  const int64_t* history_time_us; // B H
  const double* history_states;   // B H 8
  const int64_t *agent_offsets, *agent_kind;
  const double* agent_size;    // A 2
  const uint8_t* agent_valid;  // A S
  const double* agent_state;   // A S 5
  const int64_t *polygon_offsets, *polygon_layer;
  const uint8_t* polygon_on_route;
  const int64_t *ring_offsets, *point_offsets;
  const double* points;  // V 2
  const int64_t *light_offsets, *light_polygon;
  const uint8_t* light_red;  // Q 41
  const int64_t* centerline_offsets;
  const double* centerline;  // L 3
  const double* polygon_speed_limit;
  const int64_t* baseline_offsets;
  const double* baseline;  // M 2
  bool reactive;           // also the traffic; agents are then what it does without the ego
};

namespace IRLVLA_ISA {

constexpr int kFrames = 60;       // steps kept per agent: 51, padded
constexpr int kMaxHistory = 24;   // history samples put before the simulated states
constexpr int kMaxLaneWords = 16; // 64 lanes each

/// `size` items of T at `offset` bytes from the start of the scene.
template <class T> struct Span {
  int64_t offset;
  int64_t size;
};

constexpr uint32_t kDrivable = 1, kIntersection = 2, kRoute = 4;  // of a polygon

struct Polygon {
  Bounds bounds;
  int32_t edge_begin, edge_count;
  uint32_t flags;
  int32_t lane;  // its number among lanes and connectors; -1: neither
};

/// Bounding boxes of a moving box, per step, rounded outwards, relative to the scene's origin. Steps without the agent
/// hold an empty box.
struct Envelope {
  float x0[kFrames], x1[kFrames], y0[kFrames], y1[kFrames];
};

struct Agent {
  Envelope envelope;
  float x0, x1, y0, y1;  // of all steps together
  double x[kFrames], y[kFrames];
  double cosine[kFrames], sine[kFrames], lateral_cosine[kFrames], lateral_sine[kFrames];  // of heading, and of heading + pi/2
  double half_length, half_width;
  int32_t fixed;       // an object, not a road user
  int32_t stopped;     // an object, or at most 0.05 m/s where first seen
  int32_t touches_ego; // at t = 0: log replay removes it
  int32_t role;        // in reactive traffic: v + 1 for vehicle v, -i - 1 for standing vehicle i, 0 for all others
};

struct Light {
  int32_t polygon, padding;
  uint64_t red;  // bit t: red at step t
};

/// A vertex of the path of a vehicle: the baseline of its lane without the last point, which the devkit loses.
struct PathPoint {
  double x, y, progress, heading;          // heading: unwrapped
  double slope_x, slope_y, slope_heading;  // per metre of progress, of the piece that begins here
  double across_x, across_y;               // from the piece that begins here to its left side
  int32_t left, right;                     // into `corner_x`: corners of the outline here; on the right they stand in falling order of vertices
};

/// An agent that drives: it was snapped to the baseline of its lane.
struct Vehicle {
  int32_t agent;
  int32_t path, path_count;  // into `path`
  int32_t first, last;       // pieces that it can reach within the horizon, of its path
  int32_t blocks;            // into `path_blocks`
  int32_t room;              // points that its footprint has at most
  double progress, speed;
  double target, limit;      // of speed; limit of its lane, NaN or 0 = none
  double length, width;
  Corners box;               // where it was snapped to
  Bounds reach, corridor;    // all that it can occupy within the horizon; its whole path ahead
  uint64_t near;             // bit u % 64: vehicle u may come into its way
  uint64_t felt;             // bit u % 64: it may come into the way of vehicle u
};

/// What a vehicle occupies after a step: its box and the strip ahead.
struct Footprint {
  Bounds bounds, box, strip;
  Pose<double> pose;
  int32_t begin, size, tail, padding;  // of the strip; it stands in `ring_x` behind the four corners of the box, which `begin` there
};

/// How a piece of one vehicle's path lies to the path of another, which goes along its own.
struct Meeting {
  float last;    // its progress beyond which nothing on the piece touches what lies ahead of it
  float sure;    // its progress up to which the middle of a vehicle on the piece lies in its way
  int32_t next;  // the first piece from this one on that comes near its path at all
};

constexpr double kWatchCell = 0.5;  // metres
constexpr int kWatch = 192;         // cells of a side
constexpr double kDisc = 1.45;      // metres: three discs of this radius in a row cover the ego's box

/// A vehicle that does not drive, and stays where it was as long as nothing touches it.
struct Standing {
  int32_t agent, padding;
  Corners box;
};

/// Progress of a vehicle between which its box may touch a standing one; from > to: never.
struct Passage {
  double from, to;
};

/// What is the same for every point of a grid cell, and what must be asked.
struct Cell {
  uint32_t flags;              // of the polygons that cover the whole cell
  uint32_t borders, n_borders; // polygons with an edge in the cell: Border records
  uint32_t line, n_line;       // centreline segments within 0.5 m of the cell
};

/// A polygon with edges in a cell. A point of the cell is inside iff the segment to the cell's witness point crosses
/// an odd number of these edges, or even where the witness itself is inside.
struct Border {
  int32_t polygon;
  uint32_t edges, n_edges;  // into `near_edges`
  uint32_t witness;
};

constexpr uint32_t kOutside = 0, kInside = 1;  // where the witness lies,
constexpr uint32_t kAskPolygon = 2;            // or on the boundary, so that it knows nothing

struct PackedScene {
  int64_t bytes;
  int64_t time_us;
  State<double> ego;  // after its round trip
  double origin_x, origin_y;
  int32_t agents, polygons, lights, segments, history, lane_words, steps, padding;
  // history comfort: samples before the simulated states
  double history_ax[kMaxHistory], history_ay[kMaxHistory], history_heading[kMaxHistory];
  double progress_start;  // of the centre of the ego at t = 0
  // the grid
  double grid_x, grid_y;
  int32_t columns, rows;
  Bounds map;
  Span<uint32_t> grid;         // cell -> record
  Span<Cell> cells;
  Span<uint64_t> lanes;        // lane_words per record: lanes that cover the whole cell
  Span<Border> borders;
  Span<uint32_t> near_edges;   // edge number * 2 + (witness lies left of it)
  Span<uint32_t> near_lines;   // segment numbers
  Span<Polygon> polygon;
  Span<Edge> edges;            // of polygons
  Span<Agent> agent;
  Span<Light> light;
  Span<Edge> line;             // segments of the centreline
  Span<double> line_start;     // distance along the centreline
  Span<Bounds> line_blocks;
  // reactive traffic
  int32_t vehicles, standing, corridor_room, room_padding;
  Bounds reach;                // all that vehicles can occupy within the horizon
  int64_t world_bytes;         // working memory of a candidate
  Span<PathPoint> path;
  Span<double> corner_x, corner_y;
  Span<Bounds> path_blocks;    // of the pieces of each path, kBlock at a time
  Span<Vehicle> vehicle;
  Span<int32_t> meeting_of;    // vehicles x vehicles: where their pieces begin in `meeting`; -1: they must be asked
  Span<Meeting> meeting;
  Span<Standing> stander;
  Span<Passage> passage;       // standing x vehicles
  Span<double> plain;          // 2 x 41 for each vehicle: progress and speed without the ego
  double watch_x, watch_y;     // a grid around where the ego may go
  Span<uint64_t> watch;        // of each cell, bit v % 64: the path of vehicle v may cover some of it
  Span<uint64_t> watch_discs;  // of each cell: the path of vehicle v may meet a disc around some point of it
  Span<Footprint> footprint;   // 41 for each vehicle: what it occupies after each step without the ego
  Span<double> ring_x, ring_y; // of footprints
  Span<uint64_t> plain_met;    // 41 for each vehicle: which others (bit u % 64) lay in its way then
  Span<uint64_t> stays;        // bit t: a standing vehicle is there at step t, without the ego

  template <class T> IRLVLA_HD const T* at(const Span<T>& span) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(this) + span.offset);
  }
};

constexpr double kCell = 1.0;   // metres
constexpr int64_t kTimeLimit = int64_t{1} << 53;
constexpr double kLimit = 1e8;  // coordinates beyond it are refused: a double could not hold what the predicates need

/// The witness point of a cell, off its centre so that it does not meet edges drawn on round coordinates.
IRLVLA_HD void witness(const PackedScene& scene, int column, int row, double& x, double& y) {
  x = scene.grid_x + (column + 0.5170312) * kCell;
  y = scene.grid_y + (row + 0.4831847) * kCell;
}

}  // namespace IRLVLA_ISA
}  // namespace irlvla
