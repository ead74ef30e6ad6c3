"""Files as OpenScene, nuPlan and NAVSIM write them, of a small made-up junction: what the tests read back.

Two lane groups of two lanes, 60 m long, joined over an intersection of 20 m by two connectors.
The car drives in the right lane at 8 m/s, with a vehicle ahead, a parked one, a pedestrian and a cone.
"""

from __future__ import annotations

import pickle
import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import shapely
from PIL import Image

ZONE = "EPSG:32611"
ORIGIN = np.array([664_000.0, 3_997_000.0])  # in Las Vegas
WIDTH = 3.6
SPEED = 8.0
CITY = "us-nv-las-vegas-strip"

# id, group, y of the middle, x range
LANES = {101: (11, -1.8, (-60, 0)), 102: (11, 1.8, (-60, 0)), 201: (12, -1.8, (20, 80)), 202: (12, 1.8, (20, 80))}
CONNECTORS = {301: (21, 101, 201, -1.8), 302: (21, 102, 202, 1.8)}  # id: group, from, to, y


def box(x: tuple[float, float], y: tuple[float, float]) -> shapely.Polygon:
    return shapely.box(x[0], y[0], x[1], y[1])


def line(x: tuple[float, float], y: float) -> shapely.LineString:
    return shapely.LineString([(px, y) for px in np.arange(x[0], x[1] + 0.5, 1.0)])


def tables() -> dict[str, list[dict[str, Any]]]:
    """Layers of the map in metres around the origin."""
    half = WIDTH / 2
    lanes = [
        {
            "fid": n,
            "lane_fid": n,
            "lane_group_fid": g,
            "lane_index": 1 if y > 0 else 2,
            "speed_limit_mps": 11.0,
            "geom": box(x, (y - half, y + half)),
        }
        for n, (g, y, x) in LANES.items()
    ]
    connectors = [
        {
            "fid": n,
            "exit_lane_fid": a,
            "entry_lane_fid": b,
            "lane_group_connector_fid": g,
            "intersection_fid": 31,
            "speed_limit_mps": None,
            "geom": line((0, 20), y),
        }
        for n, (g, a, b, y) in CONNECTORS.items()
    ]
    paths = [{"fid": 400 + n, "lane_fid": float(n), "lane_connector_fid": None, "geom": line(x, y)} for n, (_, y, x) in LANES.items()]
    paths += [
        {"fid": 400 + n, "lane_fid": None, "lane_connector_fid": float(n), "geom": line((0, 20), y)}
        for n, (_, _, _, y) in CONNECTORS.items()
    ]
    outlines = [{"fid": n, "lane_connector_fid": n, "geom": box((0, 20), (y - half, y + half))} for n, (_, _, _, y) in CONNECTORS.items()]
    return {
        "lanes_polygons": lanes,
        "lane_connectors": connectors,
        "baseline_paths": paths,
        "gen_lane_connectors_scaled_width_polygons": outlines,
        "lane_groups_polygons": [
            {"fid": 11, "geom": box((-60, 0), (-WIDTH, WIDTH))},
            {"fid": 12, "geom": box((20, 80), (-WIDTH, WIDTH))},
        ],
        "lane_group_connectors": [
            {"fid": 21, "from_lane_group_fid": 11, "to_lane_group_fid": 12, "intersection_fid": 31, "geom": box((0, 20), (-WIDTH, WIDTH))}
        ],
        "intersections": [{"fid": 31, "intersection_type_fid": 1, "geom": box((0, 20), (-10, 10))}],
        "carpark_areas": [{"fid": 41, "heading": 0.0, "geom": box((-40, -20), (-15, -WIDTH))}],
    }


def write_map(root: Path, city: str = CITY) -> Path:
    """A `map.gpkg` under a maps folder: longitude and latitude, geometries as GeoPackage blobs with an envelope."""
    path = root / city / "9.15.1915" / "map.gpkg"
    path.parent.mkdir(parents=True)
    to_degrees = pyproj.Transformer.from_crs(ZONE, "EPSG:4326", always_xy=True)
    file = sqlite3.connect(path)
    file.execute("CREATE TABLE meta (fid INTEGER, key TEXT, value TEXT)")
    file.execute("INSERT INTO meta VALUES (1, 'projectedCoordSystem', ?)", (ZONE,))
    file.execute("CREATE TABLE gpkg_geometry_columns (table_name TEXT, column_name TEXT)")
    for layer, rows in tables().items():
        columns = list(rows[0])
        file.execute(f'CREATE TABLE "{layer}" ({", ".join(columns)})')
        file.execute("INSERT INTO gpkg_geometry_columns VALUES (?, 'geom')", (layer,))
        for row in rows:
            moved = shapely.transform(row["geom"], lambda p: np.column_stack(to_degrees.transform(*(p + ORIGIN).T)))
            values = [blob(moved) if name == "geom" else row[name] for name in columns]
            file.execute(f'INSERT INTO "{layer}" VALUES ({", ".join("?" * len(columns))})', values)
    file.commit()
    file.close()
    return path


def blob(shape: shapely.Geometry) -> bytes:
    x0, y0, x1, y1 = shape.bounds
    return b"GP\x00" + bytes([0b11]) + struct.pack("<i4d", 4326, x0, x1, y0, y1) + shapely.to_wkb(shape)


def frames(count: int, log: str = "2021.05.12.22.00.38_veh-35_01008_01518") -> list[dict[str, Any]]:
    """Frames of a log: the car starts at x = -40."""
    made = []
    for row in range(count):
        x = -40.0 + SPEED * 0.5 * row
        pose = np.array([ORIGIN[0] + x, ORIGIN[1] - 1.8, 0.0])
        things = [  # name, track, x, y, yaw, size, velocity
            ("vehicle", "ahead", x + 25.0 + 0.5 * row, -1.8, 0.0, (4.6, 1.9, 1.6), (SPEED + 1.0, 0.0)),
            ("vehicle", "parked", -30.0, -8.0, 0.1, (4.5, 1.8, 1.5), (0.0, 0.0)),
            ("pedestrian", "walking", 10.0 + row * 0.6, 9.0, 3.2, (0.7, 0.7, 1.8), (1.2, 0.1)),
            ("traffic_cone", "cone", 30.0, 5.0, 0.0, (0.4, 0.4, 0.9), (0.0, 0.0)),
        ]
        if row % 3 == 2:
            things = [thing for thing in things if thing[1] != "walking"]  # hidden now and then
        boxes = np.array([[px - x, py + 1.8, 0.5, *size, yaw] for _, _, px, py, yaw, size, _ in things])
        made.append(
            {
                "token": f"{row:016x}",
                "frame_idx": row,
                "timestamp": 1_620_857_890_400_000 + 500_000 * row + row % 3,
                "log_name": log,
                "scene_token": "scene",
                "map_location": CITY,
                "roadblock_ids": ["11", "21", "12"],
                "traffic_lights": [(301, 4 <= row <= 6), (302, False), (999, True)],
                "ego2global_translation": np.array([*pose[:2], 600.0]),
                "ego2global_rotation": np.array([1.0, 0.0, 0.0, 0.0]),
                "ego_dynamic_state": [SPEED, 0.0, 0.1, -0.05],
                "driving_command": np.array([0, 1, 0, 0]),
                "lidar2ego": np.eye(4),
                "lidar_path": None,
                "cams": cameras(row),
                "anns": {
                    "gt_boxes": boxes,
                    "gt_names": np.array([thing[0] for thing in things]),
                    "gt_velocity_3d": np.array([[*thing[6], 0.0] for thing in things]),
                    "instance_tokens": [f"{row}-{thing[1]}" for thing in things],
                    "track_tokens": [thing[1] for thing in things],
                },
            }
        )
    return made


def cameras(row: int) -> dict[str, dict[str, Any]]:
    """The eight cameras with the calibration that nuPlan's have in common; each yawed as on the car."""
    yaws = {"F0": 0.0, "L0": 55.0, "L1": 111.0, "L2": 141.0, "R0": -55.0, "R1": -111.0, "R2": -141.0, "B0": 180.0}
    forward = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # camera axes of one that looks ahead
    made = {}
    for name, yaw in yaws.items():
        cos, sin = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
        turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        made[f"CAM_{name}"] = {
            "data_path": f"log/CAM_{name}/{row:016x}.jpg",
            "sensor2lidar_rotation": turn @ forward,
            "sensor2lidar_translation": np.array([1.65, 0.0, 1.5]),
            "cam_intrinsic": np.array([[1545.0, 0.0, 960.0], [0.0, 1545.0, 560.0], [0.0, 0.0, 1.0]]),
            "distortion": np.array([-0.356123, 0.172545, -0.00213, 0.000464, -0.05231]),
        }
    return made


def write_log(folder: Path, count: int = 20, name: str = "2021.05.12.22.00.38_veh-35_01008_01518") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pkl"
    path.write_bytes(pickle.dumps(frames(count, name)))
    return path


def write_images(root: Path, raws: list[dict[str, Any]]) -> None:
    """A small image of each camera of some frames, all of one colour: the row of the frame."""
    for row, raw in enumerate(raws):
        for camera in raw["cams"].values():
            path = root / camera["data_path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (96, 54), (10 * row, 80, 160)).save(path, quality=95)


def write_synthetic(folder: Path, token: str, present: int, shift: float, log: str, *, stored: int = 12) -> Path:
    """A synthetic scene: the frames around a present one, the car `shift` metres further to the left, and what it sees with it."""
    raws = frames(present + 9, log)[present - 3 : present - 3 + stored]
    made = []
    for row, raw in enumerate(raws):
        anns, cams = raw["anns"], {name.lower(): camera for name, camera in raw["cams"].items()}
        pose = np.array([*raw["ego2global_translation"][:2], 0.0]) + np.array([0.0, shift, 0.0])
        status = {
            "ego_pose": pose,
            "ego_velocity": np.array(raw["ego_dynamic_state"][:2], np.float32),
            "ego_acceleration": np.array(raw["ego_dynamic_state"][2:], np.float32),
            "driving_command": raw["driving_command"],
            "in_global_frame": True,
        }
        boxes = anns["gt_boxes"].copy()
        boxes[:, 1] -= shift
        annotations = {
            "boxes": boxes,
            "names": anns["gt_names"],
            "velocity_3d": anns["gt_velocity_3d"],
            "instance_tokens": anns["instance_tokens"],
            "track_tokens": anns["track_tokens"],
        }
        made.append(
            {
                "token": token if row == 3 else raw["token"],
                "timestamp": raw["timestamp"],
                "roadblock_ids": raw["roadblock_ids"],
                "traffic_lights": raw["traffic_lights"],
                "annotations": annotations,
                "ego_status": status,
                "lidar_path": None,
                "camera_dict": cams,
            }
        )
    about = {
        "log_name": log,
        "scene_token": "scene",
        "map_name": CITY,
        "initial_token": token,
        "num_history_frames": 4,
        "num_future_frames": stored - 4,
        "corresponding_original_scene": raws[-1]["token"],
        "corresponding_original_initial_token": raws[0]["token"],
    }
    content = {"scene_metadata": about, "frames": made, "extended_traffic_light_data": None, "extended_detections_tracks": None}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{token}.pkl"
    path.write_bytes(pickle.dumps(content))
    return path
